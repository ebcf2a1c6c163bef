"""Pictures of conversations: checked before they are decoded, and known by what they show.

A picture comes as the bytes of a file, from a `data:` URL or a supervision. No address is fetched, and no user's text
names a file.
"""

import base64
import binascii
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ExpertokenError, one_line, require_extra

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
"""Formats that are read, with the suffix of their files; a picture of vectors can hold anything, and is none."""

MOST_BYTES = 32 * 2**20
MOST_PIXELS = 64 * 10**6
LONGEST_SIDE = 16_384
MOST_PICTURES = 32
"""Pictures of one conversation."""

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a conversation.

    Attributes:
        source: the file, or its bytes.
        key: hash of what it shows, by which caches know it: the same picture in another format is the same.
        pixels: how many; 0 where nobody looked.
    """

    source: Path | bytes
    key: bytes
    pixels: int = 0

    @classmethod
    def of(cls, source: Path | bytes, name: str = "picture") -> "Picture":
        """Return a picture that is checked and can be decoded. Errors as in `decoded`.

        Args:
            source: the file, or its bytes.
            name: what it is called in errors.
        """
        picture = decoded(source, name)
        return cls(source, digest(picture), picture.width * picture.height)

    def decoded(self) -> Any:
        """Return the picture as Pillow's, RGB. Errors as in the function of that name."""
        return decoded(self.source, "picture")

    @property
    def url(self) -> str:
        """The picture as a `data:` URL, as endpoints take it."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"


def file_below(root: Path, name: str, place: str) -> Path:
    """Return the file of a name below a folder.

    Args:
        root: the folder.
        name: name, as somebody wrote it.
        place: where, for errors.

    Raises:
        ExpertokenError: there is none, or a path or a link leads elsewhere.
    """
    try:
        found = (root / name).resolve(strict=True)
    except (OSError, ValueError):
        raise ExpertokenError(
            f"{place}: no picture {name!r} below {root}; --images names the folder of the paths"
        ) from None
    if not found.is_relative_to(root.resolve()):
        raise ExpertokenError(f"{place}: the picture {name!r} lies outside of {root}; nothing outside of it is read")
    return found


def digest(picture: Any) -> bytes:
    """Return the hash of a decoded picture, 16 bytes."""
    found = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    found.update(picture.tobytes())
    return found.digest()[:16]


def format_of(source: Path | bytes) -> str:
    """Return a picture's format, one of `FORMATS`, whatever its file is called."""
    with _opened(source) as picture:
        return str(picture.format)


def decoded(source: Path | bytes, name: str) -> Any:
    """Decode a picture, whole, as Pillow's RGB. Its sides are looked at before.

    Args:
        source: the file, or its bytes.
        name: what it is called in errors.

    Raises:
        ExpertokenError: it is no picture that is read here; the message says why.
        ImportError: the extra `vision` is not installed.
    """
    ops: Any = require_extra("PIL.ImageOps", "vision")
    picture = _check_header(source, name)
    try:
        return ops.exif_transpose(picture).convert("RGB")  # as whoever took it holds it
    except Exception as error:  # of all the decoders
        raise _no_picture(name, error) from None


def _check_header(source: Path | bytes, name: str) -> Any:
    """Return a picture that is not decoded yet, once its bytes, format and sides are some that are read here."""
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MOST_BYTES:
            raise ExpertokenError(f"{name}: {size:,} bytes; pictures of up to {MOST_BYTES:,} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit is told below
            picture = _opened(source)
    except ExpertokenError:
        raise
    except Exception as error:
        raise _no_picture(name, error) from None
    width, height = picture.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise ExpertokenError(
            f"{name}: {width} x {height} pixels; up to {MOST_PIXELS:,} pixels and sides of {LONGEST_SIDE:,} are read"
        )
    return picture


def _no_picture(name: str, error: Exception) -> ExpertokenError:
    return ExpertokenError(f"{name}: no picture of {', '.join(FORMATS)} ({one_line(error)})")


def _opened(source: Path | bytes) -> Any:
    from PIL import Image

    data = source if isinstance(source, bytes) else source.read_bytes()
    return Image.open(io.BytesIO(data), formats=list(FORMATS))


def _media_type(data: bytes) -> str:
    return f"image/{format_of(data).lower()}"


def url_part(source: Path | bytes, name: str) -> dict[str, Any]:
    """Return a picture as a part of a message that any expert can be given. Errors as in `decoded`.

    Args:
        source: the file, or its bytes.
        name: what it is called in errors.
    """
    return {"type": IMAGE, "image_url": {"url": Picture.of(source, name).url}}


IMAGE = "image_url"
"""Type of a part of a message that is a picture, as OpenAI's API has it."""


def part_of(picture: Picture) -> dict[str, Any]:
    """Return a picture as a part of a message; only Python makes one, a user's JSON can't."""
    return {"type": IMAGE, "image": picture}


def as_urls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose pictures are `data:` URLs, as endpoints take them.

    Args:
        messages: the conversation.
    """

    def part_as_url(part: dict[str, Any]) -> dict[str, Any]:
        picture = part.get("image")
        return {"type": IMAGE, "image_url": {"url": picture.url}} if isinstance(picture, Picture) else part

    return [
        m | {"content": [part_as_url(part) for part in m["content"]]} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def picture_of(part: dict[str, Any], place: str) -> Picture | None:
    """Return the picture of a part of a message; None where it is none, or only an address of one.

    Args:
        part: a part of a message's content.
        place: what the picture is called in errors.

    Raises:
        ExpertokenError: it is no picture that is read here.
    """
    if part.get("type") != IMAGE:
        return None
    if isinstance(part.get("image"), Picture):
        return part["image"]
    data = _bytes_of(_url_of(part), place)
    return None if data is None else Picture.of(data, place)


def _url_of(part: dict[str, Any]) -> str:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    return url if isinstance(url, str) else ""


def _bytes_of(url: str, place: str) -> bytes | None:
    """Return what a `data:` URL holds; None of another URL.

    Raises:
        ExpertokenError: it is no base64, or too long.
    """
    if not (found := _DATA.match(url)):
        return None
    if len(url) > MOST_BYTES * 4 // 3 + 100:
        raise ExpertokenError(f"{place}: pictures of up to {MOST_BYTES:,} bytes are read")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ExpertokenError(f"{place}: expected base64 behind data:...;base64,") from None


def check_pictures(messages: Sequence[dict[str, Any]], hosts: Sequence[str] = ()) -> None:
    """See that a conversation's pictures are some that experts may be given: pictures, and no addresses.

    Whoever fetches an address asks in its own name what a user chose. Formats and sides are looked at, where Pillow is
    installed; nothing is decoded whole.

    Args:
        messages: the conversation.
        hosts: hosts whose addresses are passed on, never fetched here.

    Raises:
        ExpertokenError: a picture is an address of another host, or none that is read here, or there are too many.
    """
    count = pixels = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in _PASSED:
                # Other types name addresses as well, and engines fetch them.
                raise ExpertokenError(f"messages[{index}]: expected parts of the types {', '.join(_PASSED)}")
            if part["type"] != IMAGE or isinstance(part.get("image"), Picture):
                continue
            count += 1
            place = f"messages[{index}]: picture {count}"
            if further := set(part) - _PICTURE_KEYS:
                raise ExpertokenError(f"{place}: {min(further)[:40]!r} is no field of a picture; expected image_url")
            if count > MOST_PICTURES:
                raise ExpertokenError(f"messages[{index}]: expected up to {MOST_PICTURES} pictures in a conversation")
            url = _url_of(part)
            if (data := _bytes_of(url, place)) is not None:
                if find_spec("PIL"):
                    width, height = _check_header(data, place).size
                    _check_total(pixels := pixels + width * height, place)
                continue
            if _host_of(url) not in hosts:
                raise ExpertokenError(
                    f"{place}: expected the picture itself as a URL that begins with data:image/...;base64, (addresses "
                    "are neither fetched nor passed on, but for hosts that the operator names: --image-host)"
                )


_PASSED = ("text", IMAGE, "input_audio", "file", "refusal", "thinking", "redacted_thinking")
"""Types of parts that hold what they mean, as OpenAI's API and those of others have them."""

_PICTURE_KEYS = {"type", "image_url", "detail", "cache_control"}
_PLAIN_ADDRESS = re.compile(r"https?://[^\s\\@]+")


def _host_of(url: str) -> str | None:
    """Return the host of a web address; None of anything that two readers might understand differently."""
    if not _PLAIN_ADDRESS.fullmatch(url) or not url.isascii():
        return None
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _check_total(pixels: int, place: str) -> None:
    if pixels > MOST_PIXELS:
        raise ExpertokenError(f"{place}: the conversation's pictures have more than {MOST_PIXELS:,} pixels together")


_FIRST, _LAST = 0xF0000, 0xFFFFD  # characters for private use, of which Unicode says nothing
_MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_MARKED = re.compile(f"\n?([{chr(_FIRST)}-{chr(_LAST)}])\n?")

MARK = _MARKS.pattern
"""Pattern of a character that stands for a picture; see `marked`."""


def marked(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Return messages in which a character stands for each picture, and the pictures in their order.

    So that a text can be cut, joined and folded without regard to them. A user's own characters of that kind become
    replacement characters.

    Args:
        messages: the conversation.

    Raises:
        ExpertokenError: a picture is none that is read here, or there are too many.
    """
    pictures: list[Picture] = []
    found = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str):
            content = _unmarked(content)
        elif isinstance(content, list):
            content = [_marked_part(part, f"messages[{index}]", pictures) for part in content]
        found.append(message | {"content": content})
    return found, pictures


def _marked_part(part: dict[str, Any], place: str, pictures: list[Picture]) -> dict[str, Any]:
    picture = picture_of(part, f"{place}: picture {len(pictures) + 1}")
    if picture is None:
        return part | {key: _unmarked(part[key]) for key in ("text", "refusal") if isinstance(part.get(key), str)}
    if len(pictures) == MOST_PICTURES:
        raise ExpertokenError(f"{place}: expected up to {MOST_PICTURES} pictures in a conversation")
    pictures.append(picture)
    _check_total(sum(one.pixels for one in pictures), place)
    return {"type": "text", "text": chr(_FIRST + len(pictures) - 1)}


def _unmarked(text: str) -> str:
    return _MARKS.sub("\N{REPLACEMENT CHARACTER}", text)


def marks_in(text: str) -> list[str]:
    """Return the characters of a marked text that stand for pictures."""
    return _MARKS.findall(text)


def without_marks(text: str) -> str:
    """Return a marked text as one reads it who does not see: a placeholder for each picture."""
    return _MARKS.sub(f"[{IMAGE}]", text)


def parts_of(text: str, pictures: Sequence[Picture]) -> list[str | Picture]:
    """Return a marked text as its texts and pictures in turn.

    Args:
        text: of one message.
        pictures: as `marked` gave them.
    """
    if not pictures:  # of a model that reads text only, characters of that kind are the user's
        return [text] if text else []
    found: list[str | Picture] = []
    for number, part in enumerate(_MARKED.split(text)):
        if number % 2:
            found.append(pictures[ord(part) - _FIRST])
        elif part:
            found.append(part)
    return found
