"""Answers to a file of conversations: decided in batches, answered expert by expert, resumable."""

import asyncio
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..modeling.backend import Generation, Piece
from ..modeling.chat import Message, as_messages
from ..modeling.dispatch import Dispatch
from ..modeling.errors import ExpertFailedError, ExpertokenError, one_line
from ..modeling.files import atomic_file
from ..modeling.pictures import Picture, check_pictures, file_below, url_part
from ..modeling.policy import Policy
from ..modeling.stops import StopTexts
from .answering import AnsweringModel
from .decider import Decision
from .loop import BackgroundLoop
from .reply import Reply

logger = logging.getLogger(__name__)

_BLOCK = 512  # conversations that are decided, answered and written together
_BATCH = 32  # conversations in one batch of a local expert
_TEXTS = ("messages", "prompt", "query")
_EXPECTED = f"expected a JSON object with {' or '.join(map(repr, _TEXTS))} on each line"


Block = list[tuple[str, list[Message]]]
"""Conversations that are decided, answered and written together, each with its key."""

Answer = dict[str, Any]


class Answering(Protocol):
    """An answerer of a file's conversations: a local model (`Here`) or remote workers (`spread.RayWorkers`)."""

    def settings(self, policy: Policy | None) -> list[Any]:
        """Return the settings that answers depend on."""

    def answers(
        self, blocks: Iterator[Block], generation: Generation, policy: Policy | None, concurrent: int
    ) -> Iterator[tuple[str, Answer]]:
        """Yield answers as they arrive, each with its key."""


class Here:
    """A model of this process that answers."""

    def __init__(self, model: AnsweringModel) -> None:
        self._model = model

    def settings(self, policy: Policy | None) -> list[Any]:
        """Return the model's settings as in `settings_of`."""
        return settings_of(self._model, policy)

    def answers(
        self, blocks: Iterator[Block], generation: Generation, policy: Policy | None, concurrent: int
    ) -> Iterator[tuple[str, Answer]]:
        """Yield answers block by block as in `answers_of`."""
        for block in blocks:
            yield from answers_of(self._model, block, generation, policy, concurrent)


def settings_of(model: AnsweringModel, policy: Policy | None) -> list[Any]:
    """Return the settings that a model's answers depend on beside the conversation: policy, pool, weights."""
    pool = [asdict(expert) for expert in model.pool.candidates]
    return [(policy or model.policy).document(), pool, model.identity]


def answers_of(
    model: AnsweringModel, block: Block, generation: Generation, policy: Policy | None, concurrent: int
) -> Iterator[tuple[str, Answer]]:
    """Yield a model's answers to a block as they arrive, each with its key."""
    conversations = [messages for _, messages in block]
    for place, answer in _answers(model, conversations, generation, policy or model.policy, concurrent):
        yield block[place][0], answer


def generate_file(
    composite: AnsweringModel | Answering,
    source: Path | str,
    out: Path | str,
    *,
    generation: Generation | None = None,
    policy: Policy | None = None,
    concurrent: int = 16,
    overwrite: bool = False,
    images: Path | None = None,
) -> dict[str, int]:
    """Answer every conversation of a JSONL file.

    Answers are stored beside `out` as they arrive. The same call resumes an interrupted run, and retries conversations
    without an answer.

    Args:
        composite: Model that answers, or remote workers.
        source: JSONL file with one conversation a line: `messages`, `prompt` or `query`, and `image` (a path, or a list
            of paths) for pictures. Other fields are kept.
        out: JSONL file to write, in the order of `source`: its fields and `answer`, `expert`, `chosen`, `finish`,
            `cost`, `failures`, or `error` if no candidate could answer.
        generation: Options of the answers.
        policy: Policy for choosing a candidate. Defaults to the composite's own.
        concurrent: Number of concurrent requests to endpoints.
        overwrite: If true, conversations that `out` already answers are answered again.
        images: Folder that contains the paths of pictures. Files outside it are not read.

    Returns:
        Number of answers by expert. The only other key counts the conversations without an answer.

    Raises:
        ExpertokenError: A line of `source` is not well formed, or `out` exists already.
    """
    generation = generation or Generation()
    answering = Here(composite) if isinstance(composite, AnsweringModel) else composite
    source, out = Path(source), Path(out)
    asked = asdict(generation) | {"extra": dict(generation.extra)}
    # Pictures are checked before anything is answered. Answers about other pictures are not reused.
    shown = [] if images is None else _digests(source, images)
    keys = _keys(source, _hash([asked, *answering.settings(policy), *shown]), pictures=images is not None)
    part = out.with_name(f".{out.name}.part")
    if out.exists() and source.samefile(out):
        raise ExpertokenError(f"{out}: expected a file for the answers, got the input file. Pass another file.")
    if out.exists() and not part.exists() and not overwrite:
        raise ExpertokenError(f"{out}: exists already and is complete. Pass --overwrite to answer everything again.")
    counts: Counter[str] = Counter()
    failed = False
    with _alone(out), _Answers(part) as answers:
        left = sum(key not in answers for key in keys)
        if len(answers) and left == len(keys):
            logger.warning("%s: belongs to a run with other options or another composite, and is ignored", part)
        if left < len(keys):
            logger.info("%d of %d conversations are answered already", len(keys) - left, len(keys))
        # The file is read again, block by block, because it and its answers may not fit into memory.
        waiting = ((key, row) for key, row in zip(keys, _rows(source), strict=True) if key not in answers)
        with tqdm(total=left, unit="conversation", delay=2) as bar:
            for key, answer in answering.answers(_blocks(waiting, images), generation, policy, concurrent):
                answers.add(key, answer)
                bar.update()
        with atomic_file(out) as aside, aside.open("wb") as stream:
            for key, row in zip(keys, _rows(source), strict=True):
                answer = answers[key]
                # The source may be the output of an earlier run, whose errors do not belong to this answer.
                stream.write(_line({name: value for name, value in row.items() if name != "error"} | answer))
                counts[answer.get("expert") or "nobody"] += 1
                failed = failed or "error" in answer
    if not failed:
        part.unlink()
    return dict(counts)


def _digests(source: Path, images: Path) -> list[str]:
    """Return a hash of each picture that a file names.

    Raises:
        ExpertokenError: A picture is missing, lies outside the folder, or has an unsupported format. The message names
            the conversation.
    """
    found = []
    for number, row in enumerate(_rows(source), start=1):
        place = f"{source}, conversation {number}, image"
        found += [Picture.of(file_below(images, name, place), f"{place} {name!r}").key.hex() for name in _pictures(row)]
    return found


def _blocks(rows: Iterator[tuple[str, dict[str, Any]]], images: Path | None) -> Iterator[Block]:
    while block := [(key, _shown(row, images)) for key, row in islice(rows, _BLOCK)]:
        yield block


def _shown(row: dict[str, Any], images: Path | None) -> list[Message]:
    """Return a row's conversation, with its pictures before the text of the last message.

    Raises:
        ExpertokenError: A picture is missing, lies outside the folder, or has an unsupported format.
    """
    messages = _messages(row)
    if images is None or not (names := _pictures(row)):
        return messages
    parts = [url_part(file_below(images, name, "image"), name) for name in names]
    last = messages[-1]
    content = last["content"]
    told = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return [*messages[:-1], last | {"content": [*parts, *told]}]


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock an output file against concurrent runs.

    Raises:
        ExpertokenError: Another run writes the file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        with lock:
            yield
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise ExpertokenError(
            f"{out}: another run is writing this file. Wait for its end, or pass another file."
        ) from None


class _Answers:
    """Answers stored in a file as they arrive. Only their offsets are kept in memory.

    Args:
        file: JSONL file, which may exist from an interrupted run. Incomplete lines and errors in it are skipped,
            because a failed conversation may succeed now.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("a+b")
        self._places: dict[str, int] = {}
        self._stream.seek(0)
        place = 0
        for line in self._stream:
            with suppress(ValueError, KeyError, TypeError):
                known = json.loads(line)
                if "error" not in known["answer"]:
                    self._places[known["key"]] = place
            place += len(line)
        if place:
            self._stream.write(b"\n")  # ends a line that may be incomplete

    def __enter__(self) -> "_Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        self._stream.seek(self._places[key])
        return json.loads(self._stream.readline())["answer"]

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Append an answer."""
        self._places[key] = self._stream.seek(0, os.SEEK_END)
        self._stream.write(_line({"key": key, "answer": answer}))
        self._stream.flush()


def answer_all(
    composite: AnsweringModel,
    conversations: list[list[Message]],
    generation: Generation,
    *,
    policy: Policy | None = None,
    concurrent: int = 16,
) -> list[dict[str, Any]]:
    """Return answers in the order of the conversations, in the form that `generate_file` writes."""
    found: list[dict[str, Any]] = [{}] * len(conversations)
    answers = _answers(composite, conversations, generation, policy or composite.policy, concurrent)
    for place, answer in tqdm(answers, total=len(conversations), unit="conversation", delay=2):
        found[place] = answer
    return found


def _answers(
    composite: AnsweringModel,
    conversations: list[list[Message]],
    generation: Generation,
    policy: Policy,
    concurrent: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield answers as they arrive, each with the index of its conversation."""
    decisions: dict[int, Decision] = {}
    for place, decided in enumerate(_decided(composite, conversations, policy, generation)):
        if isinstance(decided, Decision):
            decisions[place] = decided
        else:
            yield place, {"answer": None, "expert": None, "error": str(decided)}
    places: dict[str, list[int]] = {}
    for place, decision in decisions.items():
        places.setdefault(decision.dispatch.expert, []).append(place)
    local = composite.batched(places)
    single = [place for name in places if name not in local for place in places[name]]
    # Experts answer sequentially, so that no model is loaded or switched twice.
    for name, following in zip_longest(local, local[1:]):
        with ExitStack() as held:
            resident = None
            for start in range(0, len(places[name]), _BATCH):
                chosen = places[name][start : start + _BATCH]
                try:
                    backend = composite.backend(name)
                    if resident is None:
                        resident = held.enter_context(backend.hold())  # until its last batch
                        if following:
                            composite.prepare(following)
                    asked = [conversations[place] for place in chosen]
                    answers = _checked(backend.complete(asked, generation, held=resident), len(asked))
                except Exception as error:  # each conversation falls back as in a chat
                    logger.warning(
                        "expert %r failed in a batch, its conversations are retried one at a time: %s",
                        name,
                        one_line(error),
                    )
                    single += chosen
                    continue
                for place, answer in zip(chosen, answers, strict=True):
                    if answer.text or composite.pool[name].is_self:
                        yield place, _told(_replied(composite, answer, decisions[place].dispatch, generation))
                    else:
                        single.append(place)
    answering = _each(composite, conversations, decisions, generation, single, concurrent)
    yield from BackgroundLoop.iterate(answering)


def _checked(answers: Any, wanted: int) -> list[Piece]:
    """Return the answers of a batch after checking their number and type.

    A backend of another package may return anything.
    """
    if isinstance(answers, list) and len(answers) == wanted and all(isinstance(one, Piece) for one in answers):
        return answers
    raise ExpertFailedError(f"expected {wanted} answers from its backend, got something else")


def _decided(
    composite: AnsweringModel, conversations: list[list[Message]], policy: Policy, generation: Generation
) -> list[Decision | ExpertokenError]:
    """Return a decision or an error for each conversation.

    A conversation that is too long must not fail the others.
    """
    try:
        return [*composite.decide(conversations, policy, generation)]
    except Exception as error:
        if len(conversations) > 1:
            return [decided for one in conversations for decided in _decided(composite, [one], policy, generation)]
        return [error if isinstance(error, ExpertokenError) else ExpertokenError(one_line(error))]


def _replied(composite: AnsweringModel, answer: Piece, dispatch: Dispatch, generation: Generation) -> Reply:
    """Return a local expert's answer of a batch as a reply of the same form as in a chat."""
    stops = StopTexts(generation.stop)
    cut = stops.feed(answer.text)
    return Reply(
        cut if stops.reached else answer.text,
        dispatch.expert,
        dispatch,
        finish="stop" if stops.reached else answer.finish,
        cost=composite.pool[dispatch.expert].price(*(answer.usage or (0, 0))),
        stopped_by=stops.found,
    )


async def _each(
    composite: AnsweringModel,
    conversations: Sequence[list[Message]],
    decisions: Mapping[int, Decision],
    generation: Generation,
    places: Sequence[int],
    concurrent: int,
) -> Any:
    """Yield answers to single conversations, `concurrent` at a time, with the retries and fallbacks of a chat."""
    slots = asyncio.Semaphore(concurrent)

    async def answer(place: int) -> tuple[int, dict[str, Any]]:
        async with slots:
            stream = composite.answer(conversations[place], decisions[place], generation)
            try:
                async for _ in stream.pieces():
                    pass
            except ExpertokenError as error:
                return place, {"answer": stream.reply.text or None, "expert": None, "error": str(error)}
            return place, _told(stream.reply)

    tasks = [asyncio.ensure_future(answer(place)) for place in places]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for task in tasks:
            task.cancel()


def _told(reply: Reply) -> dict[str, Any]:
    return {
        "answer": reply.text,
        "expert": reply.expert,
        "chosen": reply.dispatch.expert,
        "finish": reply.finish,
        "cost": reply.cost,
        "failures": reply.failures,
    }


def _keys(source: Path, run: str, *, pictures: bool) -> list[str]:
    """Return a key for each row of a JSONL file.

    Identical rows have different keys, because each is answered.

    Args:
        source: JSONL file.
        run: Hash of everything else that the answers depend on.
        pictures: The folder of the rows' pictures is known.

    Raises:
        ExpertokenError: The file is missing or empty, a line is no conversation, or it names pictures of an unknown
            folder.
    """
    seen: Counter[str] = Counter()
    keys = []
    for number, row in enumerate(_rows(source), start=1):
        if row.get("image") and not pictures:  # its answer would be about the text alone
            raise ExpertokenError(
                f"{source}, conversation {number}, image: expected --images with the folder of the pictures"
            )
        digest = _hash(row)
        seen[digest] += 1
        keys.append(f"{run}-{digest}-{seen[digest]}")
    if not keys:
        raise ExpertokenError(f"{source}: {_EXPECTED}, got an empty file")
    return keys


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file. Errors as in `_keys`."""
    try:
        with source.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _row(line, f"{source}, line {number}")
    except OSError as error:
        raise ExpertokenError(f"{source}: {_EXPECTED}, got an unreadable file ({one_line(error)})") from None


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        _messages(row)
    except ExpertokenError as error:
        raise ExpertokenError(f"{place}: {error}") from None
    except json.JSONDecodeError as error:
        raise ExpertokenError(f"{place}: {_EXPECTED} ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ExpertokenError(f"{place}: {_EXPECTED} ({one_line(error)})") from None
    return row


def _line(row: dict[str, Any]) -> bytes:
    # JSON can hold half of a surrogate pair and UTF-8 can't, so the half stays an escape.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _messages(row: dict[str, Any]) -> list[Message]:
    found = [row[key] for key in _TEXTS if key in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str | list):
        raise ExpertokenError(_EXPECTED)
    messages = as_messages(found[0])
    check_pictures(messages)
    return messages


def _pictures(row: dict[str, Any]) -> list[str]:
    """Return the paths of a row's pictures.

    Raises:
        ExpertokenError: The field holds no paths.
    """
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExpertokenError("image: expected a path or a list of paths below the folder of --images")
    return names


def _hash(thing: Any) -> str:
    return hashlib.blake2b(json.dumps(thing, sort_keys=True).encode(), digest_size=12).hexdigest()
