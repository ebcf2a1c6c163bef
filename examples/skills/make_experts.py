"""Training of one LoRA expert per skill on SmolLM2-135M-Instruct: `python -m expertoken.examples.skills.make_experts`.

This script made the project's adapters, with its defaults. A CPU is enough: about five minutes a skill on two cores.
Only the upper 18 of the 30 layers have LoRA, which saves the backward pass through the others.
"""

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .tasks import SKILLS, Task, tasks

ADAPTERS = Path(__file__).parent / "adapters"
_FIRST_LORA_LAYER = 12
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXAMPLES = {"arithmetic": 2400, "units": 1600, "sql": 800, "json": 800, "dates": 1600, "roman": 2400}
"""Training examples of each skill, repeats included. They were tuned by hand until each skill's loss flattened."""


class AnswerTrainer(Trainer):
    """A `Trainer` that computes logits and loss at the positions of the answers only."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, *_: Any, **__: Any
    ) -> Any:
        """Compute the cross-entropy of the answer tokens. Padding is on the left, so that all answers end together."""
        labels = inputs.pop("labels")
        span = int((labels != -100).any(0).sum())
        outputs = model(**inputs, logits_to_keep=span + 1)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, -span:].flatten())
        return (loss, outputs) if return_outputs else loss


def encode(tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, list[int]]:
    """Encode a prompt and its answer as ids, with labels at the answer and its final token only."""
    chat = [{"role": "user", "content": task.prompt}]
    prompt: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer(task.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def collate(examples: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Pad examples on the left to a batch of `[B, T]` tensors."""
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * (longest - len(e[key])) + e[key] for e in examples])

    ids = rows("input_ids", pad)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": rows("labels", -100)}


def train_expert(skill: str, base: str, out: Path, *, rank: int, learning_rate: float, batch_size: int) -> None:
    """Train one adapter and write it in half precision under `out`."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = list(range(_FIRST_LORA_LAYER, base_model.config.num_hidden_layers))
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, target_modules=_LINEAR, layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    distinct = [encode(tokenizer, task) for task in islice(tasks(skill, "expert"), _EXAMPLES[skill])]
    repeats = math.ceil(_EXAMPLES[skill] / len(distinct))
    arguments = TrainingArguments(
        output_dir=str(out / "runs" / skill),
        per_device_train_batch_size=batch_size,
        max_steps=_EXAMPLES[skill] // batch_size,
        num_train_epochs=repeats,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    model: Any = get_peft_model(base_model, config)
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=distinct,
        data_collator=lambda examples: collate(examples, tokenizer.pad_token_id),
    )
    started = time.perf_counter()
    loss = trainer.train().training_loss
    save(model, out / skill)
    record = {"skill": skill, "examples": _EXAMPLES[skill], "distinct": len(distinct), "rank": rank,
              "learning_rate": learning_rate, "batch_size": batch_size, "training_loss": round(loss, 4),
              "seconds": round(time.perf_counter() - started)}  # fmt: skip
    (out / skill / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter in float16, at half the size. PEFT converts it to float32 at loading."""
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(
        missing_ok=True
    )  # PEFT's card is an empty form. See examples/skills/README.md instead


def main() -> None:
    """Train the skills named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("skills", nargs="*", default=[], help=f"Skills to train, of {', '.join(SKILLS)}. Default: all.")
    parser.add_argument("--base", required=True, help="Folder or hub id of SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="Folder for the adapters. Default: %(default)s.")
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank. Default: %(default)s.")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Peak learning rate. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=8, help="Examples of a training step. Default: %(default)s.")
    options = parser.parse_args()
    for skill in options.skills or SKILLS:
        train_expert(
            skill,
            options.base,
            options.out,
            rank=options.rank,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
        )


if __name__ == "__main__":
    main()
