"""Entry point of `python -m expertoken.train` and `expertoken train`. Help needs no torch. Errors are one line."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from ..modeling.errors import ExpertokenError
from .config import parse_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments, train, and exit with a status."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("expertoken").setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a missing optional kernel at every start
    try:
        options, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        from .processes import leave
        from .run import train

        train(options, arguments)
    except (ExpertokenError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished work is kept: run the same command again to resume.")
    leave()
