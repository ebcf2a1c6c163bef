"""Description of a supervision."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SupervisionInfo:
    """Description of a supervision, stored in its folder.

    Attributes:
        candidates: Names, in the order of every target and score.
        has_self: True if the last candidate is self.
        labelling: Strategy and its parameters, shares of the splits, contaminated (candidate, benchmark) pairs.
        sizes: Number of queries per split.
        leaks: Equal and near pairs (train id, test id, similarity), and how they were handled.
        fingerprint: Fingerprint of queries, scores, targets and weights.
        datasets: Hub ids of the datasets that the results came from.
    """

    candidates: list[str]
    has_self: bool
    labelling: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    datasets: list[str] = field(default_factory=list)

    def described(self, path: Path) -> dict[str, Any]:
        """Return the description of a supervision that a composite's manifest keeps."""
        found = {"path": str(path), "fingerprint": self.fingerprint, "sizes": self.sizes}
        return found | ({"datasets": self.datasets} if self.datasets else {})
