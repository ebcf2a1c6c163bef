"""Local models: causal LMs, and LoRA adapters on a base that others share."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any

import anyio
import torch

from ...modeling.backend import Backend, Generation, Piece
from ...modeling.capabilities import wants_tools
from ...modeling.chat import Message, Query, encode_text, read_chat, sight_of
from ...modeling.errors import ExpertFailedError, ExpertokenError, RequestRefusedError, one_line
from ...modeling.inputs import padded
from ...modeling.loading import context_length, end_ids
from ...modeling.source import Source
from ..loop import in_thread, start_daemon
from .local_tools import encode_with_tools, read_calls
from .models import LocalModels, Resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generation_options(generation: Generation) -> dict[str, Any]:
    """Return the arguments of `generate`."""
    options: dict[str, Any] = {"max_new_tokens": generation.max_new_tokens, "do_sample": generation.sampled}
    if generation.sampled:
        options |= {"temperature": generation.temperature, "top_p": generation.top_p or 1.0}
    return options


def within(generation: Generation, left: int) -> Generation:
    """Limit an answer to the positions that are left.

    A model has not learnt positions beyond its context, and fails or degrades there.
    """
    wanted = left if generation.max_new_tokens is None else generation.max_new_tokens
    return replace(generation, max_new_tokens=min(wanted, left))


_RANDOM = threading.RLock()  # torch's generator is global, so seeded runs are sequential


@contextmanager
def _seeded(
    generation: Generation, state: torch.Tensor | None = None, device: torch.device | None = None
) -> Iterator[None]:
    """Seed the random numbers, or restore their `state` on the device, which follows a seeded draw."""
    if generation.seed is None or not generation.sampled:
        yield
        return
    with _RANDOM:
        torch.manual_seed(generation.seed)
        if state is not None:
            of_cpu = device is None or device.type == "cpu"
            torch.set_rng_state(state) if of_cpu else torch.get_device_module(device).set_rng_state(state, device)
        yield


@torch.inference_mode()
def first_token(
    model: "PreTrainedModel", input_ids: torch.Tensor, logits: torch.Tensor, generation: Generation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the first token of an answer from existing logits, as `model.generate` would choose it.

    The model's own logits processors (a repetition penalty, top-k) apply. Transformers creates them in private methods
    only. Rejected: cropping the cache by one token and starting `generate` there, which sliding windows do not support.

    Args:
        model: Model that generates.
        input_ids: Token ids `[1, T]`.
        logits: Logits `[1, V]` at the last position.
        generation: Options of the generation.

    Returns:
        The token `[1, 1]`, and the state of the random numbers after a seeded draw, else None.
    """
    private: Any = model
    config, _ = private._prepare_generation_config(None, **generation_options(generation))
    processors = private._get_logits_processor(config, input_ids_seq_length=input_ids.shape[1], device=input_ids.device)
    scores = processors(input_ids, logits.float())
    if not config.do_sample:
        return scores.argmax(-1, keepdim=True), None
    if generation.seed is None:
        return torch.multinomial(scores.softmax(-1), 1), None
    random = torch.Generator(scores.device).manual_seed(generation.seed)
    token = torch.multinomial(scores.softmax(-1), 1, generator=random)
    return token, random.get_state()


async def stream_generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict[str, Any],
    generation: Generation,
    *,
    first: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    ready: Callable[[threading.Event], AbstractContextManager] | None = None,
    watch: Any = None,
    raw: bool = False,
) -> AsyncGenerator[Piece, None]:
    """Run `model.generate` in a thread and yield its text as it arrives. Closing the iterator stops the thread.

    Args:
        model: Model that generates.
        tokenizer: Tokenizer of the model.
        inputs: `input_ids` and `attention_mask` `[1, T]`, pictures, and further arguments of `generate`.
        generation: Options of the generation.
        first: Tokens `[n]` at the end of `input_ids` that already belong to the answer.
        state: State of the random numbers after `first` was drawn with a seed.
        ready: Context that the thread enters around the generation (`turn_of`, the selection of an adapter). Its
            argument is an event that is set once the caller has disconnected. It does not span the iteration: slow
            readers, or readers in several threads, must not hold a lock.
        watch: Logits processor that sees every generated position. The thread enters it as a context too.
        raw: If true, the text keeps special tokens.

    Raises:
        ExpertFailedError: Generation failed.
    """
    from transformers import AsyncTextIteratorStreamer, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    stopped = threading.Event()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    failure: list[BaseException] = []
    count = 0 if first is None else len(first)
    read = inputs["input_ids"].shape[1] - count
    last = None
    ends = end_ids(model, tokenizer)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            nonlocal count, last
            count, last = count + 1, int(input_ids[0, -1])
            return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=not raw)
    options = generation_options(generation) | inputs
    if watch is not None:
        options["logits_processor"] = LogitsProcessorList([watch])
    if first is not None:
        streamer.next_tokens_are_prompt = False
        streamer.put(first.cpu())
        streamer.next_tokens_are_prompt = True

    def run(generating: Any, options: dict[str, Any]) -> None:
        try:
            seeded = _seeded(generation, state, generating.device)
            with ready(stopped) if ready else nullcontext(), seeded, watch or nullcontext(), torch.inference_mode():
                if stopped.is_set():
                    return
                generating.generate(**options, streamer=streamer, stopping_criteria=StoppingCriteriaList([Stop()]))
        except BaseException as error:
            error.__traceback__ = None  # its frames hold the model
            failure.append(error)
        finally:
            del generating, options
            # The signal is needed even if `generate` failed before sending it.
            with suppress(RuntimeError):  # the loop is closed, and with it all readers
                loop.call_soon_threadsafe(streamer.text_queue.put_nowait, streamer.stop_signal)
                loop.call_soon_threadsafe(ended.set)

    start_daemon(run, model, options)
    del model, options, inputs  # the thread owns these: slow readers must not keep a model from being evicted
    try:
        # Not the streamer's own iterator, which needs Python 3.11.
        while (text := await streamer.text_queue.get()) is not streamer.stop_signal:
            if text:
                yield Piece(text)
    finally:
        stopped.set()
        with anyio.CancelScope(shield=True):
            await ended.wait()
    if failure:
        error = failure[0]
        if not isinstance(error, Exception):
            raise error
        raise ExpertFailedError(f"generation failed: {one_line(error)}") from error
    yield Piece(finish="stop" if last in ends else "length", usage=(read, count))


class _GivenUpError(Exception):
    """The end of a wait for a model's lock, because the caller has disconnected."""


@contextmanager
def turn_of(lock: RLock, stopped: threading.Event | None = None) -> Iterator[None]:
    """Hold a model's lock, because it generates one answer at a time.

    The wait ends once `stopped` is set, because the caller has disconnected.
    """
    while not lock.acquire(timeout=0.1):
        if stopped is not None and stopped.is_set():
            raise _GivenUpError
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


class LocalBackend(Backend):
    """A causal LM in this process.

    Args:
        models: Models in memory. They hold this one while it answers, and between answers if there is room.
        source: Source of the model.
        adapter: Folder and revision of a LoRA adapter on the model.
        calls: If true, the model may call tools (see `local_tools`).
    """

    def __init__(
        self,
        models: LocalModels,
        source: Source,
        adapter: tuple[str, str | None] | None = None,
        *,
        calls: bool = False,
    ) -> None:
        self.models, self.source, self._adapter, self._calls = models, source, adapter, calls

    @contextmanager
    def _turn(self, resident: Resident, stopped: threading.Event | None = None) -> Iterator[None]:
        """Hold the model's lock and activate the adapter, which affects all users of the model."""
        with turn_of(resident.turn, stopped):
            if self._adapter is not None:
                slot = self.models.slot(resident, self.source, *self._adapter)
                resident.adapted.set_adapter(slot, inference_mode=True)
            yield

    def hold(self) -> AbstractContextManager[Resident]:
        """Keep the model in memory within the block."""
        return self.models.lease(self.source)

    def _model(self, resident: Resident) -> "PreTrainedModel":
        """Return the model that answers. Loading an adapter waits for generations that are running."""
        if self._adapter is None:
            return resident.model
        self.models.slot(resident, self.source, *self._adapter)
        return resident.adapted

    def _encode(self, resident: Resident, messages: Sequence[Message], begun: str = "", tools: Any = None) -> Query:
        rows = int(resident.model.get_input_embeddings().weight.shape[0])
        most = context_length(resident.model) - 1
        if tools is not None:
            ids = encode_with_tools(resident.tokenizer, messages, tools)
            if len(ids) > most:
                raise RequestRefusedError(f"expected at most {most} tokens, got {len(ids)}")
            return Query.of(ids)
        try:
            return read_chat(resident.tokenizer, messages, rows, begun=begun, most=most)
        except ExpertFailedError:
            raise
        except ExpertokenError as error:  # too long, or refused by its template: no fault of the model
            raise RequestRefusedError(str(error)) from error

    def _inputs(self, resident: Resident, queries: Sequence[Query]) -> dict[str, torch.Tensor]:
        model = resident.model
        return padded(queries, sight_of(resident.tokenizer), model.device, model.dtype)

    async def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """Stream the answer in pieces."""
        resident = self.models.acquire_now(self.source) or await self._acquired()
        lease = ExitStack()
        lease.callback(self.models.release, resident)
        with lease:
            if self._adapter is not None and self._adapter not in resident.slots:
                await asyncio.wrap_future(in_thread(self._model, resident))
            # Encoding a long conversation takes milliseconds, which would delay other answers of this loop.
            calling = self._calls and not begun and wants_tools(generation.extra)
            tools = generation.extra["tools"] if calling else None
            query = await asyncio.to_thread(self._encode, resident, messages, begun, tools)
            model = self._model(resident)
            inputs = await asyncio.to_thread(self._inputs, resident, [query])
            generating = stream_generate(
                model,
                resident.tokenizer,
                inputs,
                within(generation, context_length(model) - len(query)),
                # The lease ends with the generation, not with the reading: slow readers hold no model.
                ready=lambda stopped: _both(lease, self._turn(resident, stopped)),
                raw=calling,
            )
            if tools is not None:
                generating = read_calls(generating, resident.tokenizer, list(query), tools)
            del model, inputs
            async with aclosing(generating) as pieces:
                async for piece in pieces:
                    yield piece

    async def _acquired(self) -> Resident:
        """Return the model after loading it in a thread, so that other answers of this loop continue."""
        given_up = threading.Event()
        coming = in_thread(self.models.acquire, self.source, given_up)
        try:
            return await asyncio.wrap_future(coming)
        except asyncio.CancelledError:  # the caller disconnected, but the model may still be loaded
            given_up.set()
            coming.add_done_callback(self._give_back)
            raise

    def _give_back(self, coming: Future) -> None:
        if not coming.cancelled() and coming.exception() is None:
            self.models.release(coming.result())

    @torch.inference_mode()
    def log_likelihood(self, messages: Sequence[Message], continuation: str) -> tuple[float, bool]:
        """Return the log-probability that an answer begins with `continuation`, and whether it is the greedy one.

        Raises:
            RequestRefusedError: Conversation and continuation are longer than the model's context.
        """
        with self.hold() as resident, self._turn(resident):
            model = self._model(resident)
            query = self._encode(resident, messages)
            # Generation prompts end where an answer begins. Benchmarks put the blank before it into the continuation.
            wanted = encode_text(resident.tokenizer, continuation.lstrip()).input_ids
            if len(query) + len(wanted) > context_length(model):
                raise RequestRefusedError(
                    f"expected at most {context_length(model)} tokens, got {len(query) + len(wanted)}"
                )
            inputs = self._inputs(resident, [query.followed_by(wanted)])
            logits = model(**inputs, logits_to_keep=len(wanted) + 1).logits[0, :-1].float().log_softmax(-1)
            target = torch.tensor(wanted, device=model.device)
            greedy = bool((logits.argmax(-1) == target).all())
            return float(logits.gather(-1, target[:, None]).sum()), greedy

    def complete(
        self,
        conversations: Sequence[Sequence[Message]],
        generation: Generation,
        *,
        held: Resident | None = None,
        batch_size: int = 32,
    ) -> list[Piece]:
        """Return an answer to each conversation, in one piece each, from left-padded batches of similar length.

        Args:
            conversations: Conversations to answer.
            generation: Options of the generation.
            held: The model, if the caller is inside a block of `hold`.
            batch_size: Number of conversations in one batch.
        """
        if self._calls and wants_tools(generation.extra):
            raise ExpertFailedError("expected one conversation for an answer with tools, got a batch")
        with nullcontext(held) if held else self.hold() as resident:
            model = self._model(resident)
            encoded = [self._encode(resident, messages) for messages in conversations]
            answers = [Piece()] * len(encoded)
            room = 0 if generation.max_new_tokens is None else context_length(model) - generation.max_new_tokens
            with self._turn(resident):
                for chosen in _batches(list(map(len, encoded)), batch_size, room):
                    inputs = self._inputs(resident, [encoded[i] for i in chosen])
                    found = _generate_batch(model, resident.tokenizer, inputs, generation)
                    for index, answer in zip(chosen, found, strict=True):
                        answers[index] = answer
        return answers


def _batches(lengths: Sequence[int], size: int, room: int) -> Iterator[list[int]]:
    """Yield batches of similar length.

    A conversation that leaves no room for a whole answer gets its own batch, because it would truncate the others'
    answers.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    roomy = [index for index in order if lengths[index] <= room]
    yield from (roomy[start : start + size] for start in range(0, len(roomy), size))
    yield from ([index] for index in order[len(roomy) :])


@torch.inference_mode()
def _generate_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict[str, torch.Tensor],
    generation: Generation,
) -> list[Piece]:
    from transformers import StoppingCriteriaList

    longest, ends = inputs["input_ids"].shape[1], set(end_ids(model, tokenizer))
    lengths = inputs["attention_mask"].sum(1).tolist()
    pad = tokenizer.pad_token_id or 0
    inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, pad)  # repetition penalties read it
    options = generation_options(within(generation, context_length(model) - longest))
    stopped: dict[int, int] = {}
    if generation.stop:
        stop = partial(_stop, tokenizer, generation.stop, longest, stopped)
        options["stopping_criteria"] = StoppingCriteriaList([stop])
    generating: Any = model
    with _seeded(generation):
        output = generating.generate(**inputs, pad_token_id=pad, **options)
    answers = []
    for place, (length, row) in enumerate(zip(lengths, output[:, longest:].tolist(), strict=True)):
        # Padding follows the end, and is an ordinary token if the tokenizer has no padding token.
        end = next((count for count, token in enumerate(row, start=1) if token in ends), None)
        end = min(filter(None, (end, stopped.get(place))), default=None)
        text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
        usage = (length, len(row[:end]))
        answers.append(Piece(text, finish="length" if end is None else "stop", usage=usage))
    return answers


def _stop(
    tokenizer: "PreTrainedTokenizerBase",
    stops: Sequence[str],
    start: int,
    stopped: dict[int, int],
    input_ids: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Return for each row whether it has a stop text, as a stopping criterion of `generate`.

    `stopped` receives the number of tokens of each stopped row. Rejected: `stop_strings` of `generate`, which does not
    return where a row stopped.
    """
    tail = 8 + 4 * max(map(len, stops))  # a character has four tokens at most
    for place, row in enumerate(input_ids[:, start:].tolist()):
        if place not in stopped:
            text = str(tokenizer.decode(row[-tail:], skip_special_tokens=True))
            if any(stop in text for stop in stops):
                stopped[place] = len(row)
    return torch.tensor([place in stopped for place in range(len(input_ids))], device=input_ids.device)
