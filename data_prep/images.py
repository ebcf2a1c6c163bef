"""Pictures of questions: found by the paths in results, checked, and identified by their content.

No file outside the user's folder is opened, and no address is fetched. Format, side lengths and number of pixels are
checked before a file is decoded.
"""

from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from ..modeling.errors import ExpertokenError, ResultsError
from ..modeling.pictures import FORMATS, decoded, digest, file_below, format_of
from .leaks import IMAGES
from .results import BenchmarkResults


def with_pictures(results: BenchmarkResults, root: Path | str) -> BenchmarkResults:
    """Return results that identify pictures by their content instead of their paths.

    Args:
        results: Results whose queries name pictures by paths.
        root: Folder that the paths are relative to.

    Raises:
        ResultsError: A picture is missing, is outside the folder, or has an unsupported format.
        ImportError: The extra `vision` is not installed.
    """
    root = Path(root)
    if not root.is_dir():
        raise ResultsError(f"{root}: expected a folder of pictures, found no such folder")
    if IMAGES not in results.queries:
        raise ResultsError(
            "the results name no pictures. Add a column `image` to the table, or name the column: --set image=COLUMN."
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
    """Return a hash of a picture's pixels, which is the same for another file or format of the picture.

    Raises:
        ResultsError: The file is not a supported picture. The message has the reason.
        ImportError: The extra `vision` is not installed.
    """
    try:
        return digest(decoded(file, str(file))).hex()
    except ExpertokenError as error:
        raise ResultsError(str(error)) from None


def suffix_of(file: Path) -> str:
    """Return the suffix of a picture's format, whatever the file's name."""
    return FORMATS[format_of(file)]
