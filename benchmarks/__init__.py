"""Measurements that anyone can repeat; part of the checkout, not of the wheel."""

import os
from pathlib import Path

DATA = Path(os.environ.get("EXPERTOKEN_DATA", "data"))
"""A folder with public results (routerdc/, routellm/, ...), as docs/results.md says where they come from."""
