"""Safe reading of untrusted pickles: only arrays, tables and plain containers are restored."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

from ...modeling.errors import ResultsError, one_line

# Exact names, not whole modules, because numpy and pandas both have functions that evaluate text. Arrow's names are
# left out, because they restore raw buffers without a check.
_NUMPY = {"_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype"}
_NUMPY_MODULES = {
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
}
_PANDAS = {("pandas", name) for name in ("DataFrame", "Series", "Index", "RangeIndex", "MultiIndex", "StringDtype")} | {
    ("pandas.core.frame", "DataFrame"),
    ("pandas.core.series", "Series"),
    ("pandas.core.internals.managers", "BlockManager"),
    ("pandas.core.internals.managers", "SingleBlockManager"),
    ("pandas.core.internals.blocks", "new_block"),
    ("pandas._libs.internals", "_unpickle_block"),
    ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"),
    ("pandas.core.indexes.base", "_new_Index"),
    ("pandas.core.indexes.base", "Index"),
    ("pandas.core.indexes.range", "RangeIndex"),
    ("pandas.core.indexes.multi", "MultiIndex"),
    ("pandas.core.arrays.string_", "StringArray"),
    ("pandas.core.arrays.string_", "StringDtype"),
}
_PLAIN = {
    ("builtins", name)
    for name in ("list", "dict", "set", "frozenset", "tuple", "slice", "complex", "bytearray", "int", "float", "str")
} | {("collections", "OrderedDict"), ("_codecs", "encode")}
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)


class _RefusedError(Exception):
    """An import in a pickle that no list allows."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module in _NUMPY_MODULES and name in _NUMPY) or (module, name) in _PANDAS | _PLAIN:
            return super().find_class(module, name)
        raise _RefusedError(f"{module}.{name}")


def read_pickle(file: Path) -> Any:
    """Read a pickle file of numpy arrays, pandas tables and plain containers.

    Raises:
        ResultsError: The file is damaged, or tries to import anything else, which is neither imported nor run.
    """
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream).load()
    except _RefusedError as refused:
        raise ResultsError(
            f"{file}: this pickle tries to import {refused}, which results never need, and is refused. If you trust "
            "its source, open it with pandas and save the table as Parquet or CSV."
        ) from None
    except _DAMAGE as error:
        raise ResultsError(f"{file}: not a readable pickle ({one_line(error)}). The file may be cut short.") from None


def holds_mapping(file: Path) -> bool:
    """Check by its first opcodes, without running any, whether a pickle's outermost object is a dict."""
    try:
        with file.open("rb") as stream:
            for opcode, _, _ in pickletools.genops(stream):
                if opcode.name not in ("PROTO", "FRAME", "MARK"):
                    return opcode.name in ("EMPTY_DICT", "DICT")
    except ValueError:
        return False
    return False
