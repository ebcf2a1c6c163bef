"""`expertoken evaluate`: the composite against every expert, baselines and the oracle."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..data_prep import SPLITS
from ..evaluation.baselines import METHODS
from .choice import one_of


def evaluate(
    composite: Annotated[Path, typer.Argument(help="Composite folder.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Supervision folder. Default: the supervision that the composite was trained on."),
    ] = None,
    split: Annotated[str, typer.Option(**one_of("split", SPLITS), help="Split to evaluate on.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Folder for the report. Default: COMPOSITE/report.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            **one_of("baselines", ["none", *METHODS], several=True),
            help="Baselines: learnt routers and trivial rivals. Default, with the extra `eval`: all except untrained "
            "(a second model in memory, with random weights), and text-only (no pictures) only where queries have "
            "pictures.",
        ),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="sentence-transformers model (hub id or folder) for the features of the learnt routers. Default: the "
            "meta LLM's states."
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder (hub id or folder) to fine-tune as one more router. Slow.")
    ] = None,
    encoder_epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of the encoder's fine-tuning on the train split.")
    ] = 3,
    robustness: Annotated[
        int, typer.Option(min=0, help="Number of queries to repeat with changed wording. 0: none.")
    ] = 0,
    contexts: Annotated[
        int,
        typer.Option(
            min=0, help="Number of queries to repeat in chats: after a system prompt, after other turns. 0: none."
        ),
    ] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="Number of bootstrap resamples.")] = 5000,
    plot: Annotated[bool, typer.Option(help="Draw figures too, if the extra `eval` is installed.")] = True,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Score a composite beside its rivals. Write a report.

    Rivals are its experts, trivial and learnt baselines, and the oracle.
    """
    from ..evaluation.evaluate import evaluate as run
    from .tables import chats_table, report_table, wide_console

    names = None if baselines is None else baselines.split(",")
    chosen = [] if names == ["none"] else names
    report = run(
        composite,
        data,
        split,
        baselines=chosen,
        embedder=embedder,
        encoder=encoder,
        encoder_epochs=encoder_epochs,
        robustness=robustness,
        contexts=contexts,
        resamples=resamples,
        trust_remote_code=trust_remote_code,
    )
    folder = out or composite / "report"
    pictures = []
    if plot and find_spec("matplotlib"):
        from ..evaluation.plots import draw_report

        pictures = draw_report(report, folder)
    report.save_folder(folder, pictures)
    report.add_to_card(composite)
    console = wide_console()
    console.print(report_table(report))
    if report.chats:
        console.print(chats_table(report))
    for sentence in report.verdict():
        console.print(sentence, markup=False)
    console.print(f"report written to {folder}", markup=False)
