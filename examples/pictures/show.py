"""The whole path with pictures, on a CPU in three minutes: `python -m expertoken.examples.pictures.show`.

The example draws pictures of four kinds and makes a small vision-language model. It trains a composite on the results
of four experts, each right about one kind. The question is always the same, so only the picture can decide.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

from expertoken.data_prep import SPLITS
from expertoken.data_prep.supervision import Supervision

from .draw import draw_pictures
from .make_model import make_model

HERE = Path(__file__).parent


def main() -> None:
    """Run the example and print held-out accuracy beside routers that read less."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("pictures-demo"), help="Folder to write. Default: %(default)s."
    )
    parser.add_argument("--count", type=int, default=50, help="Pictures of each kind. Default: %(default)s.")
    given = parser.parse_args()
    out = given.out
    table = draw_pictures(out, given.count)
    make_model(out / "model")
    run("prepare", table, "--images", out / "pictures", "--pool", HERE / "pool.yaml", "--out", out / "supervision")
    run("train", "tokens", "--meta", out / "model", "--data", out / "supervision", "--out", out / "composite")
    run("evaluate", out / "composite")
    print(f"accuracy from raw pixels alone: {100 * raw_pixels(Supervision.load(out / 'supervision')):.1f} %")


def run(*words: str | Path) -> None:
    """Print a command of expertoken as a user would type it, and run it."""
    print(f"\n$ expertoken {shlex.join(map(str, words))}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("expertoken")), *map(str, words)], check=True)


def raw_pixels(supervision: Supervision, side: int = 16) -> float:
    """Return the held-out accuracy of a logistic regression on the pixels, which needs no language model.

    Args:
        supervision: Supervision with pictures.
        side: Width and height of the shrunken pictures, in pixels.
    """
    pixels, labels = {}, {}
    for name in SPLITS:
        parts = supervision.side(name)
        shown = [messages[-1]["content"][0]["image"] for messages in parts["messages"]]
        small = [Image.open(supervision.pictures[key]).convert("RGB").resize((side, side)) for key in shown]
        pixels[name] = np.stack([np.asarray(picture, np.float32).ravel() / 255 for picture in small])
        labels[name] = np.asarray(parts["scores"]).argmax(1)
    known = [name for name in SPLITS if name != "test"]
    model = LogisticRegression(max_iter=1000, C=0.1).fit(
        np.concatenate([pixels[name] for name in known]), np.concatenate([labels[name] for name in known])
    )
    return float(model.score(pixels["test"], labels["test"]))


if __name__ == "__main__":
    main()
