"""One-table SELECT statements, scored by running them on a small SQLite database in memory."""

import random
import sqlite3

from .base import Task, first_line

DESCRIPTION = "writes SQL queries for a table"

_TABLES = {
    "customers": ("name", "city", "age"),
    "orders": ("product", "status", "amount"),
    "employees": ("name", "department", "salary"),
    "books": ("title", "author", "year"),
    "films": ("title", "director", "rating"),
}
_TEXTS = {
    "city": ("Oslo", "Lima", "Cairo", "Kyoto"),
    "status": ("open", "paid", "shipped"),
    "department": ("sales", "research", "legal"),
    "author": ("Woolf", "Borges", "Achebe"),
    "director": ("Varda", "Kurosawa", "Ray"),
}
_PHRASES = (
    "Write an SQL query for the table {schema}: {request}.",
    "Given the table {schema}, write SQL to get {request}.",
    "SQL for {schema}: {request}.",
)


def make_task(rng: random.Random) -> Task:
    """Make a question about a table, with a statement that selects the right rows as its answer."""
    table, (key, text, number) = rng.choice(list(_TABLES.items()))
    value, limit = rng.choice(_TEXTS[text]), rng.randint(2, 9) * 10
    request, statement = rng.choice(
        (
            (f"every {key} with {number} over {limit}", f"SELECT {key} FROM {table} WHERE {number} > {limit};"),
            (f"every {key} with {number} under {limit}", f"SELECT {key} FROM {table} WHERE {number} < {limit};"),
            (f"every {key} whose {text} is {value}", f"SELECT {key} FROM {table} WHERE {text} = '{value}';"),
            (f"the highest {number}", f"SELECT MAX({number}) FROM {table};"),
            (f"the average {number}", f"SELECT AVG({number}) FROM {table};"),
            (
                f"how many rows have {text} {value}",
                f"SELECT COUNT(*) FROM {table} WHERE {text} = '{value}';",
            ),
        )
    )
    schema = f"{table}({key}, {text}, {number})"
    return Task(rng.choice(_PHRASES).format(schema=schema, request=request), statement)


def _rows(statement: str) -> list[tuple]:
    """Return the rows that `statement` selects from a fixed database, or raise an `sqlite3.Error`."""
    if not statement.lstrip().upper().startswith("SELECT"):
        raise sqlite3.ProgrammingError("The statement must be a SELECT.")
    rng = random.Random(0)
    with sqlite3.connect(":memory:") as database:
        for table, (key, text, number) in _TABLES.items():
            database.execute(f"CREATE TABLE {table} ({key} TEXT, {text} TEXT, {number} INTEGER)")
            rows = [(f"{table}-{i}", rng.choice(_TEXTS[text]), rng.randint(1, 99)) for i in range(40)]
            database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)
        # The statement is a model's output, so it is stopped after a million instructions.
        database.set_progress_handler(lambda: 1, 1_000_000)
        return sorted(database.execute(statement.split(";")[0]).fetchall())


def score(response: str, answer: str) -> float:
    """Return 1 if the response selects the same rows as the answer, else 0."""
    try:
        return float(_rows(first_line(response)) == _rows(answer))
    except (sqlite3.Error, sqlite3.Warning, TypeError):
        return 0.0
