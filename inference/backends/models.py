"""Local models in memory: each base once, as many as there is room for, the ones that are used least make room."""

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
from ...modeling.source import QUANTIZATIONS, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LONGEST = 120.0  # seconds that room for a model is waited for, before the next best expert is asked
_PATIENCE = 2.0  # seconds that a model may be waited for before those that are used make room for it


@dataclass
class Resident:
    """A model in memory.

    Attributes:
        model: as it is.
        tokenizer: of the model.
        size: bytes of its weights.
        pinned: whether it stays.
        users: answers that are being given by it.
        loaded: when.
        used: when the last of them began or ended.
        turn: held while it generates.
        adapted: the same weights with LoRA adapters, or None.
        slots: the adapters, by folder and revision.
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

    Whoever answers holds a lease. Without room for a model that is not in memory, those nobody has a lease of go, the
    one that was used longest ago first. Where all are used, the newcomer waits; after a while no new lease of the one
    that is to go is given, so that a busy model can't keep another out for good. All who wait for one model get it by
    one loading: the order of the work is changed so that little is switched (CoServe, arXiv 2503.02354).

    Args:
        device: where models go.
        dtype: of their weights.
        budget: bytes that the weights of models loaded here may take; None for no limit.
        pinned: models that stay once they are loaded, within the budget.
        quantization: of models that are loaded here: nf4, int8 or None.

    Raises:
        ExpertokenError: the quantization or the type is unknown.
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
        """Make a loaded model known, so that nobody loads it again. It stays, and takes nothing of the budget."""
        self._residents[source.resolved()] = Resident(model, tokenizer, 0, pinned=True)

    @property
    def resident(self) -> list[Source]:
        """What is in memory."""
        with self._changed:
            return list(self._residents)

    def holds(self, source: Source) -> bool:
        """Whether a model is in memory."""
        with self._changed:
            return source.resolved() in self._residents

    @property
    def taken(self) -> int:
        """Bytes that the weights of models loaded here take, with those that are being loaded."""
        with self._changed:
            return sum(resident.size for resident in self._residents.values()) + sum(self._loading.values())

    @contextmanager
    def lease(self, source: Source) -> Iterator[Resident]:
        """A model that stays in memory within the block. Errors as in `acquire`."""
        resident = self.acquire(source)
        try:
            yield resident
        finally:
            self.release(resident)

    def acquire(self, source: Source, given_up: threading.Event | None = None) -> Resident:
        """A model that stays in memory until it is released; loaded where it is not, which may wait for room.

        Args:
            source: of the model.
            given_up: set by whoever does not want it any more: nothing is loaded for nobody.

        Raises:
            ExpertFailedError: it can't be loaded, is larger than the budget, no room came free, or it was given up.
        """
        source = source.resolved()
        began = waits = time.monotonic()
        while True:
            with self._changed:
                if given_up is not None and given_up.is_set():
                    self._waiting.pop(source, None)  # whoever else waits for it says so again
                    raise ExpertFailedError(f"{source.model} is not wanted any more")
                resident = self._enter(source, began)
                if resident is not None:
                    return resident
                failed, reason = self._failed.get(source, (0.0, ""))
                if failed >= began:  # while this waited for it: one load fails all who wait, and is not repeated
                    raise ExpertFailedError(reason)
                if source in self._residents or source in self._loading or not self._may_load(source):
                    self._waiting.setdefault(source, time.monotonic())
                    self._changed.wait(0.5)
                    if source in self._loading:  # that takes as long as it takes
                        waits = time.monotonic()
                    elif time.monotonic() - waits > _LONGEST:
                        self._waiting.pop(source, None)
                        raise ExpertFailedError(f"{source.model}: no room for it within {_LONGEST:g} s")
                    continue
                self._loading[source] = self._needed(source)
            self._load(source)  # without the lock: others answer and decide meanwhile

    def acquire_now(self, source: Source) -> Resident | None:
        """As `acquire` where that is done at once, else None; it does not wait for a model that is being dropped."""
        if not self._changed.acquire(blocking=False):
            return None
        try:
            return self._enter(source.resolved(), time.monotonic())
        finally:
            self._changed.release()

    def prefetch(self, source: Source) -> None:
        """Load a model that will be wanted soon, where there is room for it beside those that are used and wanted."""
        source = source.resolved()
        with suppress(ExpertFailedError):  # told to who acquires it
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
        # Who has waited since before it was loaded gets it, whoever else wants room.
        if resident is None or (resident.loaded < began and self._is_to_go(source)):
            return None
        self._waiting.pop(source, None)
        resident.users += 1
        resident.used = time.monotonic()
        return resident

    def release(self, resident: Resident) -> None:
        """The end of a lease."""
        with self._changed:
            resident.users -= 1
            resident.used = time.monotonic()
            self._changed.notify_all()

    def slot(self, resident: Resident, base: Source, folder: str, revision: str | None = None) -> str:
        """The name of an adapter in a resident model; loaded where it is not. Adapters of one base share one model.

        The adapted model has the base's very tensors but modules of its own, so that the base stays as it is.

        Raises:
            ExpertFailedError: the adapter is missing or does not fit the base.
        """
        from peft import PeftModel

        if (folder, revision) in resident.slots:  # without waiting for who generates just now
            return resident.slots[folder, revision]
        if Path(folder).is_absolute() and not Path(folder).exists():
            raise ExpertFailedError(f"{folder}: no such folder; expected a PEFT adapter")
        if not (Path(folder) / "adapter_config.json").exists() and Path(folder).exists():
            raise ExpertFailedError(f"{folder}: no adapter_config.json in it; expected a PEFT adapter")
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
        """Let models go until there is room for one more; whether there is. The one that waits longest comes first."""
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
                f"{source.model} needs {needed / 2**30:.2f} GiB; of the {self.budget / 2**30:.2f} GiB for local "
                f"experts pinned ones take {fixed / 2**30:.2f}"
            )

    def _drop_free(self, needed: int) -> bool:
        """Let models go until there is room for so many bytes more; whether there is."""
        while self.budget is not None and self.taken + needed > self.budget:
            free = [k for k, held in self._residents.items() if not held.pinned and not held.users]
            if not free:
                return False
            self._drop(min(free, key=lambda key: self._residents[key].used))
        return True

    def _is_to_go(self, source: Source) -> bool:
        """Whether others have waited so long for room that this model gives no new lease."""
        waited = [
            since for key, since in self._waiting.items() if key not in self._residents and key not in self._loading
        ]
        if not waited or time.monotonic() - min(waited) < _PATIENCE:
            return False
        if self._victim not in self._residents:  # chosen once, or a busy pair would take turns in staying
            unpinned = [key for key, held in self._residents.items() if not held.pinned]
            self._victim = min(unpinned, key=lambda key: self._residents[key].used, default=None)
        return source == self._victim

    def _drop(self, source: Source) -> None:
        logger.info("%s makes room", source.model)
        resident = self._residents.pop(source)
        resident.model = resident.adapted = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, source: Source) -> None:
        loaded = None
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
                        self._settle(source, *loaded)
                finally:
                    self._changed.notify_all()

    def _settle(self, source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """A model is in memory, and what it takes is known for sure now: of one of the hub nothing was before."""
        self.loads += 1
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._sizes[source] = size
        if self.budget is not None:
            self._check_fits(source, size)
            if not self._drop_free(size):
                return  # the others are used: it waits for its room like anybody, and is loaded again
        self._residents[source] = Resident(model, tokenizer, size, pinned=source in self._pinned)


def _size_on_disk(
    source: Source, device: torch.device | str | None, dtype: torch.dtype | str | None, quantization: str | None
) -> int:
    """Bytes that a model will take, by the headers of its files; 0 where they are not on this machine, or no such."""
    from safetensors import SafetensorError, safe_open

    files = _weights(source)
    numbers = stored = 0
    for file in files:
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:  # loading it will tell
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
    """Safetensors files that a model is loaded from, as far as they are on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(source.model).expanduser()
    if not folder.exists():
        try:
            folder = Path(snapshot_download(source.model, revision=source.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return []
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with suppress(ValueError, KeyError, AttributeError):  # loading it will tell
            return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    single = folder / "model.safetensors"  # other files beside it are not read
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
_QUANTIZED = {"nf4": 5, "int8": 9}  # bits a number, with what stays as it is


def _load_into(adapted: Any, folder: str, slot: str, revision: str | None) -> None:
    """Load one more adapter; one that can't be loaded leaves nothing behind in the shared model."""
    try:
        adapted.load_adapter(folder, slot, revision=revision)
    except Exception:
        if slot in adapted.peft_config:  # PEFT puts the layers in before it reads the weights
            adapted.delete_adapter(slot)
        raise
