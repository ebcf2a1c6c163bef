"""`expertoken prepare`: supervision from benchmark results."""

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
    from ..modeling.pool import ExpertPool


logger = logging.getLogger(__name__)


def prepare(
    results: Annotated[list[Path], typer.Argument(help="Files or folders of benchmark results.")],
    out: Annotated[Path, typer.Option(help="Supervision folder to write.")],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            **one_of("format", ["auto", *formats()]),
            help="Format of the results. auto: detected from the content. datasets: also a hub id. table: CSV, "
            "Parquet, JSONL.",
        ),
    ] = "auto",
    pool: Annotated[
        Path | None, typer.Option(help="Pool file (YAML). Default: a pool of all models in the results.")
    ] = None,
    label: Annotated[
        str,
        typer.Option(
            **one_of("label", STRATEGIES),
            help="Labels. query: each query's own winner. subject: its subject's winner. mixed: both. soft: "
            "softmax of scores. correctness: a binary problem per expert. expected_score: the scores themselves "
            "(docs/guides/labels.md).",
        ),
    ] = "query",
    ties: Annotated[
        str,
        typer.Option(**one_of("ties", TIES), help="Winners of a query that get its target. best: the best overall."),
    ] = "all",
    temperature: Annotated[float, typer.Option(help="Temperature of the softmax, for --label soft.")] = 0.25,
    beta: Annotated[float, typer.Option(help="Share of the query's own winner, for --label mixed.")] = 0.5,
    shrinkage: Annotated[
        float,
        typer.Option(
            help="Pseudo-queries at the benchmark's mean added to each subject, for --label subject and mixed."
        ),
    ] = 0.0,
    margin: Annotated[float, typer.Option(help="Lead of a winner below which its label counts less.")] = 0.0,
    cost_weight: Annotated[
        float, typer.Option(help="Score that a USD is worth. Labels use score - cost_weight * cost.")
    ] = 0.0,
    contaminated: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL=BENCHMARK: a benchmark that the model was trained on. Labels leave the pair out. Repeatable."
        ),
    ] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(
            help="Held-out test split that is never trained on: benchmark=NAME[,NAME] or subject=NAME[,NAME]."
        ),
    ] = None,
    self_model: Annotated[
        str | None,
        typer.Option(help="Name of the meta LLM in the results, which becomes self. For use without --pool."),
    ] = None,
    leaks: Annotated[
        str, typer.Option(**one_of("leaks", LEAKS), help="Handling of train queries that are also in the test split.")
    ] = "refuse",
    near_duplicates: Annotated[
        str | None,
        typer.Option(
            **one_of("near-duplicates", ["ignore", *LEAKS]),
            help="Handling of train queries similar to a test query (MinHash). Default: warn and keep, if the extra "
            "`data` is installed.",
        ),
    ] = None,
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the train split that becomes validation.")
    ] = 0.1,
    test: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Share of the queries that becomes the test split, where the files name none."
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed for the draws of validation and test.")] = 0,
    contexts: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the questions that get a copy in a chat: after a system prompt, after other turns, with a "
            "follow-up.",
        ),
    ] = 0.0,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the pictures that the results name (extra `vision`). The supervision stores them."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Option of the reader as KEY=VALUE. Repeatable. Columns of tables: --set query=question."
        ),
    ] = None,
) -> None:
    """Build supervision from benchmark results.

    A supervision holds the messages of each query and a target over the candidates.
    """
    from ..data_prep.labels import Labelling
    from ..data_prep.supervision import build_supervision, pool_of, select_candidates
    from ..modeling.files import check_product
    from ..modeling.pool import ExpertPool
    from .tables import summary_table, wide_console

    check_product(out, "supervision")
    for path in results:
        if path.exists() and out.resolve() in (path.resolve(), path.resolve().parent if path.is_file() else None):
            raise ExpertokenError(
                f"--out {out}: the results are there. Choose a folder of its own for the supervision."
            )
    if pool and self_model:
        raise ExpertokenError(
            "--self-model is for results without a pool. In a pool file mark the meta LLM with `backend: self`."
        )
    candidates = ExpertPool.from_yaml(pool) if pool else None
    for sentence in candidates.missing() if candidates else ():
        logger.warning(sentence)
    merged = read_all(results, format, option, candidates)
    merged = merged.flag(_column(_pair(text), merged, candidates) for text in contaminated or ())
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
    # Columns have the candidates' names, because a table of hub ids is too wide for most terminals.
    chosen = select_candidates(merged, supervision.pool)
    console.print(summary_table(chosen.summary()))
    for sentence in _gaps(chosen):
        console.print(sentence, markup=False)
    if IMAGES in merged.queries:
        shown = [names for names in merged.queries[IMAGES] if names]
        kept = (
            f"{len(supervision.pictures)} pictures are stored" if images else "pictures are not stored (see --images)"
        )
        console.print(f"{len(shown)} queries have pictures, {kept}", markup=False)
    sizes = ", ".join(f"{name} {count}" for name, count in supervision.info.sizes.items())
    console.print(
        f"supervision of {len(supervision.info.candidates)} candidates written to {out}: {sizes}", markup=False
    )
    if candidates is None:
        console.print(
            "without --pool the experts are the model names of the results, read as hub ids. Give their addresses in a "
            "pool file before the composite answers.",
            markup=False,
        )


def _gaps(results: "BenchmarkResults") -> list[str]:
    """List the candidates that were measured on a part of a benchmark only, or on none of it."""
    found = []
    for benchmark, shares in results.coverage().iterrows():
        parts = [f"{name} {share:.0%}" for name, share in shares.items() if 0 < share < 1]
        none = [str(name) for name, share in shares.items() if share == 0]
        if parts:
            found.append(f"{benchmark}: measured on a part only: {', '.join(parts)}")
        if none:
            found.append(f"{benchmark}: not measured, so no candidate in this benchmark: {', '.join(none)}")
    return found


def _pair(text: str) -> tuple[str, str]:
    model, equals, benchmark = text.rpartition("=")
    if not equals:
        raise ExpertokenError(f"--contaminated {text}: expected MODEL=BENCHMARK")
    return model, benchmark


def _column(pair: tuple[str, str], results: "BenchmarkResults", pool: "ExpertPool | None") -> tuple[str, str]:
    """Return a (model, benchmark) pair under the model's name in merged results, which may come from another file."""
    model, benchmark = pair
    if model not in results.models and pool is not None:
        meant = next((candidate for candidate in pool.candidates if candidate.find_in([model])), None)
        model = (meant.find_in(results.models) if meant is not None else None) or model
    return model, benchmark


def _hold_out(text: str | None) -> tuple[str, list[str]] | None:
    if text is None:
        return None
    field, _, names = text.partition("=")
    if field not in ("benchmark", "subject") or not names:
        raise ExpertokenError(f"--hold-out {text}: expected benchmark=NAME[,NAME] or subject=NAME[,NAME]")
    return field, names.split(",")


def read_all(
    paths: "list[Path]",
    format: str,  # noqa: A002
    options: list[str] | None,
    pool: "ExpertPool | None" = None,
) -> "BenchmarkResults":
    """Read the results of all paths and merge them.

    Args:
        paths: Files or folders of results.
        format: Name of the format, or auto.
        options: Options of the reader as KEY=VALUE.
        pool: Candidates that may have different names in different files.
    """
    from ..data_prep.reading import detect, parse_options, read_results
    from ..data_prep.results import BenchmarkResults, with_one_name

    parts, names = [], [text.partition("=")[0] for text in options or ()]
    for path in paths:
        kind = detect(path, names) if format == "auto" and path.exists() else format
        # For a missing path `auto` stays, because `read_results` raises the clearest error.
        parts.append(read_results(path, kind, **({} if kind == "auto" else parse_options(kind, options or []))))
    return BenchmarkResults.merge(parts if pool is None else with_one_name(parts, pool))
