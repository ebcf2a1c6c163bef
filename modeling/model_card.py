"""The model card of a composite folder."""

import json
from pathlib import Path
from typing import Any

from .pool import ExpertPool


def model_card(
    pool: ExpertPool, model: str, training: dict[str, Any], data: dict[str, Any], versions: dict[str, Any]
) -> str:
    """Return the model card of a composite as Markdown.

    Args:
        pool: its pool.
        model: model of its base.
        training: how it was trained, and what that reached.
        data: what it was trained on.
        versions: libraries that wrote it.
    """
    base = Path(model).name if Path(model).expanduser().exists() else model  # no path of one machine in a card
    lines = [
        "---",
        "library_name: expertoken",
        f"base_model: {base}",
        "tags: [expertoken, routing]",
        "---",
        "",
        "# A composite of experts",
        "",
        f"Meta LLM `{base}` with {len(pool)} expert tokens, trained with method "
        f"`{training.get('method', '?')}` and objective `{training.get('objective', '?')}` on benchmark results.",
        "",
        "| token | answers with | good at |",
        "|---|---|---|",
    ]
    for expert in pool:
        model = expert.model or ""
        model = Path(model).name if Path(model).exists() else model
        token = expert.token.replace("|", "\\|")  # a bar divides a table's cells, in code too
        lines.append(f"| `{token}` | {expert.backend}: `{model}` | {expert.description} |")
    if pool.self_expert:
        lines.append("| (none) | the meta LLM itself | everything else |")
    lines += [
        "",
        "```python",
        "from expertoken import CompositeModel",
        "",
        'composite = CompositeModel.from_pretrained(".")',
    ]
    lines += ['print(composite.chat("Hello").text)', "```", ""]
    data = {key: value for key, value in data.items() if key != "path"}  # no path of one machine in a card
    for name, entries in (("Training and what it reached", training), ("Data", data), ("Versions", versions)):
        lines += [f"## {name}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | `{json.dumps(value)}` |" for key, value in entries.items()]
        lines.append("")
    return "\n".join(lines)
