"""The composite folder: expert rows, pool, manifest, tokenizer and, for a composite with LoRA, a plain PEFT adapter."""

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
from .source import Source, is_path, local_path
from .state import HEAD, StateSpec
from .view import View

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
ROWS_FILE, POOL_FILE, MANIFEST_FILE = "expert_tokens.safetensors", "experts.yaml", PRODUCTS["composite"]
ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


_PROBES = ("What is 2 + 2?", "Name a river.", "Who are you? Answer in one long sentence, please.")
"""Prompts of the comparison after a reload. Any texts serve, and these differ in length."""


@dataclass
class Manifest:
    """Content of `expertoken.json`, the manifest of a composite.

    Attributes:
        base: Model, revision, dtype, device and quantization of training, fingerprint, vocab_size and hidden_size of
            the meta LLM.
        experts: Names in token order.
        training: Method, objective, labelling, regularisation and the scores that they reached.
        data: Path and fingerprint of the supervision.
        decision: Input of a decision, `view` (see `view.View`) and `state` (see `state.StateSpec`), and `policy` if the
            labels came with one.
        calibration: Result of `expertoken calibrate`: `policy` (see `modeling.policy`), and the data behind it.
        versions: Versions of the libraries that wrote the folder.
        format_version: Version of the folder's format.
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
    """A composite in memory.

    Attributes:
        meta: Meta LLM with its expert rows.
        pool: Pool of the candidates.
        manifest: Record of the base, the training and the data.
        folder: Folder that the composite was loaded from, or None.
    """

    meta: MetaLLM
    pool: ExpertPool
    manifest: Manifest
    folder: Path | None = None

    def __post_init__(self) -> None:
        own = self.pool.self_expert  # self reads pictures if the meta LLM does, unless its entry declares otherwise
        sees = self.meta is not None and self.meta.sight is not None  # meta is None if only the policy is of interest
        if sees and own is not None and own.supports is None:
            candidates = [expert for expert in self.pool.candidates if expert is not own]
            self.pool = ExpertPool([*candidates, replace(own, supports=("images",))])

    @property
    def chooser(self) -> Chooser:
        """Chooser among the candidates by their logits."""
        training = self.manifest.training
        return Chooser(self.pool, gives_chances(training.get("objective")), training.get("usd_per_query", {}))

    def chosen(self, logits: torch.Tensor, prompt_tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the indices `[N]` of the candidates that the composite's own policy serves for N queries.

        Args:
            logits: Logits of the candidates, `[N, C]`.
            prompt_tokens: Tokens of each query, for its cost.
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
        """Policy that is served: the calibrated policy, with the trained policy as its default."""
        return Policy.parse((self.manifest.calibration or {}).get("policy"), self.trained_policy)

    @property
    def trained_policy(self) -> Policy:
        """Policy that came with the labels: the worth of a USD in them."""
        return Policy.parse(self.manifest.decision.get("policy"))


def describe_base(meta: MetaLLM) -> dict[str, Any]:
    """Return the manifest's `base` for a meta LLM."""
    # The loaded commit, if the hub reports one. A branch may move on, and its weights and chat template with it.
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
    """Write the candidates' rows `[C, d]` so that the same rows and names always give the same bytes.

    There is one metadata entry, because safetensors writes several entries in an order that differs between runs.
    """
    from safetensors.torch import save

    path.write_bytes(save({"expert_rows": rows.float().contiguous()}, metadata={"candidates": json.dumps(names)}))


def read_rows(path: Path, names: list[str], width: int) -> torch.Tensor:
    """Read the candidates' rows `[C, d]`.

    Raises:
        ExpertokenError: The file is missing or damaged, or holds other candidates.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            rows = file.get_tensor("expert_rows")
            stored = json.loads((file.metadata() or {}).get("candidates", "[]"))
    except (FileNotFoundError, SafetensorError, OSError, ValueError) as error:
        raise ExpertokenError(
            f"{path}: missing or damaged ({error}). Restore it or train the composite again"
        ) from None
    if stored != names or tuple(rows.shape) != (len(names), width):
        raise ExpertokenError(
            f"{path}: expected rows {[len(names), width]} of {names}, got {list(rows.shape)} of {stored}. The folder "
            "was changed by hand: restore it or train the composite again"
        )
    return rows


def probe_logits(composite: Composite) -> torch.Tensor:
    """Return the candidates' logits and Z on fixed prompts, `[3, C + 1]`, which a reload must reproduce."""
    meta = composite.meta
    return torch.cat([meta.probe([meta.encode(text)]) for text in _PROBES])


@dataclass(frozen=True)
class Trained:
    """Trained tensors, gathered whole. Under ZeRO-3 and FSDP2 they are sharded over the processes.

    Attributes:
        rows: Expert rows `[C, d]`, float32.
        adapter: LoRA's weights, or None.
        probes: Logits `[3, C + 1]` that a reload must reproduce, or None.
    """

    rows: torch.Tensor
    adapter: dict[str, torch.Tensor] | None
    probes: torch.Tensor | None

    @classmethod
    def of(cls, composite: "Composite", *, probe: bool = True) -> "Trained":
        """Gather the trained tensors of a composite. Every process must call this."""
        meta = composite.meta
        adapter = meta.adapter_state() if meta.adapted else None
        return cls(meta.rows, adapter, probe_logits(composite) if probe else None)


def write_composite(composite: Composite, folder: Path, trained: Trained) -> None:
    """Write the files of a composite.

    Args:
        composite: Composite to write.
        folder: Existing folder, at its final place or in the same parent folder. Paths in its files are relative to it.
        trained: Rows and adapter.
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
    """Set the base in an adapter's configuration to the manifest's name. PEFT writes a path of this machine."""
    document = json.loads(file.read_text("utf-8"))
    document["base_model_name_or_path"] = base
    file.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def portable(model: str, folder: Path) -> str:
    """Return a local path relative to a folder, so that a tree can move. A hub id is returned unchanged."""
    path = local_path(model)
    return relpath(path.resolve(), folder.resolve()) if path.exists() else model


def _resolved(model: str, folder: Path) -> str:
    """Return the absolute path of a relative one, the inverse of `portable`. A hub id is returned unchanged."""
    path = folder / model
    return str(path.resolve()) if path.exists() else model


def read_manifest(path: Path) -> Manifest:
    """Read `expertoken.json`.

    Raises:
        ExpertokenError: `path` holds no composite, a composite of another format, or a manifest that was changed by
            hand.
    """
    file = path / MANIFEST_FILE
    try:
        document = json.loads(read_settled(file))
    except FileNotFoundError:
        why = f"no {MANIFEST_FILE} in it" if path.exists() else "it does not exist"
        if path.parent.name and not path.exists() and not is_path(str(path)):  # looks like a hub id, owner/name
            why += f". Download a composite from the hub first: hf download {path} --local-dir FOLDER"
        raise ExpertokenError(f"{path}: expected a composite folder ({why})") from None
    except (OSError, ValueError) as error:
        raise ExpertokenError(f"{file}: can't be read ({error})") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ExpertokenError(
            f"{file}: expected format_version {FORMAT_VERSION}, got {version!r}. Use a release that matches it"
        )
    for name in ("base", "training", "data", "decision"):
        if not isinstance(document.get(name, {}), dict):
            raise ExpertokenError(
                f"{file}: {name}: expected a mapping, got {document[name]!r}. The file was changed by hand: restore it"
            )
    return Manifest(**{item.name: document[item.name] for item in fields(Manifest) if item.name in document})


def write_calibration(path: Path, calibration: dict[str, Any] | None) -> None:
    """Write a calibration into a composite folder's manifest. Nothing else in the folder changes.

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
        path: Composite folder, or `owner/name` of a composite on the hub.
        device: Device to load the meta LLM on. Defaults to the first accelerator, or the CPU if there is none.
        dtype: Type of the meta LLM's weights. Defaults to the dtype of training. On a CPU the default is float32 for a
            composite trained on another device, because bfloat16 is many times slower on most CPUs.
        revision: Git revision of a composite on the hub.
        trust_remote_code: If true, the base model's repository may run its own code. A folder can't grant this itself.
        beside: Meta LLM in memory on the same base, whose weights are shared. None to load the weights.

    Raises:
        ExpertokenError: A file is missing or damaged, the base model is not the one of the training, or it needs
            `trust_remote_code`.
    """
    path = local_folder(path, revision)
    manifest = read_manifest(path)
    base = manifest.base
    if base.get("trust_remote_code") and not trust_remote_code:
        raise ExpertokenError(
            f"{path}: the base model {base['model']} runs code of its own repository. Pass trust_remote_code=True "
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
            f"{path}: expected the base model at {(path / model).resolve()}, which does not exist. Move it there, or "
            f"correct `base.model` in {path / MANIFEST_FILE}"
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
            f"{path}: expected the base model that it was trained on (fingerprint "
            f"{next(iter(base['fingerprint'].values()))}), got {source.model} with fingerprint "
            f"{meta.base_fingerprint}. Restore the original model, or train again"
        )
    if (path / ADAPTER_FILE).exists():
        meta.load_adapter(path)
    meta.rows = rows
    return Composite(meta, pool, manifest, path)
