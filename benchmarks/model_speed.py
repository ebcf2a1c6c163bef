"""Tokens a second and share of the peak for models of real shapes: `python benchmarks/model_speed.py --shape llama-8b`.

The model has random weights in bfloat16 and runs on the GPU, if there is one. Two operations are timed: the forward
pass of method tokens over its queries, and lora's training step with and without gradient checkpointing. The peak is
the best rate of a large matrix product in the same run and dtype, so that no vendor's figure is needed.

The work is the model's own. Recomputation under checkpointing does not count. A weight and token take two operations
forward and two more backward, because frozen weights have no gradient. Attention's products are added.
"""

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from expertoken.modeling.dispatch import candidate_logits, dispatch_forward
from expertoken.modeling.head import install_head

EXPERTS = 7


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama-like model: width, layers, heads, heads of keys and values, width of the MLP, vocabulary."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int

    def model(self, device: torch.device, attention: str) -> Any:
        """Create a model of this shape with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.mlp, vocab_size=self.vocabulary,
            tie_word_embeddings=False, max_position_embeddings=8192,
        )  # fmt: skip
        config._attn_implementation = attention
        with device:
            torch.set_default_dtype(torch.bfloat16)
            try:
                return LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(torch.float32)

    def operations(self, length: int) -> float:
        """Count the operations of a token's forward pass through the layers.

        The head is not counted, because it reads one position of each query.
        """
        head = self.width // self.heads
        weights = self.width * (2 * self.width + 2 * self.kv_heads * head + 3 * self.mlp)
        return self.layers * (2 * weights + 2 * 2 * self.width * length / 2)


SHAPES = {
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, 49152),
    "qwen-7b": Shape(3584, 28, 28, 4, 18944, 152064),
    "llama-8b": Shape(4096, 32, 32, 8, 14336, 128256),
}


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest run, after one warm-up run."""

    def once() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    return min(once() for _ in range(repeats))


def peak(device: torch.device, repeats: int) -> float:
    """Measure the operations a second of a large matrix product in bfloat16."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats)


def memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: the GPU's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Parse the command line, measure the model and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, default="smollm2-135m", help="Shape of the model. Default: %(default)s."
    )
    parser.add_argument("--length", type=int, default=512, help="Tokens of a query. Default: %(default)s.")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="Tokens in a batch of the forward pass. Default: %(default)s."
    )
    parser.add_argument("--batch", type=int, default=8, help="Queries of a training step. Default: %(default)s.")
    parser.add_argument("--repeats", type=int, default=5, help="Number of timed runs. Default: %(default)s.")
    parser.add_argument("--attention", default="sdpa", help="Implementation of attention. Default: %(default)s.")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, length = SHAPES[options.shape], options.length
    best = peak(device, options.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {best / 1e12:.2f} TFLOP/s in the fastest matrix product\n")
    print("| | tokens/s | share of the peak | peak GiB |\n|---|---|---|---|")

    def tell(what: str, seconds: float, count: int, factor: float) -> None:
        rate = count / seconds
        share = factor * shape.operations(length) * rate / best
        print(f"| {what} | {rate:,.0f} | {share:.1%} | {memory(device):.1f} |", flush=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    model = shape.model(device, options.attention)
    install_head(model, EXPERTS)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def inputs(count: int) -> dict[str, Any]:
        ids = torch.randint(shape.vocabulary, (count, length), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    questions = inputs(max(1, options.tokens // length))

    @torch.inference_mode()
    def states() -> None:
        dispatch_forward(model, **questions)

    tell("pass of method tokens", seconds_of(states, device, options.repeats), questions["input_ids"].numel(), 1)

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    adapted.get_output_embeddings().expert_rows.requires_grad_(True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    batch, labels = inputs(options.batch), torch.randint(EXPERTS, (options.batch,), device=device)

    def step() -> None:
        logits, _ = dispatch_forward(adapted, **batch)
        F.cross_entropy(candidate_logits(logits, shape.vocabulary), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for checkpointing in (True, False):  # the step with less memory first, because a process's peak only grows
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        else:
            adapted.activation_checkpointing_disable()
        what = f"step of lora{', gradient checkpointing' if checkpointing else ''}"
        tell(what, seconds_of(step, device, options.repeats), batch["input_ids"].numel(), 2)


if __name__ == "__main__":
    main()
