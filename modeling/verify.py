"""Verification of a saved composite: a fresh process loads it and must compute the same logits.

That process runs `python -m expertoken.modeling.verify FOLDER DEVICE DTYPE TRUST` and prints the candidates' logits on
the probe prompts as JSON.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from .composite import Composite, load_composite, probe_logits
from .errors import ExpertokenError
from .fingerprint import describe_dtype

logger = logging.getLogger(__name__)

_SECONDS = 1500  # limit for the process, below the timeout of other processes at a barrier
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "ACCELERATE_",
    "TORCHELASTIC_",
)
"""Prefixes of variables that launchers set. The fresh process works alone and must not wait for the others."""


def verify_reload(composite: Composite, folder: Path, expected: torch.Tensor) -> None:
    """Load `folder` in a fresh process and compare its logits with the expected ones.

    Args:
        composite: Composite that was written.
        folder: Folder of the written composite.
        expected: Result of `probe_logits` for the composite.

    Raises:
        ExpertokenError: The process failed, or computed different logits.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_VARIABLES)}
    meta = composite.meta
    dtype, trusted = describe_dtype(meta.model), str(int(meta.source.trust_remote_code))
    arguments = [str(folder), str(meta.device), dtype, trusted]
    if meta.device.type == "cuda":
        torch.cuda.empty_cache()  # the child needs room for a second copy of the meta LLM
    try:
        child = subprocess.run(  # noqa: S603 - our own module, in our own interpreter
            [sys.executable, "-m", "expertoken.modeling.verify", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        logger.warning("%s is saved without a check: a fresh process did not load it within %d s", folder, _SECONDS)
        return
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExpertokenError(f"{folder}: a fresh process can't load the saved folder ({last}). Nothing was replaced")
    found = torch.tensor(json.loads(child.stdout.splitlines()[-1]))
    # With the same device and dtype the two differ by the order of sums at most. At Z's size a bfloat16 step is 0.25.
    tolerance = 1e-3 if meta.head.weight.dtype == torch.float32 else 0.5
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=tolerance):
        worst = "another shape" if found.shape != expected.shape else f"{(found - expected).abs().max():.3g}"
        raise ExpertokenError(
            f"{folder}: expected the trained model's logits in a fresh process, got others (difference {worst}). "
            "Nothing was replaced"
        )


def main() -> None:
    """Load the folder and print its probe logits."""
    folder, device, dtype, trusted = sys.argv[1:]
    try:
        composite = load_composite(Path(folder), device=device, dtype=dtype, trust_remote_code=trusted == "1")
        logits = probe_logits(composite)
    except ExpertokenError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(logits.tolist()) + "\n")


if __name__ == "__main__":
    main()
