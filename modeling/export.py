"""Export of a composite as a plain checkpoint for any server: LoRA merged, a row and a token for every expert.

A composite compares candidates with self's row, a checkpoint compares tokens with the vocabulary's mass Z. Expert k's
token needs the logit `Z + l_k - l_self`, and Z is not linear in the state. So Z is distilled into the rows by a ridge
regression on the states of real questions, and checked on others. A gateway lacks what the checkpoint can't carry, such
as chances of being right.

If the rows read a lower layer, the checkpoint is the model cut there. It only decides, and its own text means nothing.
So self has a token too, and answers behind a separate server.
"""

import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from tokenizers import AddedToken
from torch import nn

from .chat import Message, control_tokens, sight_of, text_of
from .composite import POOL_FILE, load_composite
from .dispatch import dispatch_forward
from .errors import ExpertokenError
from .experts import Expert
from .files import atomic_folder, check_product
from .head import output_head
from .inputs import padded
from .loading import load_causal_lm
from .meta import MetaLLM
from .pool import ExpertPool
from .source import Source
from .states import States, cached_states, encode_all, state_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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
"""Default prompts for the comparison of an exported checkpoint with the composite."""

_NEGLIGIBLE = 1e-6  # share of the vocabulary's mass
_NEAR = 0.05  # loss of probability up to which another candidate counts as the same decision
_DIFFERENT = 0.02  # share of decisions that may differ by more
_ABOVE = 8.0  # nats by which the experts' mass exceeds the vocabulary's if self is no candidate
_RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # relative to the states' mean square
_CHECKED = 5  # every n-th prompt is held out of the distillation, for the check
_FEW = 50  # with fewer prompts none is held out


def export_checkpoint(
    folder: Path | str,
    out: Path | str,
    *,
    prompts: Sequence[str | Sequence[Message]] = PROMPTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Write a plain Hugging Face checkpoint whose next-token distribution dispatches as the composite does.

    Expert k is the token `<|expert:NAME|>`. Spare rows of the vocabulary are used if the model gives them no
    probability. Otherwise the vocabulary is resized. Before the written folder is renamed into place, it is loaded
    again. Its decisions are compared on every fifth prompt, which is held out of the distillation.

    Args:
        folder: Folder of the composite.
        out: Folder of the checkpoint.
        prompts: Questions or conversations for the distillation and the comparison, taken from the training or from the
            users. Fewer than 50 are all used for both, with a warning.
        device: Device to run the export on. Defaults to the first accelerator, or the CPU if there is none.
        dtype: Type of the weights. Defaults to the choice of `load_composite`.
        trust_remote_code: If true, the base model's repository may run its own code.

    Returns:
        Token ids by expert.

    Raises:
        ExpertokenError: The composite can't be exported, or the checkpoint's decisions differ. Then nothing is written.
    """
    out = Path(out)
    check_product(out, "checkpoint")
    composite = load_composite(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    meta, pool = composite.meta, composite.pool
    if meta.quantization:
        raise ExpertokenError(
            f"{folder}: expected an unquantized base, got one in 4 bits, into which LoRA can't be merged without "
            "changing decisions. Serve it by `expertoken serve`, or train with --method lora"
        )
    if meta.state.pooling != "last":
        raise ExpertokenError(
            f"{folder}: expected a decision that reads the last token, as a checkpoint's next token does, got a mean "
            f"over all tokens (--state {meta.state}). Serve it by `expertoken serve`, or train with --state head or "
            "LAYER:last"
        )
    if meta.state.layer is not None:
        pool = _without_self(pool, meta)
    if len(prompts) < _FEW:
        logger.warning(
            "the rows are distilled from %d prompts and checked on the same ones. Pass %d or more", len(prompts), _FEW
        )
    queries = encode_all(meta, prompts, "export")
    states = cached_states(meta, queries, label="export")
    wanted = state_logits(meta.rows, states, meta.transform)
    checked = np.arange(len(queries)) % _CHECKED == 0
    fitted = ~checked
    if len(queries) < _FEW:
        checked = fitted = np.ones(len(queries), dtype=bool)
    vocabulary = _vocabulary(meta)
    if meta.state.layer is not None:
        parts = (states.hidden[start : start + _FEW] for start in range(0, len(states), _FEW))
        mass = torch.cat([vocabulary(part).logsumexp(-1) for part in parts])
        states = replace(states, log_mass=mass.numpy())
    rows = _distilled(meta, pool, states, wanted, fitted)
    _fill(meta, vocabulary(states.hidden[:_FEW]), len(pool))
    model = _merged(meta)
    places = _place(model, meta.tokenizer, [expert.token for expert in pool], rows)
    with atomic_folder(out) as aside:
        model.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):  # written readable for its owner alone, but served by another user
            shutil.copymode(aside / "config.json", file)
        (meta.tokenizer if meta.sight is None else meta.sight.processor).save_pretrained(aside)
        pool.to_yaml(aside / POOL_FILE)
        ids = dict(zip((expert.name for expert in pool), places, strict=True))
        _write_gateway(aside, out.name, ids, control_tokens(meta.tokenizer))
        chosen = np.flatnonzero(checked)
        asked = [prompts[int(row)] for row in chosen]
        agreed = _compare(aside, places, asked, wanted[chosen].softmax(-1), meta)
        document = {"experts": ids, "self": pool.self_name, "checked_on": len(asked), "decisions_equal": agreed}
        (aside / EXPORT_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    return ids


def _without_self(pool: ExpertPool, meta: MetaLLM) -> ExpertPool:
    """Return a pool in which self is an ordinary expert on the base model, under an unused name."""
    if pool.self_expert is None:
        return pool
    given, taken = pool.self_expert, set(pool.names)
    name = next(
        name for name in itertools.chain(("meta",), map("meta{}".format, itertools.count(2))) if name not in taken
    )
    own = Expert(name, model=meta.source.model, description=given.description, cost=given.cost)
    logger.info("self becomes the expert %s in the exported pool", name)
    return ExpertPool([*pool, own])


def _vocabulary(meta: MetaLLM) -> Callable[[np.ndarray], torch.Tensor]:
    """Return a function from states `[N, d]` to the vocabulary's logits `[N, V]`, float32 on the CPU."""
    head = meta.head
    weight, bias = head.weight.detach().float().cpu(), None if head.bias is None else head.bias.detach().float().cpu()
    return lambda hidden: meta.transform(F.linear(torch.from_numpy(np.array(hidden)), weight, bias))


def _distilled(
    meta: MetaLLM, pool: ExpertPool, states: States, wanted: torch.Tensor, fitted: np.ndarray
) -> torch.Tensor:
    """Return rows `[K, d]` for the vocabulary whose logits approximate `Z + l_k - l_self` as well as rows can.

    Args:
        meta: Meta LLM.
        pool: Pool of the candidates.
        states: States of the prompts.
        wanted: Logits of the candidates on the prompts, `[N, C]`.
        fitted: Mask `[N]` of the prompts to fit on.

    Raises:
        ExpertokenError: The model caps its logits below the values that the expert tokens need.
    """
    hidden, mass = (torch.from_numpy(np.array(array)).double() for array in (states.hidden, states.log_mass))
    wanted = wanted.double()
    experts = wanted[:, : len(pool)]
    reference = wanted[:, -1] if pool.has_self else experts.logsumexp(-1) - _ABOVE
    targets = mass[:, None] + experts - reference[:, None]
    products = meta.transform.inverse(targets)
    if not products.isfinite().all():
        raise ExpertokenError(
            f"{meta.source.model} caps its logits at {meta.transform.softcap:g}, but its own tokens reach "
            f"{mass.max():.1f}, so that no expert token could be more probable. Serve it by `expertoken serve`"
        )
    # The rows already hold the differences among the experts, exactly if nothing is capped. Only the common part is
    # fitted.
    base = meta.rows[: len(pool)].double()
    left = products - hidden @ base.T
    inside = torch.from_numpy(np.flatnonzero(fitted))
    folds = (inside[::2], inside[1::2]) if len(inside) > 1 else (inside, inside)
    errors = {}
    for ridge in _RIDGES:
        halves = zip(folds, reversed(folds), strict=True)
        errors[ridge] = sum(
            float((hidden[other] @ _ridge(hidden[half], left[half], ridge) - left[other]).square().mean())
            for half, other in halves
        )
    best = min(errors, key=errors.__getitem__)
    return (base + _ridge(hidden[inside], left[inside], best).T).float()


def _ridge(hidden: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the ridge solution `[d, K]`."""
    gram = hidden.T @ hidden
    gram.diagonal().add_(strength * gram.trace() / len(gram))
    return torch.linalg.solve(gram, hidden.T @ targets)


def _write_gateway(folder: Path, name: str, ids: dict[str, int], control: list[str]) -> None:
    """Write an example of a gateway's file, in which the operator fills in the addresses of the servers."""
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
        "# Copy this file, put experts that are no endpoints behind servers of their own (docs/guides/deploy.md), and\n"
        "# fill in all addresses. `expertoken serve` of the copy needs no models of its own.\n"
    )
    (folder / GATEWAY_FILE).write_text(head + document, "utf-8")


def _fill(meta: MetaLLM, logits: torch.Tensor, count: int) -> None:
    """Name all spare rows in the tokenizer if the next `count` of them are part of self's mass.

    A row that an expert takes is lost to self. Some models give spare rows a probability (an untrained model, for
    instance), and would decide differently without it. Naming the spare rows puts the experts' rows behind them.
    """
    first, size = len(meta.tokenizer), meta.vocab_size
    spare = logits[:, :size].float().softmax(-1)[:, first : first + count].sum(-1).max()
    if first < size and (first + count > size or spare > _NEGLIGIBLE):
        names = [AddedToken(f"<|unused:{place}|>", special=True, normalized=False) for place in range(first, size)]
        meta.tokenizer.add_tokens(names, special_tokens=True)


def _merged(meta: MetaLLM) -> "PreTrainedModel":
    """Return the meta LLM's model with LoRA merged and its own head. `meta` is unusable afterwards."""
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
    """Add tokens to the tokenizer and rows to the head, and return the ids."""
    size = output_head(model).weight.shape[0]
    known = set(tokenizer.get_vocab())
    taken = [token for token in tokens if token in known]
    if taken:
        raise ExpertokenError(
            f"expected new expert tokens, but the tokenizer has {', '.join(taken)}. Rename the expert"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    found: Any = tokenizer.convert_tokens_to_ids(tokens)
    places: list[int] = found
    if max(places) >= size:
        model.resize_token_embeddings(max(places) + 1, mean_resizing=False)
    head = output_head(model)
    inputs: Any = model.get_input_embeddings()
    where = torch.tensor(places, device=head.weight.device)
    if inputs.weight is not head.weight:
        # A composite never reads these embeddings. The mean is harmless on a server whose user types such a token.
        others = torch.ones(len(inputs.weight), dtype=torch.bool, device=inputs.weight.device)
        others[where] = False
        inputs.weight[where] = inputs.weight[others].float().mean(0).to(inputs.weight.dtype)
    head.weight[where] = rows.to(head.weight)
    if head.bias is not None:
        head.bias[where] = 0
    return places


def _compare(
    folder: Path,
    places: list[int],
    prompts: Sequence[str | Sequence[Message]],
    expected: torch.Tensor,
    meta: MetaLLM,
) -> float:
    """Load the written checkpoint like any other, run it on the prompts, and return the share of equal decisions.

    Raises:
        ExpertokenError: Too many decisions differ.
    """
    source = Source(str(folder), trust_remote_code=meta.source.trust_remote_code)
    dtype = output_head(meta.plain).weight.dtype
    model, tokenizer = load_causal_lm(source, device=meta.device, dtype=dtype)
    size = output_head(model).weight.shape[0]
    ordinary = sorted(set(range(size)) - set(places))
    different: list[str | Sequence[Message]] = []
    for prompt, wanted in zip(prompts, expected, strict=True):
        query = meta.view.read(tokenizer, prompt, size, meta.positions - 1)
        batch = padded([query], sight_of(tokenizer), meta.device, model.dtype)
        with torch.inference_mode():
            logits, _ = dispatch_forward(model, **batch)
        found = logits[0, places].float().cpu()
        if len(wanted) > len(places):  # self's probability is that of the ordinary vocabulary
            found = torch.cat([found, logits[0, ordinary].float().logsumexp(-1, keepdim=True).cpu()])
        # Without self the next token must be an expert token.
        silent = len(wanted) == len(places) and bool(logits[0, ordinary].float().max().cpu() > found.max())
        if silent or float(wanted.max() - wanted[found.argmax()]) > _NEAR:
            different.append(prompt)
    share = len(different) / len(prompts)
    if share > _DIFFERENT:
        prompt = different[0] if isinstance(different[0], str) else text_of(different[0][-1], placeholders=True)
        name = prompt if len(prompt) < 60 else prompt[:60] + "..."
        raise ExpertokenError(
            f"the exported checkpoint decides differently on {share:.1%} of {len(prompts)} prompts (for instance "
            f"{name!r}), and at most {_DIFFERENT:.0%} are accepted, so nothing is written. Pass more --prompts, or "
            "serve the composite by `expertoken serve`"
        )
    return 1 - share


def find_converter() -> str:
    """Return the path of llama.cpp's converter.

    Raises:
        ExpertokenError: The converter is not installed.
    """
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise ExpertokenError(
            f"{CONVERTER} of llama.cpp is not on the PATH. Download llama.cpp, install its requirements, and add its "
            "folder to the PATH"
        )
    return converter


def convert_to_gguf(folder: Path | str, out: Path | str) -> None:
    """Convert an exported checkpoint with llama.cpp's converter.

    Raises:
        ExpertokenError: The converter is not installed, or fails.
    """
    command = [sys.executable, find_converter(), str(folder), "--outfile", str(out), "--outtype", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own tool
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExpertokenError(f"{CONVERTER} failed: {last}")
