"""A composite as a plain checkpoint: LoRA merged, a row and a token for every expert, for any server to host."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tokenizers import AddedToken
from torch import nn

from .chat import control_tokens, encode_chat
from .composite import POOL_FILE, load_composite
from .dispatch import dispatch_distribution, dispatch_forward
from .errors import ExpertokenError
from .files import atomic_folder, check_product
from .head import output_head
from .loading import load_causal_lm
from .meta import MetaLLM
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXPORT_FILE = "expertoken_export.json"
GATEWAY_FILE = "gateway.example.yaml"
CONVERTER = "convert_hf_to_gguf.py"

PROMPTS = (
    "What is 2 + 2?",
    "Name a river in Peru.",
    "Write a SQL query that counts the customers of each city.",
    "Is an oral contract binding? Explain in two sentences.",
    "Translate 'good morning' into French, Spanish and German.",
    "A train leaves at 9:40 and arrives at 12:15. How long does it take?",
    "def fib(n):\n    # complete this function",
    "Which drug interacts with grapefruit juice, and why?",
)
"""What an exported checkpoint is asked beside the composite where nothing else is given."""

_NEGLIGIBLE = 1e-6  # share of the vocabulary's mass
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a probability


def export_checkpoint(
    folder: Path | str,
    out: Path | str,
    *,
    prompts: Sequence[str] = PROMPTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Write a plain Hugging Face checkpoint whose next-token distribution dispatches as the composite does.

    Expert k is the token `<|expert:NAME|>`. Rows that the vocabulary has to spare are used where the model gives them
    no probability; else the vocabulary is resized. The written folder is loaded again and compared on the prompts
    before it takes its place.

    Args:
        folder: of the composite.
        out: of the checkpoint.
        prompts: to compare on; real ones of the users are best.
        device: where that runs.
        dtype: of the weights; as `load_composite` chooses where None.
        trust_remote_code: allow the base model's repository to run its own code.

    Returns:
        the token ids by expert.

    Raises:
        ExpertokenError: the composite can't be exported, or the checkpoint came to other decisions (nothing is written
            then).
    """
    out = Path(out)
    check_product(out, "checkpoint")
    composite = load_composite(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    meta, pool = composite.meta, composite.pool
    if meta.quantization:
        raise ExpertokenError(
            f"{folder}: was trained on a base in 4 bits, and LoRA can't be merged into it without other decisions; "
            "serve it by `expertoken serve`, or train with --method lora"
        )
    with torch.inference_mode():
        logits = torch.cat([dispatch_forward(meta.model, **meta.pad([meta.encode(text)]))[0] for text in prompts])
    expected = dispatch_distribution(logits, meta.vocab_size, with_self=pool.has_self).cpu()
    rows = meta.rows
    _fill(meta, logits, len(pool))
    model = _merged(meta)
    places = _place(model, meta.tokenizer, [expert.token for expert in pool], rows)
    with atomic_folder(out) as aside:
        model.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):  # written for its owner alone, and served by somebody else
            shutil.copymode(aside / "config.json", file)
        meta.tokenizer.save_pretrained(aside)
        pool.to_yaml(aside / POOL_FILE)
        ids = dict(zip((expert.name for expert in pool), places, strict=True))
        document = {"experts": ids, "self": pool.self_name}
        (aside / EXPORT_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        _write_gateway(aside, out.name, ids, control_tokens(meta.tokenizer))
        _compare(aside, places, prompts, expected, meta)
    return ids


def _write_gateway(folder: Path, name: str, ids: dict[str, int], control: list[str]) -> None:
    """A gateway's file to begin with: where the servers are is the operator's to say."""
    meta = {
        "model": name,
        "base_url": "http://127.0.0.1:8000/v1",
        "top_logprobs": 20,
        "token_ids": ids,
        "control_tokens": control,
    }
    pool = yaml.safe_load((folder / POOL_FILE).read_text("utf-8"))
    document = yaml.safe_dump({"meta": meta} | pool, sort_keys=False, allow_unicode=True)
    head = (
        "# Copy this file, put experts that are no endpoints behind servers of their own (docs/deploy.md), and fill\n"
        "# in all addresses. `expertoken serve` of the copy needs no models of its own.\n"
    )
    (folder / GATEWAY_FILE).write_text(head + document, "utf-8")


def _fill(meta: MetaLLM, logits: torch.Tensor, count: int) -> None:
    """Where the next `count` rows behind the tokenizer's are part of the mass of self, name all that are left.

    A row that an expert takes is lost to self; a model that gives such rows some probability (one that was never
    trained, for instance) would decide otherwise without it. So the experts' come behind them then.
    """
    first, size = len(meta.tokenizer), meta.vocab_size
    spare = logits[:, :size].float().softmax(-1)[:, first : first + count].sum(-1).max()
    if first < size and (first + count > size or spare > _NEGLIGIBLE):
        names = [AddedToken(f"<|unused:{place}|>", special=True, normalized=False) for place in range(first, size)]
        meta.tokenizer.add_tokens(names, special_tokens=True)


def _merged(meta: MetaLLM) -> "PreTrainedModel":
    """The meta LLM's model with LoRA in its weights and its own head. `meta` is of no use after it."""
    model: Any = meta.model
    if meta.adapted:
        model = model.merge_and_unload()
    head = output_head(model)
    plain = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    model.set_output_embeddings(plain)
    return model


@torch.no_grad()
def _place(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: list[str], rows: torch.Tensor
) -> list[int]:
    """Put tokens into the tokenizer and rows into the head; gives their ids."""
    size = output_head(model).weight.shape[0]
    known = set(tokenizer.get_vocab())
    taken = [token for token in tokens if token in known]
    if taken:
        raise ExpertokenError(f"the tokenizer knows {', '.join(taken)} already; rename the expert")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    found: Any = tokenizer.convert_tokens_to_ids(tokens)
    places: list[int] = found
    if max(places) >= size:
        model.resize_token_embeddings(max(places) + 1, mean_resizing=False)
    head = output_head(model)
    inputs: Any = model.get_input_embeddings()
    where = torch.tensor(places, device=head.weight.device)
    if inputs.weight is not head.weight:
        # Never read by a composite; a server whose user types such a token reads something harmless.
        others = torch.ones(len(inputs.weight), dtype=torch.bool, device=inputs.weight.device)
        others[where] = False
        inputs.weight[where] = inputs.weight[others].float().mean(0).to(inputs.weight.dtype)
    head.weight[where] = rows.to(head.weight)
    if head.bias is not None:
        head.bias[where] = 0
    return places


def _compare(folder: Path, places: list[int], prompts: Sequence[str], expected: torch.Tensor, meta: MetaLLM) -> None:
    """Load what was written as anybody would, and ask it.

    Raises:
        ExpertokenError: it comes to other decisions.
    """
    source = Source(str(folder), trust_remote_code=meta.source.trust_remote_code)
    dtype = output_head(meta.plain).weight.dtype
    model, tokenizer = load_causal_lm(source, device=meta.device, dtype=dtype)
    tolerance = _TOLERANCE.get(dtype, max(_TOLERANCE.values()))
    size = output_head(model).weight.shape[0]
    order = [*sorted(set(range(size)) - set(places)), *places]
    for prompt, wanted in zip(prompts, expected, strict=True):
        batch = torch.tensor([encode_chat(tokenizer, prompt, size)], device=meta.device)
        with torch.inference_mode():
            logits, _ = dispatch_forward(model, batch, torch.ones_like(batch))
        with_self = len(wanted) > len(places)
        found = dispatch_distribution(logits[:, order].cpu(), len(order) - len(places), with_self=with_self)[0]
        worst = float((found - wanted).abs().max())
        lost = float(wanted.max() - wanted[found.argmax()])  # of probability, where another candidate is chosen
        if worst > tolerance or lost > tolerance:
            name = prompt if len(prompt) < 60 else prompt[:60] + "..."
            raise ExpertokenError(
                f"the exported checkpoint decides otherwise on {name!r}: a probability differs by {worst:.3g}, at most "
                f"{tolerance:g} is rounding; nothing was written"
            )


def find_converter() -> str:
    """Where llama.cpp's converter is.

    Raises:
        ExpertokenError: it is not installed.
    """
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise ExpertokenError(
            f"{CONVERTER} of llama.cpp is not on the PATH; get llama.cpp, install its requirements, and add its folder"
        )
    return converter


def convert_to_gguf(folder: Path | str, out: Path | str) -> None:
    """Convert an exported checkpoint with llama.cpp's converter.

    Raises:
        ExpertokenError: the converter is not installed, or fails.
    """
    command = [sys.executable, find_converter(), str(folder), "--outfile", str(out), "--outtype", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own tool
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExpertokenError(f"{CONVERTER} failed: {last}")
