"""Pictures of conversations, checked before they are decoded and identified by their pixels.

A picture comes as the bytes of a file, from a `data:` URL or a supervision. No address is fetched, and no text of a
user can name a file.
"""

import base64
import binascii
import hashlib
import io
import math
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ExpertokenError, one_line, require_extra

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
"""Accepted formats, with the suffix of their files. Vector graphics are excluded, because they can hold anything."""

MOST_BYTES = 32 * 2**20
MOST_PIXELS = 64 * 10**6
LONGEST_SIDE = 16_384
MOST_PICTURES = 32
"""Limit on the pictures of one conversation."""

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


_IDENTIFIED = 4096  # files, of 100 bytes each
_identifying = threading.Lock()
_identified: dict[bytes, tuple[bytes, tuple[int, int]]] = {}
"""Key and size by hash of the file. A chat sends its pictures with every turn, and each decision reads a
conversation several times, so that a large picture would be decoded again and again."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a conversation.

    Attributes:
        source: File of the picture, or the file's bytes.
        key: Hash of the pixels, which identifies the picture in caches. Another lossless format gives the same key.
        size: Width and height in pixels, or None if unknown.
    """

    source: Path | bytes
    key: bytes
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, source: Path | bytes, name: str = "picture") -> "Picture":
        """Return a picture after checking that it can be decoded. Errors as in `decoded`.

        Args:
            source: File of the picture, or the file's bytes.
            name: Name of the picture in errors.
        """
        data = source if isinstance(source, bytes) else _read(source, name)
        file = hashlib.sha256(data).digest()
        if (known := _identified.get(file)) is None:
            picture = decoded(data, name)
            known = digest(picture), picture.size
            with _identifying:
                _identified[file] = known
                while len(_identified) > _IDENTIFIED:
                    del _identified[next(iter(_identified))]
        return cls(source, *known)

    def decoded(self) -> Any:
        """Return the picture as an RGB image of Pillow. Errors as in the function `decoded`."""
        return decoded(self.source, "picture")

    def blank(self) -> Any:
        """Return a black image of the same size, which takes no decoding. Without a known size the picture itself."""
        from PIL import Image

        return self.decoded() if self.size is None else Image.new("RGB", self.size)

    @property
    def data(self) -> bytes:
        """Bytes of the picture's file."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def url(self) -> str:
        """Picture as a `data:` URL, the form that endpoints accept."""
        data = self.data
        return f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"


def file_below(root: Path, name: str, place: str) -> Path:
    """Return the picture file with a relative name below a folder.

    Args:
        root: Folder of the pictures.
        name: Relative path of the file, from untrusted data.
        place: Place of the name, for errors.

    Raises:
        ExpertokenError: The file does not exist, or its path or a link leads out of the folder.
    """
    try:
        found = (root / name).resolve(strict=True)
    except (OSError, ValueError):
        raise ExpertokenError(
            f"{place}: no picture {name!r} below {root}. Pass the folder of the paths as --images"
        ) from None
    if not found.is_relative_to(root.resolve()):
        raise ExpertokenError(f"{place}: expected a picture below {root}, got {name!r}, which leads out of it")
    return found


def digest(picture: Any) -> bytes:
    """Return the hash of a decoded picture's size and pixels, 16 bytes."""
    found = hashlib.sha256(f"{picture.width}x{picture.height}".encode())
    found.update(picture.tobytes())
    return found.digest()[:16]


def format_of(source: Path | bytes) -> str:
    """Return a picture's format, one of `FORMATS`, from its content and not from its file name."""
    with _opened(source) as picture:
        return str(picture.format)


def decoded(source: Path | bytes, name: str) -> Any:
    """Decode a whole picture as an RGB image of Pillow, after a check of its size and sides.

    Args:
        source: File of the picture, or the file's bytes.
        name: Name of the picture in errors.

    Raises:
        ExpertokenError: The picture is not accepted. The message names the reason.
        ImportError: The extra `vision` is not installed.
    """
    ops: Any = require_extra("PIL.ImageOps", "vision")
    picture = _check_header(source, name)
    try:
        return ops.exif_transpose(picture).convert("RGB")  # upright, as the camera recorded it
    except Exception as error:  # each decoder has its own errors
        raise _no_picture(name, error) from None


def _check_header(source: Path | bytes, name: str) -> Any:
    """Return a picture that is not decoded yet, after a check of its bytes, format and sides."""
    _check_size(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below replaces Pillow's warning
            picture = _opened(source)
    except Exception as error:
        raise _no_picture(name, error) from None
    width, height = picture.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise ExpertokenError(
            f"{name}: expected up to {MOST_PIXELS:,} pixels and sides of up to {LONGEST_SIDE:,}, got {width} x {height}"
        )
    return picture


def _check_size(source: Path | bytes, name: str) -> None:
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
    except OSError as error:
        raise _no_picture(name, error) from None
    if size > MOST_BYTES:
        raise ExpertokenError(f"{name}: expected a picture of up to {MOST_BYTES:,} bytes, got {size:,}")


def _read(file: Path, name: str) -> bytes:
    _check_size(file, name)
    try:
        return file.read_bytes()
    except OSError as error:
        raise _no_picture(name, error) from None


def _no_picture(name: str, error: Exception) -> ExpertokenError:
    if isinstance(error, FileNotFoundError):
        return ExpertokenError(f"{name}: no such file. Expected a picture.")
    # Pillow names the stream in memory where the content has no known format.
    why = "" if type(error).__name__ == "UnidentifiedImageError" else f" ({one_line(error)})"
    return ExpertokenError(f"{name}: expected a picture in one of the formats {', '.join(FORMATS)}{why}")


def _opened(source: Path | bytes) -> Any:
    from PIL import Image

    data = source if isinstance(source, bytes) else source.read_bytes()
    return Image.open(io.BytesIO(data), formats=list(FORMATS))


def _media_type(data: bytes) -> str:
    return f"image/{format_of(data).lower()}"


def url_part(source: Path | bytes, name: str) -> dict[str, Any]:
    """Return a picture as a part of a message for any expert. Errors as in `decoded`.

    Args:
        source: File of the picture, or the file's bytes.
        name: Name of the picture in errors.
    """
    return {"type": IMAGE, "image_url": {"url": Picture.of(source, name).url}}


IMAGE = "image_url"
"""Type of a message part that is a picture, as in OpenAI's API."""


def part_of(picture: Picture) -> dict[str, Any]:
    """Return a picture as a message part that only Python can create. A user's JSON can't."""
    return {"type": IMAGE, "image": picture}


def as_urls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose pictures are `data:` URLs, the form that endpoints accept.

    Args:
        messages: Messages of the conversation.
    """

    def part_as_url(part: dict[str, Any]) -> dict[str, Any]:
        picture = part.get("image")
        return {"type": IMAGE, "image_url": {"url": picture.url}} if isinstance(picture, Picture) else part

    return [
        m | {"content": [part_as_url(part) for part in m["content"]]} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def picture_of(part: dict[str, Any], place: str) -> Picture | None:
    """Return the picture in a message part, or None for another part or a mere address of a picture.

    Args:
        part: Part of a message's content.
        place: Name of the picture in errors.

    Raises:
        ExpertokenError: The picture is not accepted.
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
    """Return the content of a `data:` URL, or None for another URL.

    Raises:
        ExpertokenError: The content is not base64, or too long.
    """
    if not (found := _DATA.match(url)):
        return None
    if len(url) > MOST_BYTES * 4 // 3 + 100:
        raise ExpertokenError(f"{place}: expected a picture of up to {MOST_BYTES:,} bytes, got more")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ExpertokenError(f"{place}: expected base64 behind data:...;base64,") from None


def check_pictures(messages: Sequence[dict[str, Any]], hosts: Sequence[str] = ()) -> None:
    """Check that a conversation's pictures may be sent to experts: they are pictures, and no addresses.

    A server that fetches an address sends a request of the user's choice in its own name. If Pillow is installed,
    formats and sides are checked. No picture is decoded whole.

    Args:
        messages: Messages of the conversation.
        hosts: Hosts whose addresses are forwarded. They are never fetched in this process.

    Raises:
        ExpertokenError: A picture is an address of another host, a picture is not accepted, or there are too many.
    """
    count = pixels = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in _PASSED:
                # Parts of other types hold addresses too, and engines fetch them.
                raise ExpertokenError(f"messages[{index}]: expected parts of the types {', '.join(_PASSED)}")
            if isinstance(part.get("image"), Picture):
                continue
            if part["type"] != IMAGE:
                # Engines that recognise a part by its keys would take a text with an address for a picture.
                if media := [key for key in part if key.endswith("_url") or key in _MEDIA]:
                    raise ExpertokenError(
                        f"messages[{index}]: expected no field {media[0][:40]!r} in a part of type {part['type']!r}"
                    )
                continue
            count += 1
            place = f"messages[{index}]: picture {count}"
            if further := set(part) - _PICTURE_KEYS:
                raise ExpertokenError(
                    f"{place}: expected a picture with image_url, got the field {min(further)[:40]!r}"
                )
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
                    "are neither fetched nor forwarded, except to hosts that the operator names by --image-host)"
                )


_PASSED = ("text", IMAGE, "input_audio", "file", "refusal", "thinking", "redacted_thinking")
"""Types of parts that hold their content and no address, in OpenAI's API and other APIs."""

_MEDIA = {"image", "video", "audio", "url"}
_PICTURE_KEYS = {"type", "image_url", "detail", "cache_control"}
_PLAIN_ADDRESS = re.compile(r"https?://[^\s\\@]+")


def _host_of(url: str) -> str | None:
    """Return the host of a web address, or None for any address that two parsers might read differently."""
    if not _PLAIN_ADDRESS.fullmatch(url) or not url.isascii():
        return None
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _check_total(pixels: int, place: str) -> None:
    if pixels > MOST_PIXELS:
        raise ExpertokenError(f"{place}: expected up to {MOST_PIXELS:,} pixels in a conversation's pictures, got more")


_FIRST, _LAST = 0xF0000, 0xFFFFD  # characters for private use, without a meaning in Unicode
_MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_MARKED = re.compile(f"\n?([{chr(_FIRST)}-{chr(_LAST)}])\n?")

MARK = _MARKS.pattern
"""Pattern of a mark, a character that represents a picture. See `marked`."""


def marked(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Return messages with one character as the mark of each picture, and the pictures in their order.

    Marks allow to cut, join and fold a text without regard to its pictures. A user's own characters of this kind become
    replacement characters.

    Args:
        messages: Messages of the conversation.

    Raises:
        ExpertokenError: A picture is not accepted, or there are too many.
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
    _check_total(sum(math.prod(one.size) for one in pictures if one.size), place)
    return {"type": "text", "text": chr(_FIRST + len(pictures) - 1)}


def _unmarked(text: str) -> str:
    return _MARKS.sub("\N{REPLACEMENT CHARACTER}", text)


def marks_in(text: str) -> list[str]:
    """Return the marks of pictures in a text."""
    return _MARKS.findall(text)


def without_marks(text: str) -> str:
    """Return a marked text for models that read text only, with a placeholder for each picture."""
    return _MARKS.sub(f"[{IMAGE}]", text)


def parts_of(text: str, pictures: Sequence[Picture]) -> list[str | Picture]:
    """Return a marked text as its texts and pictures in turn.

    Args:
        text: Text of one message.
        pictures: Pictures as `marked` returned them.
    """
    if not pictures:  # for a model that reads text only, such characters belong to the user's text
        return [text] if text else []
    found: list[str | Picture] = []
    for number, part in enumerate(_MARKED.split(text)):
        if number % 2:
            found.append(pictures[ord(part) - _FIRST])
        elif part:
            found.append(part)
    return found
