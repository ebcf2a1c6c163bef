"""Pictures that questions are asked about: found by the paths that results name, checked, and known by their content.

Nothing outside of the folder that is given is opened, nothing is fetched, and a file is looked at before it is decoded:
its format, its sides, its number of pixels.
"""

from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from ..modeling.errors import ExpertokenError, ResultsError
from ..modeling.pictures import FORMATS, decoded, digest, file_below, format_of
from .leaks import IMAGES
from .results import BenchmarkResults


def with_pictures(results: BenchmarkResults, root: Path | str) -> BenchmarkResults:
    """Return results whose pictures are known by their content, not by their paths.

    Args:
        results: results whose queries name pictures by paths.
        root: folder below which the paths lie.

    Raises:
        ResultsError: a picture is missing, lies elsewhere, or is none that is read here.
        ImportError: the extra `vision` is not installed.
    """
    root = Path(root)
    if not root.is_dir():
        raise ResultsError(f"{root}: no such folder of pictures")
    if IMAGES not in results.queries:
        raise ResultsError(
            "the results name no pictures; tables have a column `image` for them, or say which: --set image=COLUMN"
        )
    named = [(key, names) for key, names in zip(results.queries["id"], results.queries[IMAGES], strict=True) if names]
    first = {name: key for key, names in reversed(named) for name in names}
    content: dict[str, str] = {}
    files: dict[str, Path] = {}
    for name, key in tqdm(first.items(), desc="pictures", unit="picture", delay=2):
        try:
            file = file_below(root, name, f"query {key!r}")
        except ExpertokenError as error:
            raise ResultsError(str(error)) from None
        content[name] = digest_of(file)
        files.setdefault(content[name], file)
    images = [names and tuple(content[name] for name in names) for names in results.queries[IMAGES]]
    queries = results.queries.copy()
    queries[IMAGES] = images
    return replace(results, queries=queries, pictures=files)


def digest_of(file: Path) -> str:
    """Return a hash of what a picture shows, by which the same picture in another file or format is the same.

    Raises:
        ResultsError: it is no picture that is read here; the message says why.
        ImportError: the extra `vision` is not installed.
    """
    try:
        return digest(decoded(file, str(file))).hex()
    except ExpertokenError as error:
        raise ResultsError(str(error)) from None


def suffix_of(file: Path) -> str:
    """Return the suffix of a picture's format, whatever the file is called."""
    return FORMATS[format_of(file)]
