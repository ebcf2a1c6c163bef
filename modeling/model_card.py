"""Model card of a composite folder: a README.md whose metadata the Hugging Face Hub reads."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from .errors import ExpertokenError, one_line
from .files import atomic_file
from .pool import ExpertPool
from .source import is_address, is_path, local_path

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"

BROKEN = (ExpertokenError, OSError, ValueError, TypeError, RecursionError, yaml.YAMLError)
"""Errors of a card that can't be read or written: it may have been edited by hand."""

_UNKNOWN_LICENSE = "licences-of-the-models-it-uses"
"""Name of the licence of a composite whose base model does not state one. The Hub asks for a name beside `other`."""


def model_card(
    pool: ExpertPool,
    model: str,
    training: dict[str, Any],
    data: dict[str, Any],
    versions: dict[str, Any],
    *,
    sees: bool = False,
) -> str:
    """Return the model card of a composite as Markdown.

    Args:
        pool: Pool of the composite.
        model: Hub id or path of the base model. A path is reduced to its last part.
        training: Method, objective and results of the training.
        data: Fingerprint and sizes of the supervision, and the hub datasets that its results came from.
        versions: Versions of the libraries that wrote the composite.
        sees: The meta LLM reads pictures.
    """
    base = _public(model)
    terms = _terms(model)
    card = ModelCardData(
        base_model=None if is_path(model) or local_path(model).exists() else model,
        datasets=data.get("datasets") or None,
        library_name="expertoken",
        **(terms or {"license": "other", "license_name": _UNKNOWN_LICENSE}),
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=["expertoken", "llm-routing", "mixture-of-experts"],
    )
    lines = [
        "---",
        card.to_yaml(),
        "---",
        "",
        "# A composite of experts",
        "",
        f"Meta LLM `{base}` with {len(pool)} expert tokens, trained with method "
        f"`{training.get('method', '?')}` and objective `{training.get('objective', '?')}` on benchmark results.",
        "",
        "| token | answered by | good at |",
        "|---|---|---|",
    ]
    for expert in pool:
        token = expert.token.replace("|", "\\|")  # a bar separates the cells of a table, in code too
        lines.append(f"| `{token}` | {expert.backend}: `{_public(expert.model or '')}` | {expert.description} |")
    if pool.self_expert:
        lines.append("| (none) | the meta LLM itself | everything else |")
    lines += [
        "",
        "```python",
        "from expertoken import CompositeModel",
        "",
        'composite = CompositeModel.from_pretrained(".")',
        'print(composite.chat("Hello").text)',
        "```",
        "",
    ]
    if not terms:
        lines += ["The licences of the base model and of each expert apply.", ""]
    data = {key: value for key, value in data.items() if key != "path"}
    for name, entries in (("Training", training), ("Data", data), ("Versions", versions)):
        lines += [f"## {name}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | `{json.dumps(value)}` |" for key, value in entries.items()]
        lines.append("")
    return "\n".join(lines)


def add_scores(folder: Path, scores: Mapping[str, float], split: str) -> None:
    """Write the scores of an evaluation into a composite's model card, as the `model-index` of the Hub.

    Scores of an earlier evaluation are replaced. A folder without a card is left as it is.

    Args:
        folder: Composite folder.
        scores: Mean score by benchmark, from 0 to 1.
        split: Split of the supervision that was evaluated.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(benchmark),  # of a plain type: the card is YAML that others read
            dataset_name=str(benchmark),
            dataset_split=split,
            metric_type="score",
            metric_name="mean score of the composite",
            metric_value=round(float(score), 4),
        )
        for benchmark, score in scores.items()
    ]
    _write_results(folder, results)


def copy_scores(source: Path, folder: Path) -> None:
    """Copy the scores of one composite's model card into another's, if there are any that can be read."""
    file = source / CARD_FILE
    try:
        if file.is_file():
            _write_results(folder, ModelCard.load(file).data.eval_results or ())
    except BROKEN as error:
        logger.warning("The scores of %s are not copied: %s", file, one_line(error))


def _write_results(folder: Path, results: Sequence[EvalResult]) -> None:
    """Set the evaluation results of a composite's model card, and nothing else of it."""
    file = folder / CARD_FILE
    if not results or not file.is_file():
        return
    card = ModelCard.load(file)
    card.data.model_name = folder.resolve().name
    card.data.eval_results = list(results)
    with atomic_file(file) as aside:
        card.save(aside)


def _public(model: str) -> str:
    """Return a model's hub id, or the last part of a path: a card names no folder of the machine that wrote it."""
    return Path(model).name if model and (is_path(model) or local_path(model).exists()) else model


def _terms(model: str) -> dict[str, Any]:
    """Return the licence in the base model's own card, with its name and link.

    Only a card that is a local or cached file is read. A link to a file beside that card becomes an address on the hub,
    and is left out for a local model.
    """
    path = local_path(model)
    card: Any = None
    try:
        if path.exists():
            card = path / CARD_FILE
        elif model.count("/") == 1:
            card = try_to_load_from_cache(model, CARD_FILE)
        if not isinstance(card, str | Path) or not Path(card).is_file():
            return {}
        stated = metadata_load(card) or {}
    except BROKEN:  # a broken card, or a model that is no id of the hub, must not stop a training run
        return {}
    found = {
        key: stated[key] for key in ("license", "license_name", "license_link") if isinstance(stated.get(key), str)
    }
    link = found.pop("license_link", "")
    if is_address(link):
        found["license_link"] = link
    elif link and "://" not in link and not path.exists():
        found["license_link"] = f"https://huggingface.co/{model}/blob/main/{link}"
    return found if "license" in found else {}
