"""Local models: a causal LM of its own, or a LoRA adapter on a base that others share."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import torch

from ...modeling.chat import Message, encode_chat
from ...modeling.errors import ExpertFailedError, ExpertokenError, one_line
from ...modeling.meta import Source, end_ids, load_causal_lm, share_weights
from .base import Backend, Generation, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generation_options(generation: Generation) -> dict[str, Any]:
    """Arguments of `generate`."""
    options: dict[str, Any] = {"max_new_tokens": generation.max_new_tokens, "do_sample": generation.temperature > 0}
    if generation.temperature > 0:
        options |= {"temperature": generation.temperature, "top_p": generation.top_p}
    return options


@torch.inference_mode()
def first_token(
    model: "PreTrainedModel", input_ids: torch.Tensor, logits: torch.Tensor, generation: Generation
) -> torch.Tensor:
    """The first token of an answer from logits that are there already, `[1, 1]`, as `model.generate` would choose it.

    With the model's own logits processors (a repetition penalty, top-k), which transformers makes in private methods
    only. Rejected: cropping the cache by one token and letting `generate` begin there, which sliding windows can't.

    Args:
        model: what generates.
        input_ids: `[1, T]`.
        logits: `[1, V]` at the last position.
        generation: how.
    """
    config, _ = model._prepare_generation_config(None, **generation_options(generation))
    processors = model._get_logits_processor(config, input_ids_seq_length=input_ids.shape[1], device=input_ids.device)
    scores = processors(input_ids, logits.float())
    if not config.do_sample:
        return scores.argmax(-1, keepdim=True)
    if generation.seed is not None:
        torch.manual_seed(generation.seed)
    return torch.multinomial(scores.softmax(-1), 1)


async def stream_generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict[str, Any],
    generation: Generation,
    *,
    first: torch.Tensor | None = None,
    ready: AbstractContextManager | None = None,
) -> AsyncIterator[Piece]:
    """Run `model.generate` in a thread and yield its text as it comes; closing the iterator stops the thread.

    Args:
        model: what generates.
        tokenizer: of the model.
        inputs: `input_ids` and `attention_mask` `[1, T]`, and further arguments of `generate`.
        generation: how.
        first: `[n]` tokens at the end of `input_ids` that belong to the answer already.
        ready: entered by the thread around the generation (a lock, the choice of an adapter). Not around the iteration:
            who reads slowly, or from several threads, must not hold a lock for that.

    Raises:
        ExpertFailedError: generation failed.
    """
    from transformers import AsyncTextIteratorStreamer, StoppingCriteria, StoppingCriteriaList

    stopped = threading.Event()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    failure: list[BaseException] = []
    count = 0 if first is None else len(first)
    last = None
    ends = end_ids(model, tokenizer)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            nonlocal count, last
            count, last = count + 1, int(input_ids[0, -1])
            return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = generation_options(generation) | inputs
    if first is not None:
        streamer.next_tokens_are_prompt = False
        streamer.put(first.cpu())
        streamer.next_tokens_are_prompt = True

    def run() -> None:
        try:
            if generation.seed is not None and first is None:
                torch.manual_seed(generation.seed)
            with ready or nullcontext(), torch.inference_mode():
                if stopped.is_set():
                    return
                model.generate(**options, streamer=streamer, stopping_criteria=StoppingCriteriaList([Stop()]))
        except BaseException as error:
            failure.append(error)
        finally:
            # The signal also where `generate` never came to it.
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(streamer.text_queue.put_nowait, streamer.stop_signal)
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, daemon=True).start()
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
    read = inputs["input_ids"].shape[1] - (0 if first is None else len(first))
    yield Piece(finish="stop" if last in ends else "length", usage=(read, count))


class LocalBackend(Backend):
    """A causal LM in this process.

    Args:
        model: the model.
        tokenizer: with a chat template.
        lock: held while it generates; shared by the adapters of one base, since choosing an adapter changes the model.
        adapter: name of the adapter to choose before each answer.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        lock: AbstractContextManager | None = None,
        adapter: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = lock or threading.RLock()
        self.adapter = adapter

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with self.lock:
            if self.adapter is not None:
                self.model.set_adapter(self.adapter, inference_mode=True)
            yield

    def _encode(self, messages: Sequence[Message], begun: str = "") -> list[int]:
        return encode_chat(self.tokenizer, messages, self.model.get_input_embeddings().weight.shape[0], begun=begun)

    async def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncIterator[Piece]:
        """The answer in pieces."""
        ids = torch.tensor([self._encode(messages, begun)], device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        generating = stream_generate(self.model, self.tokenizer, inputs, generation, ready=self._ready())
        async with aclosing(generating) as pieces:
            async for piece in pieces:
                yield piece

    def complete(
        self, conversations: Sequence[Sequence[Message]], generation: Generation, batch_size: int = 32
    ) -> list[str]:
        """Answers of many conversations, in left-padded batches of like length."""
        encoded = [self._encode(messages) for messages in conversations]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        answers = [""] * len(encoded)
        with self._ready():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                for index, answer in zip(chosen, self._batch([encoded[i] for i in chosen], generation), strict=True):
                    answers[index] = answer
        return answers

    @torch.inference_mode()
    def _batch(self, sequences: list[list[int]], generation: Generation) -> list[str]:
        longest = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=self.model.device)
        if generation.seed is not None:
            torch.manual_seed(generation.seed)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=pad, **generation_options(generation)
        )
        return self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


class LocalModels:
    """The local models of one composite: each base is loaded once and shared.

    Args:
        device: where models go.
        dtype: of their weights.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> None:
        self.device, self.dtype = device, dtype
        self._bases: dict[Source, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self._adapted: dict[Source, tuple[Any, AbstractContextManager]] = {}
        self.lock = threading.RLock()

    def add(self, source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Make a loaded model known, so that nobody loads it again."""
        self._bases[_resolved(source)] = (model, tokenizer)

    def base(self, source: Source) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        """A model and its tokenizer, loaded where they are not yet."""
        source = _resolved(source)
        with self.lock:
            if source not in self._bases:
                try:
                    self._bases[source] = load_causal_lm(source, device=self.device, dtype=self.dtype)
                except ExpertokenError as error:
                    raise ExpertFailedError(str(error)) from error
            return self._bases[source]

    def model(self, source: Source) -> LocalBackend:
        """A backend that answers with a model as it is."""
        return LocalBackend(*self.base(source))

    def adapter(self, base: Source, folder: str, revision: str | None = None) -> LocalBackend:
        """A backend that answers with a LoRA adapter on a base; adapters of one base share one model.

        The adapted model has the base's very tensors but modules of its own, so that the base stays as it is.

        Raises:
            ExpertFailedError: the adapter is missing or does not fit the base.
        """
        from peft import PeftModel

        model, tokenizer = self.base(base)
        key = _resolved(base)
        if not (Path(folder) / "adapter_config.json").exists() and Path(folder).exists():
            raise ExpertFailedError(f"{folder}: no adapter_config.json in it; expected a PEFT adapter")
        with self.lock:
            try:
                if key in self._adapted:
                    adapted, lock = self._adapted[key]
                    slot = f"expert_{len(adapted.peft_config)}"
                    with lock:
                        _load_into(adapted, folder, slot, revision)
                else:
                    slot = "expert_0"
                    adapted = PeftModel.from_pretrained(share_weights(model), folder, slot, revision=revision)
                    lock = threading.RLock()
                    self._adapted[key] = (adapted, lock)
            except Exception as error:  # PEFT raises ValueError, RuntimeError, KeyError, SafetensorError, ... alike
                raise ExpertFailedError(
                    f"adapter {folder} does not fit the base {base.model}: {one_line(error)}"
                ) from error
        return LocalBackend(adapted.eval(), tokenizer, lock, slot)


def _load_into(adapted: Any, folder: str, slot: str, revision: str | None) -> None:
    """Load one more adapter; one that can't be loaded leaves nothing behind in the shared model."""
    try:
        adapted.load_adapter(folder, slot, revision=revision)
    except Exception:
        if slot in adapted.peft_config:  # PEFT puts the layers in before it reads the weights
            adapted.delete_adapter(slot)
        raise


def same_model(one: str, other: str) -> bool:
    """Whether two names (hub ids, or paths in any spelling) are of one model."""
    return _resolved(Source(one)) == _resolved(Source(other))


def _resolved(source: Source) -> Source:
    path = Path(source.model).expanduser()
    return Source(str(path.resolve()), source.revision, source.trust_remote_code) if path.exists() else source
