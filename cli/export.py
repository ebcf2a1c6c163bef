"""`expertoken export`: a composite or a supervision in a format of other programs."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ..modeling.source import DTYPES
from .choice import one_of

logger = logging.getLogger(__name__)

_MOST = 2000  # most questions of the supervision to distil from and to check on


def _learnt(folder: Path) -> list[Any]:
    """Return an even sample of the conversations that the composite was trained on.

    The list is empty where the supervision no longer exists.
    """
    from ..data_prep.supervision import supervision_of
    from ..modeling.composite import read_manifest
    from ..modeling.errors import ExpertokenError

    try:
        supervision = supervision_of(read_manifest(folder), folder)
    except ExpertokenError as error:
        logger.warning("%s", error)
        return []
    sides = [name for name, part in supervision.data.items() if name != "test" and len(part)]
    asked = [messages for name in sides for messages in supervision.conversations(name)]
    return asked[:: max(1, -(-len(asked) // _MOST))]


def export(
    folder: Annotated[Path, typer.Argument(help="Composite folder. With --sft: supervision folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    gguf: Annotated[
        Path | None, typer.Option(help="GGUF file to write too, by llama.cpp's convert_hf_to_gguf.py.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Questions to distil the tokens from and to check them on: a text file with one per line, or a table "
            "with `query`. Default: the questions that the composite was trained on."
        ),
    ] = None,
    sft: Annotated[bool, typer.Option("--sft", help="Write chat data for TRL and LLaMA-Factory instead.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(**one_of("dtype", DTYPES), help="Data type of the weights. Default: the type in training."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Write a checkpoint with a real token per expert.

    Its decisions are checked on prompts.
    """
    if sft and (gguf or prompts or dtype):
        raise typer.BadParameter("chat data has no weights. Drop --gguf, --prompts and --dtype.", param_hint="--sft")
    if sft:
        from ..data_prep.sft import export_sft
        from ..data_prep.supervision import Supervision

        counts = export_sft(Supervision.load(folder), out)
        typer.echo(f"{out}: " + ", ".join(f"{name} {count} lines" for name, count in counts.items()))
        return
    from ..data_prep.reading import read_queries
    from ..modeling.export import EXPORT_FILE, PROMPTS, convert_to_gguf, export_checkpoint, find_converter

    if gguf:
        find_converter()  # fails before anything is written
    asked = read_queries(prompts) if prompts else _learnt(folder) or PROMPTS
    ids = export_checkpoint(folder, out, prompts=asked, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    typer.echo(f"{out}: " + ", ".join(f"{name} = {place}" for name, place in ids.items()))
    told = json.loads((out / EXPORT_FILE).read_text("utf-8"))
    typer.echo(f"decisions equal to the composite's: {told['decisions_equal']:.1%} of {told['checked_on']} prompts")
    if gguf:
        convert_to_gguf(out, gguf)
        typer.echo(str(gguf))
