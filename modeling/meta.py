"""The meta LLM: a causal LM, its tokenizer, and the head that holds the expert tokens."""

import copy
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .chat import Message, encode_chat
from .dispatch import candidate_logits, dispatch_forward
from .errors import ExpertokenError, is_out_of_memory, one_line, require_extra
from .gguf import converted
from .head import ExpertHead, initial_row, install_head
from .logits import LogitTransform
from .sharding import full_shape, gathered, overwrite, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: hub id, folder or GGUF file, and the hub revision."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False


def default_device() -> torch.device:
    """The first accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def as_device(device: torch.device | str | None) -> torch.device:
    """A device by its name, or the default one.

    Raises:
        ExpertokenError: there is no such device on this machine.
    """
    if device is None:
        return default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ExpertokenError(
            f"device {str(device)!r} can't be used here ({one_line(error)}); without it {default_device()} is taken"
        ) from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A type of weights by its name; `auto` stays.

    Raises:
        ExpertokenError: there is no such type.
    """
    found = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ExpertokenError(f"dtype {dtype!r}: expected float32, bfloat16, float16 or auto")
    return found


LOADING = threading.RLock()
"""Held while transformers or PEFT load weights: they change classes of torch meanwhile, for all threads, and two at a
time leave weights without data."""

QUANTIZATIONS = ("nf4", "int8")


def load_causal_lm(
    source: Source,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    attention: str | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal LM and its tokenizer from a hub id, a local folder or a GGUF file, in evaluation mode.

    Args:
        source: the model.
        device: where to; the first accelerator, or the CPU, where not given.
        dtype: of the weights. Where not given: float32 on a CPU (bfloat16 is many times slower there), else the dtype
            the model was saved in.
        quantization: of the linear layers by bitsandbytes: `nf4` (4 bits, double quantisation) or `int8`; the head
            stays as it is.
        attention: implementation; transformers' choice where not given.

    Raises:
        ExpertokenError: the model can't be loaded; the message says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = as_device(device)
    dtype = as_dtype(dtype or (torch.float32 if device.type == "cpu" else "auto"))
    path = Path(source.model).expanduser()
    if path.suffix == ".gguf":
        path = converted(path)
    elif not path.exists() and source.model.startswith((".", "/", "~")):
        raise ExpertokenError(f"{source.model}: no such folder; expected a hub id, a model folder or a GGUF file")
    where = str(path) if path.exists() else source.model
    options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    loading = {} if attention is None else {"attn_implementation": attention}
    if quantization:
        loading |= {"quantization_config": _quantized(quantization, device, dtype), "device_map": {"": device}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        with LOADING:
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options, **loading)
        model = _unpacked(model) if quantization else model.to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ExpertokenError(
                f"{source.model}: does not fit into the memory of {device}; try --dtype bfloat16, 4 bits (method "
                "qlora) or a smaller model"
            ) from error
        raise ExpertokenError(f"{source.model}: can't be loaded as a causal LM ({one_line(error)})") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ExpertokenError(
            f"{source.model}: a weights file is damaged ({one_line(error)}); fetch it again"
        ) from error
    return model.eval(), tokenizer


def _quantized(name: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    """The configuration of a quantisation.

    Raises:
        ExpertokenError: it is not known here.
        ImportError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if name not in QUANTIZATIONS:
        raise ExpertokenError(f"quantization: expected {' or '.join(QUANTIZATIONS)}, got {name!r}")
    require_extra("bitsandbytes", "train")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32 if device.type == "cpu" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _unpacked(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking weights on CPUs with AVX-512 at their first use.

    It does so in place, in evaluation mode only, for bfloat16 whatever dtype was asked for: the fingerprint, the
    decision and the training step after it would depend on the processor.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The chat tokenizer that is kept in a folder.

    Raises:
        ExpertokenError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged tokenizer.json is a bare Exception of the Rust library
        raise ExpertokenError(f"{folder}: its tokenizer can't be loaded ({one_line(error)})") from error


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids that end an answer."""
    known = model.generation_config.eos_token_id
    return {*([known] if isinstance(known, int) else known or ()), tokenizer.eos_token_id} - {None}


def share_weights(model: nn.Module) -> nn.Module:
    """A second model over the very same tensors: it can get a head or adapters of its own at the cost of a megabyte."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [tensor.quant_state for tensor in shared if getattr(tensor, "quant_state", None) is not None]
    return copy.deepcopy(model, memo={id(thing): thing for thing in shared})


def fingerprint(model: nn.Module) -> str:
    """A hash that tells models apart by content: every parameter's name, shape and 64 spread-out values.

    Values are compared in bfloat16, so that a model keeps its fingerprint when it is loaded wider than it was saved.
    Expert rows don't count: they are what changes while the model stays.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("expert_rows"):
            continue
        digest.update(f"{name}{tuple(full_shape(parameter))}".encode())
        with gathered([parameter]):
            flat = parameter.detach().flatten()
            count = min(64, flat.numel())
            places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
            digest.update(flat[places].to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def positions(model: "PreTrainedModel") -> int:
    """Tokens that a model was made for, prompt and answer together; very many where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group sequences of like length, longest first, so that a padded batch holds at most `max_tokens`.

    Longest first: what does not fit into memory fails at once and not after an hour. One sequence longer than
    `max_tokens` makes a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


class MetaLLM:
    """A causal LM whose head holds one row per expert.

    Args:
        model: the causal LM (its head is replaced by an `ExpertHead`).
        tokenizer: with a chat template.
        source: where the model came from, as composites record it.
        num_experts: K.
        quantization: of the model, or None.

    Attributes:
        vocab_size: V, the rows of the original head; expert k has the id `V + k`.
        plain: the same weights with the original head and without LoRA, for experts on the same base.
        base_fingerprint: of the model before anything was trained.
        transform: what the model does to logits behind its head.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        num_experts: int,
        quantization: str | None = None,
    ) -> None:
        self.plain = model
        self.quantization = quantization
        self.base_fingerprint = fingerprint(model)
        self.model = share_weights(model)
        self.tokenizer = tokenizer
        self.source = source
        self.vocab_size = full_shape(model.get_output_embeddings().weight)[0]
        self.transform = LogitTransform.of(model.config)
        install_head(self.model, num_experts)

    @classmethod
    def from_pretrained(
        cls,
        source: Source | str,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        attention: str | None = None,
    ) -> "MetaLLM":
        """Load a causal LM and give it `num_experts` expert rows (zeros). Arguments and errors as `load_causal_lm`."""
        source = Source(source) if isinstance(source, str) else source
        model, tokenizer = load_causal_lm(
            source, device=device, dtype=dtype, quantization=quantization, attention=attention
        )
        return cls(model, tokenizer, source, num_experts, quantization)

    @property
    def adapted(self) -> bool:
        """Whether LoRA is on the backbone, so that `model` is another model than `plain`."""
        return hasattr(self.model, "peft_config")

    @property
    def head(self) -> ExpertHead:
        """The head with the expert rows."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    @property
    def rows(self) -> torch.Tensor:
        """A copy of the expert rows, `[K, d]` float32 on the CPU."""
        return whole(self.head.expert_rows).float()

    @rows.setter
    def rows(self, rows: torch.Tensor) -> None:
        parameter = nn.Parameter(rows.to(self.device, torch.float32), requires_grad=self.head.expert_rows.requires_grad)
        self.head.expert_rows = parameter

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """LoRA's weights as PEFT names them in a file, whole, on the CPU (collective where weights are split)."""
        from peft import get_peft_model_state_dict

        named = {name: whole(p) for name, p in self.model.named_parameters() if "lora_" in name}
        return get_peft_model_state_dict(self.model, state_dict=named)

    def set_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put weights as `adapter_state` gives them into the adapter, in place (collective likewise).

        Raises:
            ExpertokenError: they are another adapter's.
        """
        named = {n.replace(".default.", "."): p for n, p in self.model.named_parameters() if "lora_" in n}
        differing = set(named) ^ set(state) or {k for k in named if full_shape(named[k]) != state[k].shape}
        if differing:
            raise ExpertokenError(f"the adapter's weights are of another model or rank (at {min(differing)})")
        for name, parameter in named.items():
            overwrite(parameter, state[name])

    def initial_row(self, description: str) -> torch.Tensor:
        """Where an expert's row starts, `[d]`; see `head.initial_row`."""
        return initial_row(self.plain, self.tokenizer(description, add_special_tokens=False).input_ids)

    def encode(self, conversation: str | Sequence[Message], most: int | None = None) -> list[int]:
        """Ids up to the dispatch position; see `chat.encode_chat`."""
        return encode_chat(self.tokenizer, conversation, self.vocab_size, placeholders=True, most=most)

    def pad(
        self, sequences: Sequence[Sequence[int]], device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """A left-padded batch: `input_ids` and `attention_mask`, `[N, T]` each, on the model's device or another.

        Left, so that all dispatch positions fall into one column and one row of logits per query is computed.
        """
        longest = max(map(len, sequences))
        # Which id pads does not matter: it is masked. 0 exists in every vocabulary, a pad token does not.
        ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in sequences])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
        device = device or self.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    @torch.inference_mode()
    def states(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What a decision depends on besides the rows: h `[N, d]` and Z `[N]`, float32 on the CPU.

        Raises:
            ExpertokenError: the model does something to its logits that `LogitTransform` does not know.
        """
        captured: list[torch.Tensor] = []
        # The batch is padded on the left, so the head sees one position per row: `[N, 1, d]`.
        hook = self.head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0][:, 0]))
        try:
            logits, _ = dispatch_forward(self.model, **self.pad(sequences))
        finally:
            hook.remove()
        hidden = captured[0]
        vocabulary = logits[:, : self.vocab_size].float()
        self._check_transform(hidden, vocabulary)
        return hidden.float().cpu(), vocabulary.logsumexp(-1).cpu()

    def _check_transform(self, hidden: torch.Tensor, vocabulary: torch.Tensor) -> None:
        sample = slice(0, 8)
        bias = 0 if self.head.bias is None else self.head.bias[sample].float()
        expected = self.transform(hidden.float() @ self.head.weight[sample].float().T + bias)
        tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        finite = vocabulary[:, sample].isfinite().all(1)  # the caller reports the others
        if not torch.allclose(expected[finite], vocabulary[finite, sample], rtol=tolerance, atol=tolerance * 10):
            raise ExpertokenError(
                f"{self.source.model}: its forward changes logits in a way that is not known here (neither a scale nor "
                "a soft cap); train with `--method lora`, which runs the forward itself"
            )

    @torch.inference_mode()
    def candidate_logits(self, sequences: Sequence[Sequence[int]], *, with_self: bool) -> torch.Tensor:
        """Logits over the candidates for a batch of encoded conversations, `[N, C]` float32 on the CPU."""
        logits, _ = dispatch_forward(self.model, **self.pad(sequences))
        return candidate_logits(logits, self.vocab_size, with_self=with_self).cpu()

    def load_adapter(self, folder: Path) -> None:
        """Put a PEFT LoRA adapter on the backbone (the head is left alone).

        Raises:
            ExpertokenError: the adapter does not fit the model.
        """
        from peft import PeftModel

        try:
            self.model = PeftModel.from_pretrained(self.model, folder).eval()
        except Exception as error:  # PEFT raises ValueError, RuntimeError, KeyError, SafetensorError, ... alike
            raise ExpertokenError(
                f"{folder}: the adapter does not fit {self.source.model} ({one_line(error)})"
            ) from error


def describe_dtype(model: nn.Module) -> str:
    """The dtype of a model's head, as composites record it."""
    return str(model.get_output_embeddings().weight.dtype).removeprefix("torch.")


def library_versions() -> dict[str, Any]:
    """Versions that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("expertoken", "torch", "transformers", "peft", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
