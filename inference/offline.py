"""Answering a file of conversations: decided in batches, answered expert by expert, resumable."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..modeling.chat import Message, as_messages
from ..modeling.dispatch import Dispatch
from ..modeling.errors import ExpertokenError, NoAnswerError, one_line
from ..modeling.files import atomic_file
from .backends import Generation
from .backends.local import LocalBackend
from .composite import CompositeModel
from .decider import Decision
from .loop import BackgroundLoop
from .policy import Policy
from .reply import Reply
from .stops import StopTexts

logger = logging.getLogger(__name__)

_BLOCK = 512  # conversations that are decided, answered and written together
_BATCH = 32  # of a local expert
_TEXTS = ("messages", "prompt", "query")


def generate_file(
    composite: CompositeModel,
    source: Path | str,
    out: Path | str,
    *,
    generation: Generation | None = None,
    policy: Policy | None = None,
    concurrent: int = 16,
) -> dict[str, int]:
    """Answer every conversation of a JSONL file.

    Answers are kept beside `out` as they come; the same call goes on where an interrupted one ended.

    Args:
        composite: who answers.
        source: a line for each conversation: `messages`, `prompt` or `query`; whatever else it holds is kept.
        out: JSONL in the order of `source`: its fields and `answer`, `expert`, `chosen`, `finish`, `cost`, `failures`,
            or `error` where nobody could answer.
        generation: how.
        policy: how a candidate is chosen; the composite's own where None.
        concurrent: requests to endpoints at a time.

    Returns:
        how many answers each expert gave.

    Raises:
        ExpertokenError: a line of `source` is not well formed.
    """
    generation, policy = generation or Generation(), policy or composite.policy
    source, out = Path(source), Path(out)
    rows = _read(source)
    part = out.with_name(f".{out.name}.part")
    asked = asdict(generation) | {"extra": dict(generation.extra)}
    run = _hash([asked, policy.document(), composite.pool.names, composite.identity])
    keys = [f"{run}-{_hash(row)}" for row in rows]
    known = _known(part)
    waiting = [place for place, key in enumerate(keys) if key not in known]
    if len(waiting) < len(rows):
        logger.info("%d of %d conversations are answered already", len(rows) - len(waiting), len(rows))
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a", encoding="utf-8") as stream, tqdm(total=len(waiting), unit="conversation", delay=2) as bar:
        if part.stat().st_size:
            stream.write("\n")  # behind a line that an interrupted run may not have finished
        for start in range(0, len(waiting), _BLOCK):
            block = waiting[start : start + _BLOCK]
            conversations = [_messages(rows[place]) for place in block]
            for place, answer in _answers(composite, conversations, generation, policy, concurrent):
                entry = {"key": keys[block[place]], "answer": answer}
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
                stream.flush()
                known[entry["key"]] = answer
                bar.update()
    counts: dict[str, int] = {}
    with atomic_file(out) as aside, aside.open("w", encoding="utf-8") as stream:
        for row, key in zip(rows, keys, strict=True):
            stream.write(json.dumps(row | known[key], ensure_ascii=False) + "\n")
            name = known[key].get("expert") or "nobody"
            counts[name] = counts.get(name, 0) + 1
    part.unlink()
    return counts


def answer_all(
    composite: CompositeModel,
    conversations: list[list[Message]],
    generation: Generation,
    *,
    policy: Policy | None = None,
    concurrent: int = 16,
) -> list[dict[str, Any]]:
    """Answers in the order of the conversations, as `generate_file` writes them."""
    found: list[dict[str, Any]] = [{}] * len(conversations)
    answers = _answers(composite, conversations, generation, policy or composite.policy, concurrent)
    for place, answer in tqdm(answers, total=len(conversations), unit="conversation", delay=2):
        found[place] = answer
    return found


def _answers(
    composite: CompositeModel,
    conversations: list[list[Message]],
    generation: Generation,
    policy: Policy,
    concurrent: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers as they come, each with the place of its conversation."""
    dispatches = composite.route(conversations, policy=policy)
    places: dict[str, list[int]] = {}
    for place, dispatch in enumerate(dispatches):
        places.setdefault(dispatch.expert, []).append(place)
    single: list[int] = []
    # One expert after the other, those that share a base next to each other: nothing is loaded or switched twice.
    for name in sorted(places, key=composite.switch_key):
        if composite.pool[name].backend == "openai":
            single += places[name]
            continue
        for start in range(0, len(places[name]), _BATCH):
            chosen = places[name][start : start + _BATCH]
            try:
                backend = composite.backend(name)
                assert isinstance(backend, LocalBackend)
                texts = backend.complete([conversations[place] for place in chosen], generation, _BATCH)
            except Exception as error:  # the next best one is asked, as in a chat
                logger.warning("expert %r failed in a batch, each is asked by itself: %s", name, one_line(error))
                single += chosen
                continue
            for place, text in zip(chosen, texts, strict=True):
                yield place, _told(_replied(composite, conversations[place], text, dispatches[place], generation))
    answering = _each(composite, conversations, dispatches, generation, single, concurrent)
    yield from BackgroundLoop.iterate(answering)


def _replied(
    composite: CompositeModel, messages: list[Message], text: str, dispatch: Dispatch, generation: Generation
) -> Reply:
    """A local expert's answer of a batch, with what a chat would tell of it."""
    stops = StopTexts(generation.stop)
    cut = stops.feed(text)
    written = composite.count(text)
    return Reply(
        cut if stops.reached else text,
        dispatch.expert,
        dispatch,
        finish="stop" if stops.reached or written < generation.max_new_tokens else "length",
        cost=composite.pool[dispatch.expert].price(len(composite.meta.encode(messages)), written),
    )


async def _each(
    composite: CompositeModel,
    conversations: Sequence[list[Message]],
    dispatches: Sequence[Dispatch],
    generation: Generation,
    places: Sequence[int],
    concurrent: int,
) -> Any:
    """Conversations by themselves, some at a time, with everything that a chat has: retries, fallbacks."""
    slots = asyncio.Semaphore(concurrent)

    async def answer(place: int) -> tuple[int, dict[str, Any]]:
        async with slots:
            stream = composite.answer(conversations[place], Decision(dispatches[place], 0, 0.0), generation)
            try:
                async for _ in stream.pieces():
                    pass
            except NoAnswerError as error:
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


def _read(source: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        ExpertokenError: it is missing or empty, or a line is no conversation.
    """
    expected = f"expected a JSON object with {' or '.join(map(repr, _TEXTS))} on each line"
    try:
        lines = source.read_text("utf-8").split("\n")  # not splitlines: JSON texts may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertokenError(f"{source}: can't be read ({one_line(error)}); {expected}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _messages(row)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise ExpertokenError(f"{source}, line {number}: {expected} ({one_line(error)})") from None
        except ExpertokenError as error:
            raise ExpertokenError(f"{source}, line {number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ExpertokenError(f"{source}: empty; {expected}")
    return rows


def _messages(row: dict[str, Any]) -> list[Message]:
    found = [row[key] for key in _TEXTS if key in row]
    return as_messages(found[0])


def _known(part: Path) -> dict[str, dict[str, Any]]:
    """Answers that an interrupted run left; a line that it did not finish is passed over."""
    found = {}
    if part.exists():
        for line in part.read_text("utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _hash(thing: Any) -> str:
    return hashlib.blake2b(json.dumps(thing, sort_keys=True).encode(), digest_size=12).hexdigest()
