"""Local models in memory: each base is loaded once, and the least recently used models are evicted."""

import gc
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch

from ...modeling.errors import ExpertFailedError, ExpertokenError, did_you_mean, one_line
from ...modeling.loading import LOADING, as_dtype, load_causal_lm, share_weights
from ...modeling.source import QUANTIZATIONS, Source, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LONGEST = 120.0  # seconds to wait for room for a model, before the next best expert is tried
_PATIENCE = 2.0  # seconds that a model may wait before models in use make room for it


@dataclass
class Resident:
    """A model in memory.

    Attributes:
        model: Model without adapters.
        tokenizer: Tokenizer of the model.
        size: Size of its weights in bytes.
        pinned: True if the model is never evicted.
        users: Number of its in-flight answers.
        loaded: Time of loading, in seconds of a monotonic clock.
        used: Time at which an answer last began or ended, in seconds of a monotonic clock.
        turn: Lock held while the model generates.
        adapted: Model with LoRA adapters on the same weights, or None.
        slots: Names of the adapters by folder and revision.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    size: int
    pinned: bool = False
    users: int = 0
    loaded: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)
    turn: RLock = field(default_factory=RLock)
    adapted: Any = None
    slots: dict[tuple[str, str | None], str] = field(default_factory=dict)


class LocalModels:
    """The local models of one composite.

    Every in-flight answer holds a lease of its model. To make room for a new model, models without a lease are evicted,
    the least recently used one first. If all are leased, the new model waits. After 2 seconds the model that is next to
    be evicted gets no new leases, so that a busy model can't block another one forever.

    All requests that wait for one model share one loading. Requests are reordered so that few models are switched
    (CoServe, arXiv 2503.02354).

    Args:
        device: Device to load models on.
        dtype: Type of their weights.
        budget: Limit in bytes on the weights of models loaded here. Defaults to no limit.
        pinned: Models that stay once they are loaded, within the budget.
        quantization: Quantization of models loaded here: nf4, int8 or None.

    Raises:
        ExpertokenError: The quantization or the type is unknown.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        budget: int | None = None,
        pinned: tuple[Source, ...] = (),
        quantization: str | None = None,
    ) -> None:
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise ExpertokenError(f"quantization {quantization!r}: {did_you_mean(quantization, QUANTIZATIONS)}")
        self.device, self.dtype = device, None if dtype is None else as_dtype(dtype)
        self.budget, self.quantization = budget, quantization
        self.loads = 0
        self._pinned = {source.resolved() for source in pinned}
        self._residents: dict[Source, Resident] = {}
        self._sizes: dict[Source, int] = {}
        self._waiting: dict[Source, float] = {}
        self._loading: dict[Source, int] = {}
        self._failed: dict[Source, tuple[float, str]] = {}
        self._victim: Source | None = None
        self._changed = threading.Condition(threading.RLock())

    def add(self, source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Register a loaded model, so that it is not loaded again. It stays, and does not count towards the budget."""
        self._residents[source.resolved()] = Resident(model, tokenizer, 0, pinned=True)

    @property
    def resident(self) -> list[Source]:
        """Sources of the models in memory."""
        with self._changed:
            return list(self._residents)

    def holds(self, source: Source) -> bool:
        """Check whether a model is in memory."""
        with self._changed:
            return source.resolved() in self._residents

    @property
    def taken(self) -> int:
        """Size in bytes of the weights of models loaded here, including models that are being loaded."""
        with self._changed:
            return sum(resident.size for resident in self._residents.values()) + sum(self._loading.values())

    @contextmanager
    def lease(self, source: Source) -> Iterator[Resident]:
        """Keep a model in memory within the block. Errors as in `acquire`."""
        resident = self.acquire(source)
        try:
            yield resident
        finally:
            self.release(resident)

    def acquire(self, source: Source, given_up: threading.Event | None = None) -> Resident:
        """Return a model that stays in memory until it is released.

        A model that is not in memory is loaded, which may wait for room.

        Args:
            source: Source of the model.
            given_up: Event that the caller sets when it disconnects, so that no model is loaded in vain.

        Raises:
            ExpertFailedError: The model can't be loaded, is larger than the budget, found no room in time, or was given
                up.
        """
        source = source.resolved()
        began = waits = time.monotonic()
        while True:
            with self._changed:
                if given_up is not None and given_up.is_set():
                    self._waiting.pop(source, None)  # other waiting callers add it again
                    raise ExpertFailedError(f"{source.model}: the request was cancelled before the model was loaded")
                resident = self._enter(source, began)
                if resident is not None:
                    return resident
                failed, reason = self._failed.get(source, (0.0, ""))
                # One failed load fails all calls that wait for it, and is not repeated.
                if failed >= began:
                    raise ExpertFailedError(reason)
                if source in self._residents or source in self._loading or not self._may_load(source):
                    self._waiting.setdefault(source, time.monotonic())
                    self._changed.wait(0.5)
                    if source in self._loading:  # loading has no time limit
                        waits = time.monotonic()
                    elif time.monotonic() - waits > _LONGEST:
                        self._waiting.pop(source, None)
                        raise ExpertFailedError(f"{source.model}: no room in memory within {_LONGEST:g} s")
                    continue
                self._loading[source] = self._needed(source)
            resident = self._load(source, lease=True)  # without the lock, so that others answer and decide meanwhile
            if resident is not None:
                if given_up is None or not given_up.is_set():
                    return resident
                self.release(resident)

    def acquire_now(self, source: Source) -> Resident | None:
        """Return a model as in `acquire` if that is possible at once, else None.

        The call does not wait for an eviction that is running.
        """
        if not self._changed.acquire(blocking=False):
            return None
        try:
            return self._enter(source.resolved(), time.monotonic())
        finally:
            self._changed.release()

    def prefetch(self, source: Source) -> None:
        """Load a model that is needed soon, if there is room for it beside the models in use or requested."""
        source = source.resolved()
        with suppress(ExpertFailedError):  # `acquire` raises it again
            with self._changed:
                used = sum(r.size for r in self._residents.values() if r.pinned or r.users)
                fits = self.budget is None or used + sum(self._loading.values()) + self._needed(source) <= self.budget
                if source in self._residents or source in self._loading or self._waiting or not fits:
                    return
                self._may_load(source)
                self._loading[source] = self._needed(source)
            self._load(source)

    def _enter(self, source: Source, began: float) -> Resident | None:
        resident = self._residents.get(source)
        # A request that waited before the model was loaded gets it, even if another model needs room.
        if resident is None or (resident.loaded < began and self._is_to_go(source)):
            return None
        self._waiting.pop(source, None)
        resident.users += 1
        resident.used = time.monotonic()
        return resident

    def release(self, resident: Resident) -> None:
        """End a lease."""
        with self._changed:
            resident.users -= 1
            resident.used = time.monotonic()
            self._changed.notify_all()

    def slot(self, resident: Resident, base: Source, folder: str, revision: str | None = None) -> str:
        """Return the name of an adapter in a resident model, after loading it if needed.

        Adapters of one base share one model. The adapted model has the base's own tensors but separate modules, so that
        the base is not changed.

        Raises:
            ExpertFailedError: The adapter is missing or does not fit the base.
        """
        from peft import PeftModel

        if (folder, revision) in resident.slots:  # without waiting for generations that are running
            return resident.slots[folder, revision]
        if Path(folder).is_absolute() and not Path(folder).exists():
            raise ExpertFailedError(f"{folder}: expected the folder of a PEFT adapter, found none")
        if not (Path(folder) / "adapter_config.json").exists() and Path(folder).exists():
            raise ExpertFailedError(f"{folder}: expected the folder of a PEFT adapter, found no adapter_config.json")
        with resident.turn:
            if (folder, revision) in resident.slots:
                return resident.slots[folder, revision]
            slot = f"expert_{len(resident.slots)}"
            try:
                with LOADING:
                    if resident.adapted is None:
                        shared = share_weights(resident.model)
                        resident.adapted = PeftModel.from_pretrained(shared, folder, slot, revision=revision).eval()
                    else:
                        _load_into(resident.adapted, folder, slot, revision)
            except Exception as error:  # PEFT raises ValueError, RuntimeError, KeyError, SafetensorError, ... alike
                raise ExpertFailedError(
                    f"adapter {folder} does not fit the base {base.model}: {one_line(error)}"
                ) from error
            resident.slots[folder, revision] = slot
            return slot

    def _needed(self, source: Source) -> int:
        if self.budget is None:
            return 0
        if source not in self._sizes:
            self._sizes[source] = _size_on_disk(source, self.device, self.dtype, self.quantization)
        return self._sizes[source]

    def _may_load(self, source: Source) -> bool:
        """Evict models until there is room for one more, and return whether there is.

        The model that has waited longest comes first.
        """
        if self.budget is None:
            return True
        needed = self._needed(source)
        self._check_fits(source, needed)
        first = min(self._waiting, key=self._waiting.__getitem__, default=source)
        if source != first and first not in self._loading and first not in self._residents:
            return False
        return self._drop_free(needed)

    def _check_fits(self, source: Source, needed: int) -> None:
        if self.budget is None:
            return
        fixed = sum(held.size for key, held in self._residents.items() if held.pinned and key != source)
        if needed > self.budget - fixed:
            self._waiting.pop(source, None)
            raise ExpertFailedError(
                f"{source.model} needs {needed / 2**30:.2f} GiB, but pinned experts use {fixed / 2**30:.2f} GiB of the "
                f"{self.budget / 2**30:.2f} GiB for local experts"
            )

    def _drop_free(self, needed: int) -> bool:
        """Evict models until there is room for `needed` more bytes. Return whether there is."""
        while self.budget is not None and self.taken + needed > self.budget:
            free = [k for k, held in self._residents.items() if not held.pinned and not held.users]
            if not free:
                return False
            self._drop(min(free, key=lambda key: self._residents[key].used))
        return True

    def _is_to_go(self, source: Source) -> bool:
        """Check whether this model gives no new leases, because others have waited too long for room."""
        waited = [
            since for key, since in self._waiting.items() if key not in self._residents and key not in self._loading
        ]
        if not waited or time.monotonic() - min(waited) < _PATIENCE:
            return False
        if self._victim not in self._residents:  # chosen once, or two busy models would stay alternately
            unpinned = [key for key, held in self._residents.items() if not held.pinned]
            self._victim = min(unpinned, key=lambda key: self._residents[key].used, default=None)
        return source == self._victim

    def _drop(self, source: Source) -> None:
        logger.info("%s is evicted to make room", source.model)
        resident = self._residents.pop(source)
        resident.model = resident.adapted = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, source: Source, *, lease: bool = False) -> Resident | None:
        """Load a model, and return it if there is still room for it.

        Args:
            source: Source of the model.
            lease: Lease the model to the caller at once. Otherwise another caller that waits for room could evict it
                before its first use, and two busy models would evict each other for ever.
        """
        loaded = resident = None
        try:
            loaded = load_causal_lm(source, device=self.device, dtype=self.dtype, quantization=self.quantization)
        except ExpertokenError as error:
            self._failed[source] = (time.monotonic(), str(error))
            raise ExpertFailedError(str(error)) from error
        finally:
            with self._changed:
                del self._loading[source]
                self._waiting.pop(source, None)
                try:
                    if loaded is not None:
                        resident = self._settle(source, *loaded)
                    if resident is not None and lease:
                        resident.users += 1
                finally:
                    self._changed.notify_all()
        return resident

    def _settle(
        self, source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> Resident | None:
        """Register a loaded model under its actual size.

        The size of a hub model is unknown before.
        """
        self.loads += 1
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._sizes[source] = size
        if self.budget is not None:
            self._check_fits(source, size)
            if not self._drop_free(size):
                return None  # all others are in use: the model waits for room, and is loaded again
        resident = Resident(model, tokenizer, size, pinned=source in self._pinned)
        self._residents[source] = resident
        return resident


def _size_on_disk(
    source: Source, device: torch.device | str | None, dtype: torch.dtype | str | None, quantization: str | None
) -> int:
    """Estimate the size of a loaded model in bytes, from the headers of its files.

    The result is 0 if its files are not on this machine or are no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    files = _weights(source)
    numbers = stored = 0
    for file in files:
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:  # loading the file raises the error
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                count = torch.Size(part.get_shape()).numel()
                numbers += count
                stored += count * _BYTES.get(part.get_dtype(), 2)
    if quantization:
        return numbers * _QUANTIZED[quantization] // 8
    if isinstance(dtype, torch.dtype):
        return numbers * dtype.itemsize
    return numbers * 4 if torch.device(device or "cpu").type == "cpu" and dtype != "auto" else stored


def _weights(source: Source) -> list[Path]:
    """Return the safetensors files of a model that are on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = local_path(source.model)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(source.model, revision=source.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return []
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with suppress(ValueError, KeyError, AttributeError):  # loading the file raises the error
            return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    single = folder / "model.safetensors"  # other files in the folder are not read
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
_QUANTIZED = {"nf4": 5, "int8": 9}  # bits per parameter, including unquantized parts


def _load_into(adapted: Any, folder: str, slot: str, revision: str | None) -> None:
    """Load one more adapter.

    An adapter that can't be loaded is removed from the shared model.
    """
    try:
        adapted.load_adapter(folder, slot, revision=revision)
    except Exception:
        if slot in adapted.peft_config:  # PEFT inserts the layers before it reads the weights
            adapted.delete_adapter(slot)
        raise
