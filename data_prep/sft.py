"""Export of a supervision as chat data: TRL reads it directly, LLaMA-Factory through `dataset_info.json`."""

import json
from pathlib import Path

from ..modeling.chat import apart, text_of
from ..modeling.files import atomic_folder, check_product
from .supervision import Supervision

_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def export_sft(supervision: Supervision, out: Path | str) -> dict[str, int]:
    """Write `train.jsonl`, `validation.jsonl`, `dataset_info.json` and `tokens.json` (to add to the tokenizer).

    The answer to each query is the token of its expert. Queries whose target is self, or whose weight is 0, are left
    out, because they have no token. Of several winners the first in pool order is taken.

    Args:
        supervision: Supervision with one-hot or soft targets.
        out: Folder to write.

    Returns:
        Number of lines by file.

    Raises:
        ExpertokenError: The folder holds a composite or a supervision.
    """
    check_product(out, "chat data")
    names = supervision.info.candidates
    tokens = {expert.name: expert.token for expert in supervision.pool}
    counts = {}
    with atomic_folder(out) as folder:
        info = {}
        for name in ("train", "validation"):
            if not supervision.info.sizes.get(name):
                continue
            side = supervision.side(name)
            targets, _, weights = supervision.arrays(name)
            lines = []
            for row, (target, weight) in enumerate(zip(targets, weights, strict=True)):
                winner = names[int(target.argmax())]
                if weight == 0 or winner not in tokens:
                    continue
                asked = [
                    {"role": m["role"], "content": apart(text_of(m, placeholders=True))} for m in side[row]["messages"]
                ]
                messages = [*asked, {"role": "assistant", "content": tokens[winner]}]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
            if not lines:  # loaders cannot read an empty file
                continue
            file = f"{name}.jsonl"
            (folder / file).write_text("\n".join(lines) + "\n", "utf-8")
            info[f"expertoken_{name}"] = {
                "file_name": file, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _TAGS,
            }  # fmt: skip
            counts[file] = len(lines)
        (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", "utf-8")
        (folder / "tokens.json").write_text(json.dumps(list(tokens.values()), indent=2) + "\n", "utf-8")
    return counts
