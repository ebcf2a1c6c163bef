"""What a fresh process makes of a composite folder: `python -m expertoken.modeling.reload FOLDER DEVICE DTYPE TRUST`.

Prints the candidate logits on the probe prompts as JSON; `composite.verify_reload` compares them.
"""

import json
import sys
from pathlib import Path

from .composite import load_composite, probe_logits
from .errors import ExpertokenError


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
