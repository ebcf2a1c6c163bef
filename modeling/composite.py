"""The composite folder: expert rows, pool, manifest, tokenizer and, where LoRA was trained, a plain PEFT adapter."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .dispatch import gives_chances
from .errors import ExpertokenError
from .files import PRODUCTS, atomic_file, local_folder, read_settled
from .fingerprint import describe_dtype, fingerprints, library_versions, same_model
from .loading import as_device, load_tokenizer
from .meta import MetaLLM
from .model_card import CARD_FILE, model_card
from .policy import Chooser, Policy
from .pool import ExpertPool
from .source import Source, is_path
from .state import HEAD, StateSpec
from .view import View

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
ROWS_FILE, POOL_FILE, MANIFEST_FILE = "expert_tokens.safetensors", "experts.yaml", PRODUCTS["composite"]
ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


_PROBES = ("What is 2 + 2?", "Name a river.", "Who are you? Answer in one long sentence, please.")
"""Prompts of the comparison; any text does, these differ in length."""


@dataclass
class Manifest:
    """What `expertoken.json` says about a composite.

    Attributes:
        base: model, revision, dtype, device and quantization of training, fingerprint, vocab_size and hidden_size of
            the meta LLM.
        experts: names in token order.
        training: method, objective, labelling, regularisation and what they achieved.
        data: path and fingerprint of the supervision.
        decision: what a decision reads, `view` (see `view.View`) and `state` (see `state.StateSpec`), and `policy`
            where the labels came with one.
        calibration: what `expertoken calibrate` set: `policy` (see `modeling.policy`), and on what.
        versions: of the libraries that wrote it.
        format_version: of the folder.
    """

    base: dict[str, Any]
    experts: list[str]
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    decision: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    versions: dict[str, Any] = field(default_factory=library_versions)
    format_version: int = FORMAT_VERSION


@dataclass
class Composite:
    """A composite as it is in memory.

    Attributes:
        meta: the meta LLM with its rows.
        pool: its candidates.
        manifest: what it was made of.
        folder: that it was loaded from, or None.
    """

    meta: MetaLLM
    pool: ExpertPool
    manifest: Manifest
    folder: Path | None = None

    def __post_init__(self) -> None:
        own = self.pool.self_expert  # which sees where the meta LLM does, unless its entry says otherwise
        sees = self.meta is not None and self.meta.sight is not None  # None: only what is served is looked at
        if sees and own is not None and own.supports is None:
            candidates = [expert for expert in self.pool.candidates if expert is not own]
            self.pool = ExpertPool([*candidates, replace(own, supports=("images",))])

    @property
    def chooser(self) -> Chooser:
        """What chooses among the candidates from their logits."""
        training = self.manifest.training
        return Chooser(self.pool, gives_chances(training.get("objective")), training.get("usd_per_query", {}))

    def chosen(self, logits: torch.Tensor, prompt_tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the candidate that is served for each of N queries, `[N]`: by the composite's own policy.

        Args:
            logits: `[N, C]`.
            prompt_tokens: tokens of each query, for its cost.
        """
        chooser, policy = self.chooser, self.policy
        if policy == Policy():
            return logits.argmax(-1).numpy()
        place = {name: index for index, name in enumerate(self.pool.names)}
        return np.array(
            [
                place[chooser.choose(policy, row, prompt_tokens=int(length)).expert]
                for row, length in zip(logits, prompt_tokens, strict=True)
            ]
        )

    @property
    def policy(self) -> Policy:
        """The policy that is served: what was calibrated, over what came with the labels."""
        return Policy.parse((self.manifest.calibration or {}).get("policy"), self.trained_policy)

    @property
    def trained_policy(self) -> Policy:
        """The policy that came with the labels: what a USD was worth in them."""
        return Policy.parse(self.manifest.decision.get("policy"))


def describe_base(meta: MetaLLM) -> dict[str, Any]:
    """The manifest's `base` for a meta LLM."""
    # The commit that was loaded, where the hub told it: a branch may move on, and with it weights and chat template.
    commit = getattr(meta.plain.config, "_commit_hash", None)
    return {
        **asdict(meta.source),
        "revision": commit or meta.source.revision,
        "dtype": describe_dtype(meta.model),
        "device": meta.device.type,
        "quantization": meta.quantization,
        "fingerprint": fingerprints(meta.plain),
        "vocab_size": meta.vocab_size,
        "hidden_size": meta.head.in_features,
    }


def write_rows(rows: torch.Tensor, names: list[str], path: Path) -> None:
    """Write the candidates' rows `[C, d]`; the same rows and names always give the same bytes.

    Hence one metadata entry: safetensors writes several in an order that differs from run to run.
    """
    from safetensors.torch import save

    path.write_bytes(save({"expert_rows": rows.float().contiguous()}, metadata={"candidates": json.dumps(names)}))


def read_rows(path: Path, names: list[str], width: int) -> torch.Tensor:
    """Read the candidates' rows `[C, d]`.

    Raises:
        ExpertokenError: the file is missing, damaged, or not of these candidates.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            rows = file.get_tensor("expert_rows")
            stored = json.loads((file.metadata() or {}).get("candidates", "[]"))
    except (FileNotFoundError, SafetensorError, OSError, ValueError) as error:
        raise ExpertokenError(
            f"{path}: missing or damaged ({error}); restore it or train the composite again"
        ) from None
    if stored != names or tuple(rows.shape) != (len(names), width):
        raise ExpertokenError(
            f"{path}: holds rows {list(rows.shape)} of {stored}, expected {[len(names), width]} of {names}; the folder "
            "was changed by hand"
        )
    return rows


def probe_logits(composite: Composite) -> torch.Tensor:
    """Return the candidates' logits and Z on fixed prompts, `[3, C + 1]`, which a reload has to repeat."""
    meta = composite.meta
    return torch.cat([meta.probe([meta.encode(text)]) for text in _PROBES])


@dataclass(frozen=True)
class Trained:
    """What training changed, whole: under ZeRO-3 and FSDP2 it is spread over the processes.

    Attributes:
        rows: `[C, d]` float32.
        adapter: LoRA's weights, or None.
        probes: logits `[3, C + 1]` that a reload has to repeat, or None.
    """

    rows: torch.Tensor
    adapter: dict[str, torch.Tensor] | None
    probes: torch.Tensor | None

    @classmethod
    def of(cls, composite: "Composite", *, probe: bool = True) -> "Trained":
        """Bring it together; every process has to call this."""
        meta = composite.meta
        adapter = meta.adapter_state() if meta.adapted else None
        return cls(meta.rows, adapter, probe_logits(composite) if probe else None)


def write_composite(composite: Composite, folder: Path, trained: Trained) -> None:
    """Write the files of a composite.

    Args:
        composite: whose.
        folder: that exists, where it will be or beside it: paths in its files are relative to it.
        trained: rows and adapter.
    """
    from safetensors.torch import save_file

    meta, pool, manifest = composite.meta, composite.pool, composite.manifest
    manifest.experts = [expert.name for expert in pool]
    write_rows(trained.rows, pool.names, folder / ROWS_FILE)
    pool.to_yaml(folder / POOL_FILE)
    manifest.decision = manifest.decision | {"view": asdict(meta.view), "state": str(meta.state)}
    document = asdict(manifest)
    document["base"]["model"] = portable(meta.source.model, folder)
    if "path" in manifest.data:
        document["data"]["path"] = portable(manifest.data["path"], folder)
    (folder / MANIFEST_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    (meta.tokenizer if meta.sight is None else meta.sight.processor).save_pretrained(folder)
    if trained.adapter is not None:
        adapted: Any = meta.model
        replace(adapted.peft_config["default"], inference_mode=True).save_pretrained(folder)
        save_file(trained.adapter, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _name_base(folder / ADAPTER_FILE, document["base"]["model"])
    sees = meta.sight is not None
    card = model_card(pool, meta.source.model, manifest.training, manifest.data, manifest.versions, sees=sees)
    (folder / CARD_FILE).write_text(card, "utf-8")


def _name_base(file: Path, base: str) -> None:
    """Let an adapter's configuration name its base as the manifest does: PEFT writes a path of this machine."""
    document = json.loads(file.read_text("utf-8"))
    document["base_model_name_or_path"] = base
    file.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def portable(model: str, folder: Path) -> str:
    """A local path relative to a folder, so that a tree can move; what is no path (a hub id) as it is."""
    path = Path(model).expanduser()
    return relpath(path.resolve(), folder.resolve()) if path.exists() else model


def _resolved(model: str, folder: Path) -> str:
    """The inverse of `portable`."""
    path = folder / model
    return str(path.resolve()) if path.exists() else model


def read_manifest(path: Path) -> Manifest:
    """Read `expertoken.json`.

    Raises:
        ExpertokenError: `path` holds no composite, one of another format, or what was changed by hand.
    """
    file = path / MANIFEST_FILE
    try:
        document = json.loads(read_settled(file))
    except FileNotFoundError:
        why = f"no {MANIFEST_FILE} in it" if path.exists() else "there is nothing of that name"
        if path.parent.name and not path.exists() and not is_path(str(path)):  # as it is written, owner/name
            why += f"; of one on the hub make a copy first: hf download {path} --local-dir FOLDER"
        raise ExpertokenError(f"{path}: no composite folder ({why})") from None
    except (OSError, ValueError) as error:
        raise ExpertokenError(f"{file}: can't be read ({error})") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ExpertokenError(
            f"{file}: expected format_version {FORMAT_VERSION}, got {version!r}; use a matching release"
        )
    for name in ("base", "training", "data", "decision"):
        if not isinstance(document.get(name, {}), dict):
            raise ExpertokenError(f"{file}: {name}: expected a mapping, got {document[name]!r}; it was changed by hand")
    return Manifest(**{item.name: document[item.name] for item in fields(Manifest) if item.name in document})


def write_calibration(path: Path, calibration: dict[str, Any] | None) -> None:
    """Set what a composite folder says of its calibration; nothing else of it changes.

    Raises:
        ExpertokenError: `path` holds no composite, or can't be written.
    """
    read_manifest(path)
    file = path / MANIFEST_FILE
    document = json.loads(file.read_text("utf-8")) | {"calibration": calibration}
    with atomic_file(file) as aside:
        aside.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def load_composite(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    beside: MetaLLM | None = None,
) -> Composite:
    """Load a composite folder.

    Args:
        path: the folder, or `owner/name` of one on the hub.
        device: where the meta LLM goes; the first accelerator, or the CPU, where not given.
        dtype: of its weights; where not given, what it was trained in, or float32 on a CPU for one trained elsewhere
            (bfloat16 is many times slower on most).
        revision: of a composite on the hub.
        trust_remote_code: allow the base model's repository to run its own code. A folder can't allow that for itself.
        beside: a meta LLM in memory on the same base, whose weights are used; None to load them.

    Raises:
        ExpertokenError: a file is missing or damaged, the base model is not the one it was trained on, or it needs
            `trust_remote_code`.
    """
    path = local_folder(path, revision)
    manifest = read_manifest(path)
    base = manifest.base
    if base.get("trust_remote_code") and not trust_remote_code:
        raise ExpertokenError(
            f"{path}: its base model {base['model']} runs code of its own repository; say trust_remote_code=True "
            "(--trust-remote-code) if you trust it"
        )
    device = as_device(device)
    if dtype is None and (device.type != "cpu" or base.get("device") == "cpu"):
        dtype = base["dtype"]
    pool = ExpertPool.from_yaml(path / POOL_FILE)
    state = StateSpec.parse(manifest.decision.get("state", HEAD))
    rows = read_rows(path / ROWS_FILE, pool.names, state.parts * base["hidden_size"])
    model = _resolved(base["model"], path)
    if is_path(model) and not Path(model).exists():
        raise ExpertokenError(
            f"{path}: its base model is not at {(path / model).resolve()}; put it there, or write where it is into "
            f"{path / MANIFEST_FILE} (`base.model`)"
        )
    source = Source(model, base.get("revision"), trust_remote_code)
    if beside is not None:
        meta = beside.beside(len(pool.names), state)
    else:
        meta = MetaLLM.from_pretrained(
            source, len(pool.names), device=device, dtype=dtype, quantization=base.get("quantization"), state=state
        )
    meta.tokenizer = load_tokenizer(path, seeing=meta.sight is not None, trust_remote_code=trust_remote_code)
    meta.view = View(**manifest.decision.get("view", {}))
    if "path" in manifest.data:
        manifest.data["path"] = _resolved(manifest.data["path"], path)
    if meta.vocab_size != base["vocab_size"] or not same_model(meta.plain, base["fingerprint"]):
        raise ExpertokenError(
            f"{path}: was trained on another base model than {source.model} is now (fingerprint "
            f"{next(iter(base['fingerprint'].values()))}, found {meta.base_fingerprint}); give it the original, or "
            "train again"
        )
    if (path / ADAPTER_FILE).exists():
        meta.load_adapter(path)
    meta.rows = rows
    return Composite(meta, pool, manifest, path)
