"""Hugging Face datasets, long or wide like any table: a hub id, a folder of data files, or a saved dataset."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...modeling.errors import ResultsError, one_line
from ..results import BenchmarkResults
from .table import Columns, from_frame
from .text import SIDES

if TYPE_CHECKING:
    from datasets import DatasetDict


def is_saved_dataset(path: Path) -> bool:
    """Check whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()


def read(
    path: Path | str, *, config: str | None = None, revision: str | None = None, **columns: Any
) -> BenchmarkResults:
    """Read every split of a dataset. Names such as train, validation and test apply if no column states the split.

    Args:
        path: Hub id, or folder.
        config: Configuration of the dataset.
        revision: Revision of the dataset on the hub.
        **columns: Names of columns, see `table.Columns`.
    """
    chosen = Columns(**columns)
    parts = []
    for name, split in _load(path, config, revision).items():
        frame = split.to_pandas()
        if not len(frame):
            continue
        frame.index = pd.RangeIndex(1, len(frame) + 1)
        if chosen.split not in frame:
            frame[chosen.split] = SIDES.get(name.lower())
        parts.append(from_frame(frame, f"{path}, split {name}", Path(path).name, chosen))
    return BenchmarkResults.merge(parts)


def _load(path: Path | str, config: str | None, revision: str | None) -> "DatasetDict":
    import datasets

    try:
        if is_saved_dataset(Path(path)):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), config, revision=revision)
    except Exception as error:  # raised by the hub's client, Arrow, pandas, fsspec, ...
        raise ResultsError(f"{path}: can't be read as a dataset ({one_line(error)})") from error
    return found if isinstance(found, dict) else datasets.DatasetDict({"all": found})
