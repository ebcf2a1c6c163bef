"""`expertoken prepare`: benchmark results to supervision."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..data_prep.labels import STRATEGIES, TIES
from ..data_prep.leaks import IMAGES, LEAKS
from ..data_prep.readers import formats
from ..modeling.errors import ExpertokenError
from .choice import one_of

if TYPE_CHECKING:
    from ..data_prep.results import BenchmarkResults


logger = logging.getLogger(__name__)


def prepare(
    results: Annotated[list[Path], typer.Argument(help="Files or folders of benchmark results.")],
    out: Annotated[Path, typer.Option(help="Supervision folder to write.")],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            **one_of("format", ["auto", *formats()]),
            help="Format of the results. auto finds it by content; datasets takes a hub id too; table: CSV, Parquet, "
            "JSONL.",
        ),
    ] = "auto",
    pool: Annotated[Path | None, typer.Option(help="Pool file (YAML). Default: every model of the results.")] = None,
    label: Annotated[
        str,
        typer.Option(
            **one_of("label", STRATEGIES),
            help="Labels. query: each query's own winner. subject: its subject's winner. mixed: both. soft: "
            "softmax of scores. correctness: a binary problem per expert. expected_score: the scores themselves "
            "(docs/data.md).",
        ),
    ] = "query",
    ties: Annotated[
        str,
        typer.Option(**one_of("ties", TIES), help="Which of a query's winners share the target; best: best overall."),
    ] = "all",
    temperature: Annotated[float, typer.Option(help="Of --label soft.")] = 0.25,
    beta: Annotated[float, typer.Option(help="Of --label mixed: share of the query's own winner.")] = 0.5,
    shrinkage: Annotated[
        float, typer.Option(help="Of subject and mixed: queries of the benchmark's mean that top up each subject.")
    ] = 0.0,
    margin: Annotated[float, typer.Option(help="Lead of a winner below which a label counts less.")] = 0.0,
    cost_weight: Annotated[float, typer.Option(help="Score per USD: labels see score - cost_weight * cost.")] = 0.0,
    contaminated: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=BENCHMARK that the model was trained on; labels leave the pair out. Repeatable."),
    ] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(help="Test on what is never trained on: benchmark=NAME[,NAME] or subject=NAME[,NAME]."),
    ] = None,
    self_model: Annotated[
        str | None, typer.Option(help="Without --pool: the results' name of the meta LLM, which becomes self.")
    ] = None,
    leaks: Annotated[
        str, typer.Option(**one_of("leaks", LEAKS), help="Handling of train queries that are also in the test split.")
    ] = "refuse",
    near_duplicates: Annotated[
        str | None,
        typer.Option(
            **one_of("near-duplicates", ["ignore", *LEAKS]),
            help="Handling of train queries similar to a test query (MinHash). Default: warn and keep, where the extra "
            "`data` is installed.",
        ),
    ] = None,
    validation: Annotated[float, typer.Option(min=0, max=0.9, help="Share of train that becomes validation.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="Share that becomes test, where files name none.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the draws of validation and test.")] = 0,
    contexts: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the questions that get a copy in a chat: behind a system prompt, after other turns, with a "
            "follow-up.",
        ),
    ] = 0.0,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures that results name (extra `vision`); they are kept.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the reader, KEY=VALUE; for tables the columns: --set query=question."),
    ] = None,
) -> None:
    """Make supervision from benchmark results: per query the messages and who should answer."""
    from ..data_prep.labels import Labelling
    from ..data_prep.supervision import build_supervision, pool_of, select_candidates
    from ..modeling.files import check_product
    from ..modeling.pool import ExpertPool
    from .tables import summary_table, wide_console

    check_product(out, "supervision")
    for path in results:
        if path.exists() and out.resolve() in (path.resolve(), path.resolve().parent if path.is_file() else None):
            raise ExpertokenError(f"--out {out}: the results are there; choose a folder of its own for the supervision")
    if pool and self_model:
        raise ExpertokenError("--self-model is for results without a pool; in a pool file say `backend: self`")
    candidates = ExpertPool.from_yaml(pool) if pool else None
    for sentence in candidates.missing() if candidates else ():
        logger.warning(sentence)
    merged = read_all(results, format, option).flag(_pair(text) for text in contaminated or ())
    if images is not None:
        from ..data_prep.images import with_pictures

        merged = with_pictures(merged, images)
    supervision = build_supervision(
        merged,
        candidates or pool_of(merged, self_model),
        labelling=Labelling(label, ties, temperature, beta, shrinkage, margin, cost_weight),
        leaks=leaks,
        near_duplicates=near_duplicates,
        validation=validation,
        test=test,
        seed=seed,
        hold_out=_hold_out(hold_out),
        contexts=contexts,
    )
    supervision.info.datasets = [str(path) for path in results if not path.exists()]  # on the hub
    supervision.save(out)
    console = wide_console()
    # Under the candidates' names: a table of hub ids is too wide for most terminals.
    chosen = select_candidates(merged, supervision.pool)
    console.print(summary_table(chosen.summary()))
    for sentence in _gaps(chosen):
        console.print(sentence, markup=False)
    if IMAGES in merged.queries:
        shown = [names for names in merged.queries[IMAGES] if names]
        kept = f"{len(supervision.pictures)} pictures are kept" if images else "their pictures are not: see --images"
        console.print(f"{len(shown)} queries are about pictures; {kept}", markup=False)
    sizes = ", ".join(f"{name} {count}" for name, count in supervision.info.sizes.items())
    console.print(
        f"supervision of {len(supervision.info.candidates)} candidates written to {out}: {sizes}", markup=False
    )
    if candidates is None:
        console.print(
            "without --pool the experts are the results' model names, taken for hub ids; say in a pool file where "
            "they are before anybody chats",
            markup=False,
        )


def _gaps(results: "BenchmarkResults") -> list[str]:
    """Say which candidates were measured on a part of a benchmark, or on none of it."""
    found = []
    for benchmark, shares in results.coverage().iterrows():
        parts = [f"{name} {share:.0%}" for name, share in shares.items() if 0 < share < 1]
        none = [str(name) for name, share in shares.items() if share == 0]
        if parts:
            found.append(f"{benchmark}: measured in part: {', '.join(parts)}")
        if none:
            found.append(f"{benchmark}: not measured, and no candidate there: {', '.join(none)}")
    return found


def _pair(text: str) -> tuple[str, str]:
    model, equals, benchmark = text.rpartition("=")
    if not equals:
        raise ExpertokenError(f"--contaminated {text}: expected MODEL=BENCHMARK")
    return model, benchmark


def _hold_out(text: str | None) -> tuple[str, list[str]] | None:
    if text is None:
        return None
    field, _, names = text.partition("=")
    if field not in ("benchmark", "subject") or not names:
        raise ExpertokenError(f"--hold-out {text}: expected benchmark=NAME[,NAME] or subject=NAME[,NAME]")
    return field, names.split(",")


def read_all(paths: "list[Path]", format: str, options: list[str] | None) -> "BenchmarkResults":  # noqa: A002
    """Results of all paths together, with the reader options given as KEY=VALUE."""
    from ..data_prep.reading import detect, parse_options, read_results
    from ..data_prep.results import BenchmarkResults

    parts, names = [], [text.partition("=")[0] for text in options or ()]
    for path in paths:
        kind = detect(path, names) if format == "auto" and path.exists() else format
        # `auto` is left where there is no such path, which reading says best.
        parts.append(read_results(path, kind, **({} if kind == "auto" else parse_options(kind, options or []))))
    return BenchmarkResults.merge(parts)
