"""Measurements that anyone can repeat. They are part of the checkout, not of the wheel."""

import os
from pathlib import Path

DATA = Path(os.environ.get("EXPERTOKEN_DATA", "data"))
"""Folder of public results (routerdc/, routellm/, ...). docs/results.md names their sources."""
