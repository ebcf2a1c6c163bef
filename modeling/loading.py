"""Loading of models: devices, types of weights, quantization, and errors."""

import copy
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import ExpertokenError, is_out_of_memory, one_line, require_extra
from .from_gguf import converted
from .sight import Sight, sees
from .source import DTYPES, QUANTIZATIONS, Source, is_path, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def default_device() -> torch.device:
    """Return the first accelerator, or the CPU if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def as_device(device: torch.device | str | None) -> torch.device:
    """Return a device by its name, or the default device for None.

    Raises:
        ExpertokenError: This machine has no such device.
    """
    if device is None:
        return default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ExpertokenError(
            f"device {str(device)!r} can't be used on this machine ({one_line(error)}). Omit it to use "
            f"{default_device()}"
        ) from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Return a type of weights by its name. `auto` is returned unchanged.

    Raises:
        ExpertokenError: No type has this name.
    """
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ExpertokenError(f"dtype: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    return found


LOADING = threading.RLock()
"""Lock for loading weights with transformers or PEFT. They patch classes of torch meanwhile, for all threads, and two
loads at a time leave weights without data."""


def load_causal_lm(
    source: Source,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    attention: str | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal LM and its tokenizer from a hub id, a local folder or a GGUF file, in evaluation mode.

    A model that reads pictures is loaded with its processor, which the tokenizer carries. See `chat.sight_of`.

    Args:
        source: Source of the model.
        device: Device to load the model on. Defaults to the first accelerator, or the CPU if there is none.
        dtype: Type of the weights. Defaults to float32 on a CPU (bfloat16 is many times slower there), and to the dtype
            of the saved model elsewhere.
        quantization: Quantization of the linear layers by bitsandbytes: `nf4` (4 bits, double quantization) or `int8`.
            The head is never quantized.
        attention: Implementation of attention. Defaults to transformers' choice.

    Raises:
        ExpertokenError: The model can't be loaded. The message names the reason.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    device = as_device(device)
    dtype = as_dtype(dtype or (torch.float32 if device.type == "cpu" else "auto"))
    path = local_path(source.model)
    if path.suffix == ".gguf":
        path = converted(path)
    elif not path.exists() and is_path(source.model):
        raise ExpertokenError(
            f"{source.model}: expected a hub id, a model folder or a GGUF file, got a path that does not exist"
        )
    where = str(path) if path.exists() else source.model
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    loading: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantization:
        loading["quantization_config"] = _quantized(quantization, device, dtype)
    if quantization or _loads_directly(device):
        loading["device_map"] = {"": device}
    try:
        seeing = sees(AutoConfig.from_pretrained(where, **options))
        tokenizer = _tokenizer(where, seeing=seeing, **options)
        family: Any = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
        with LOADING:
            model: Any = family.from_pretrained(where, dtype=dtype, **options, **loading)
        model = _unpacked(model) if quantization else model.to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ExpertokenError(
                f"{source.model}: does not fit into the memory of {device}. Try --dtype bfloat16, 4 bits (method "
                "qlora) or a smaller model"
            ) from error
        raise ExpertokenError(f"{source.model}: can't be loaded as a causal LM ({one_line(error)})") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ExpertokenError(
            f"{source.model}: a weights file is damaged ({one_line(error)}). Download it again"
        ) from error
    return model.eval(), tokenizer


def _loads_directly(device: torch.device) -> bool:
    """Check whether weights can be read straight to a device.

    Otherwise eight processes hold eight copies in main memory. When DeepSpeed splits weights while loading, it moves
    them to the device itself.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    return device.type == "cuda" and not is_deepspeed_zero3_enabled()


def _quantized(name: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    """Return the configuration of a quantization.

    Raises:
        ExpertokenError: The quantization is unknown.
        ImportError: Bitsandbytes is not installed.
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
    """Prevent bitsandbytes from repacking weights on CPUs with AVX-512 at their first use.

    It repacks in place, in evaluation mode only, for bfloat16 whatever the requested dtype. The fingerprint, the
    decision and the next training step would then depend on the processor.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - torch types a module's attributes
    return model


def _tokenizer(where: str | Path, *, seeing: bool, **options: Any) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return (
        Sight.from_pretrained(where, **options).tokenizer if seeing else AutoTokenizer.from_pretrained(where, **options)
    )


def load_tokenizer(folder: Path, *, seeing: bool = False, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the chat tokenizer of a folder.

    Args:
        folder: Folder of the tokenizer.
        seeing: True for a model that reads pictures, whose folder holds a processor too.
        trust_remote_code: If true, the folder may run its own code.

    Raises:
        ExpertokenError: The folder has no tokenizer, or a damaged one.
    """
    try:
        return _tokenizer(folder, seeing=seeing, trust_remote_code=trust_remote_code)
    except ExpertokenError:
        raise
    except Exception as error:  # for a damaged tokenizer.json the Rust library raises a bare Exception
        raise ExpertokenError(f"{folder}: its tokenizer can't be loaded ({one_line(error)})") from error


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that end an answer."""
    known = model.generation_config.eos_token_id
    return {*([known] if isinstance(known, int) else known or ()), tokenizer.eos_token_id} - {None}


def share_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a second model over the same tensors, whose own head or adapters cost a megabyte."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [tensor.quant_state for tensor in shared if getattr(tensor, "quant_state", None) is not None]
    return copy.deepcopy(model, memo={id(thing): thing for thing in shared})


def context_length(model: "PreTrainedModel") -> int:
    """Return the longest context of a model in tokens, prompt and answer together, or 2**31 if it names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
