"""Labels for results that no table in memory holds: records stream from Parquet through DuckDB.

The canonical form at scale is two tables. Queries: `id, prompt, benchmark, subject, split`, one row each. Records:
`id, model, score` and optionally `cost`, one row per query and model, in any number of files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..modeling.errors import ExpertokenError, ResultsError, did_you_mean, one_line, require_extra
from ..modeling.files import atomic_file
from .labels import TIE, Labelling

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Labelled:
    """What was written.

    Attributes:
        queries: with a label.
        models: that were seen.
        records: that were read.
    """

    queries: int
    models: int
    records: int


def label_records(
    records: Path | str,
    queries: Path | str,
    out: Path | str,
    labelling: Labelling | str = "query",
    *,
    memory_gib: float = 2.0,
    threads: int | None = None,
) -> Labelled:
    """Label queries from a stream of records, as `labels.label` does from a table in memory.

    Two records of one query and model are not looked for: that would cost a table as large as the records.

    Two passes over the records for `subject` and for `query` with ties to the `best`, three for the other ways to break
    ties. Memory grows with queries and models, not with records; what does not fit goes to disk beside `out`.

    Args:
        records: Parquet file, or a folder of them.
        queries: Parquet file.
        out: Parquet file to write: `id, benchmark, subject, split, winners (list of models), weight`.
        labelling: strategy `query` or `subject`, with `ties`, `shrinkage` and `cost_weight`.
        memory_gib: what DuckDB may use.
        threads: of DuckDB; all cores where not given.

    Raises:
        ResultsError: a file is missing, is no Parquet, or lacks a column, or a score is outside [0, 1].
        ExpertokenError: the strategy can't be streamed, or costs are needed and not there.
        ImportError: the extra `data` is not installed.
    """
    labelling = Labelling(labelling) if isinstance(labelling, str) else labelling
    if labelling.strategy not in MAKERS or labelling.margin:
        raise ExpertokenError(
            f"labels of strategy {labelling.strategy!r} with margin {labelling.margin:g} are not made from a stream; "
            f"expected {' or '.join(MAKERS)} without a margin"
        )
    duckdb = require_extra("duckdb", "data")
    out = Path(out)
    with atomic_file(out) as aside:
        connection = duckdb.connect()
        try:
            connection.execute(f"SET memory_limit = '{memory_gib}GiB'")
            connection.execute(f"SET temp_directory = '{_quoted(aside.parent)}'")
            connection.execute("SET preserve_insertion_order = false")
            if threads:
                connection.execute(f"SET threads = {int(threads)}")
            seen = _open(connection, records, queries, labelling)
            MAKERS[labelling.strategy](connection, labelling)
            connection.execute(f"COPY (SELECT * FROM labels ORDER BY id) TO '{_quoted(aside)}' (FORMAT parquet)")
            count = connection.execute("SELECT count(*) FROM labels WHERE weight > 0").fetchone()[0]
        except duckdb.Error as error:
            raise ResultsError(f"{records}: can't be labelled ({one_line(error)})") from error
        finally:
            connection.close()
    return Labelled(count, *seen)


def _quoted(path: Path | str) -> str:
    return str(path).replace("'", "''")


def _source(path: Path | str) -> str:
    """A FROM clause for a Parquet file or a folder of them.

    Raises:
        ResultsError: there is none.
    """
    path = Path(path)
    if path.is_dir() and not list(path.glob("*.parquet")):
        raise ResultsError(f"{path}: empty results, no .parquet file in the folder")
    if not path.exists():
        raise ResultsError(f"{path}: no such file or folder; expected Parquet")
    return f"read_parquet('{_quoted(path / '*.parquet' if path.is_dir() else path)}')"


def _open(
    connection: "duckdb.DuckDBPyConnection", records: Path | str, queries: Path | str, labelling: Labelling
) -> tuple[int, int]:
    """Views `records (id, model, u, cost)` and table `queries`; models and records that were seen."""
    sources = {records: _source(records), queries: _source(queries)}
    needed = {records: ("id", "model", "score"), queries: ("id", "benchmark", "subject", "split")}
    found = {}
    for path, source in sources.items():
        try:
            found[path] = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        except Exception as error:
            raise ResultsError(f"{path}: not a readable Parquet table ({one_line(error)})") from error
        for column in needed[path]:
            if column not in found[path]:
                raise ResultsError(f"{path}: no column {column!r}, {did_you_mean(column, found[path])}")
    priced = "cost" in found[records]
    if not priced and (labelling.cost_weight > 0 or labelling.ties == "cheapest"):
        raise ExpertokenError(f"{records}: cost_weight and ties: cheapest need a column 'cost'")
    connection.execute(
        f"CREATE TABLE queries AS SELECT id, benchmark, coalesce(subject, '') AS subject, split, "
        f"coalesce(split, 'train') <> 'test' AS learning FROM {sources[queries]}"
    )
    twice = connection.execute("SELECT id FROM queries GROUP BY id HAVING count(*) > 1 LIMIT 1").fetchone()
    if twice:
        raise ResultsError(f"{queries}: query id {twice[0]!r} appears twice; ids are unique, drop or rename one")
    cost = "cost" if priced else "NULL::DOUBLE"
    utility = "score"
    if labelling.cost_weight:
        # A gap takes the model's mean cost, see `labels.filled_costs`.
        source = sources[records]
        connection.execute(
            f"CREATE TABLE prices AS SELECT model, coalesce(avg(r.cost) FILTER (learning), avg(r.cost)) AS price, "
            f"min(r.cost) AS low FROM {source} r JOIN queries USING (id) GROUP BY model"
        )
        bad = connection.execute("SELECT model, price FROM prices WHERE price IS NULL OR low < 0 LIMIT 1").fetchone()
        if bad:
            told = "no cost is known" if bad[1] is None else "a cost is below 0"
            raise ResultsError(f"{records}: model {bad[0]!r}: {told}; add its costs or leave it out")
        utility = (
            f"score - {labelling.cost_weight!r} * coalesce(cost, (SELECT price FROM prices p WHERE p.model = r.model))"
        )
    connection.execute(
        f"CREATE VIEW records AS SELECT id, model, score, ({utility})::DOUBLE AS u, cost FROM (SELECT id, model, "
        f"score::DOUBLE AS score, {cost} AS cost FROM {sources[records]}) r "
        "WHERE score IS NOT NULL AND NOT isnan(score)"
    )
    # Who is best, the test side must not decide; where nobody asks for it, this pass reads two columns and no ids.
    side, mean = ("JOIN queries USING (id)", "avg(u) FILTER (learning)") if labelling.ties == "best" else ("", "avg(u)")
    connection.execute(
        f"CREATE TABLE models AS SELECT model, count(*) AS n, coalesce({mean}, -1e300) AS mean, avg(cost) AS cost, "
        f"min(score) AS low, max(score) AS high FROM records {side} GROUP BY model"
    )
    wrong = connection.execute("SELECT model, low, high FROM models WHERE low < 0 OR high > 1 LIMIT 1").fetchone()
    if wrong:
        outside = wrong[1] if wrong[1] < 0 else wrong[2]
        raise ResultsError(f"{records}: model {wrong[0]!r}: score {outside:g} is outside [0, 1]; scale scores first")
    [(models, total)] = connection.execute("SELECT count(*), coalesce(sum(n), 0)::BIGINT FROM models").fetchall()
    if not models:
        raise ResultsError(f"{records}: empty results, no record has a score")
    return models, total


def _by_query(connection: "duckdb.DuckDBPyConnection", labelling: Labelling) -> None:
    """Table `labels`, each query by its own winners."""
    if labelling.ties == "best":
        # The rank goes into the key, so that one pass finds all three: utility in steps of 1e-6, then rank.
        connection.execute(
            "CREATE TABLE ranks AS SELECT model, row_number() OVER (ORDER BY mean DESC, model) AS rank FROM models"
        )
        connection.execute(
            "CREATE TABLE own AS SELECT id, max(u) AS best, min(u) AS worst, count(*) AS n, "
            f"[arg_max(model, round(u / {TIE})::BIGINT * 1000000 - rank)] AS winners "
            "FROM records JOIN ranks USING (model) GROUP BY id"
        )
    else:
        connection.execute(
            "CREATE TABLE extremes AS SELECT id, max(u) AS best, min(u) AS worst, count(*) AS n FROM records "
            "GROUP BY id"
        )
        winner = "list(model ORDER BY model)"
        cheapest = "min(coalesce(records.cost, models.cost, 1e300)) OVER (PARTITION BY records.id)"
        qualify = f"QUALIFY coalesce(records.cost, models.cost, 1e300) <= {cheapest}"
        if labelling.ties != "cheapest":
            qualify = ""
        connection.execute(
            f"CREATE TABLE own AS SELECT id, any_value(best) AS best, any_value(worst) AS worst, any_value(n) AS n, "
            f"{winner} AS winners FROM (SELECT records.id, records.model, best, worst, extremes.n FROM records "
            "JOIN extremes ON records.id = extremes.id JOIN models ON records.model = models.model "
            f"WHERE u >= best - {TIE} {qualify}) GROUP BY id"
        )
    connection.execute(
        "CREATE TABLE labels AS SELECT q.id, q.benchmark, q.subject, q.split, coalesce(own.winners, []) AS winners, "
        f"CASE WHEN own.best > least(own.worst, 0) + {TIE} AND (own.best - own.worst > {TIE} "
        "OR own.n < (SELECT count(*) FROM models)) THEN 1.0 ELSE 0.0 END::FLOAT AS weight "
        "FROM queries q LEFT JOIN own USING (id)"
    )


def _by_subject(connection: "duckdb.DuckDBPyConnection", labelling: Labelling) -> None:
    """Table `labels`, each query by its subject's winners; see `labels.subject_means`."""
    connection.execute(
        "CREATE TABLE sums AS SELECT benchmark, subject, model, sum(u) AS total, count(*) AS n "
        "FROM records JOIN (SELECT * FROM queries WHERE learning) USING (id) GROUP BY ALL"
    )
    shrinkage = repr(float(labelling.shrinkage))
    connection.execute(
        "CREATE TABLE priors AS SELECT benchmark, model, sum(total) / sum(n) AS mean FROM sums GROUP BY ALL; "
        "CREATE TABLE overall AS SELECT model, sum(total) / sum(n) AS mean FROM sums GROUP BY ALL; "
        "CREATE TABLE means AS SELECT s.benchmark, s.subject, p.model, "
        f"(coalesce(total, 0) + {shrinkage} * p.mean) / (coalesce(n, 0) + {shrinkage}) AS mean "
        "FROM (SELECT DISTINCT benchmark, subject FROM sums) s JOIN priors p USING (benchmark) "
        "LEFT JOIN sums USING (benchmark, subject, model) "
        f"WHERE coalesce(n, 0) + {shrinkage} > 0"
    )
    # Subjects that the learning side does not have take their benchmark's means, such benchmarks the overall.
    connection.execute(
        "INSERT INTO means SELECT q.benchmark, q.subject, p.model, p.mean FROM (SELECT DISTINCT benchmark, subject "
        "FROM queries ANTI JOIN sums USING (benchmark, subject)) q JOIN priors p USING (benchmark); "
        "INSERT INTO means SELECT q.benchmark, q.subject, o.model, o.mean FROM (SELECT DISTINCT benchmark, subject "
        "FROM queries ANTI JOIN sums USING (benchmark)) q CROSS JOIN overall o"
    )
    order = {
        "all": "0",
        "best": "(SELECT -mean FROM overall o WHERE o.model = m.model)",
        "cheapest": "(SELECT coalesce(cost, 1e300) FROM models c WHERE c.model = m.model)",
    }[labelling.ties]
    connection.execute(
        "CREATE TABLE tied AS SELECT m.benchmark, m.subject, m.model, "
        f"{order} AS rank FROM means m JOIN (SELECT benchmark, subject, max(mean) AS best FROM means GROUP BY ALL) "
        f"USING (benchmark, subject) WHERE m.mean >= best - {TIE}; "
        "CREATE TABLE winners AS SELECT benchmark, subject, list(model ORDER BY model) AS winners FROM tied JOIN "
        "(SELECT benchmark, subject, min(rank) AS first FROM tied GROUP BY ALL) USING (benchmark, subject) "
        "WHERE rank <= first GROUP BY ALL; "
        "CREATE TABLE labels AS SELECT q.id, q.benchmark, q.subject, q.split, coalesce(w.winners, []) AS winners, "
        "(w.winners IS NOT NULL AND m.id IS NOT NULL)::INT::FLOAT AS weight FROM queries q "
        "LEFT JOIN winners w USING (benchmark, subject) LEFT JOIN (SELECT DISTINCT id FROM records) m USING (id)"
    )


MAKERS = {"query": _by_query, "subject": _by_subject}
"""Strategies that can be streamed, to what makes their labels."""
