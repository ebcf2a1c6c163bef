"""Speed of the fit alone, for 5,000 to a million states and 7 to 1,000 experts: `python benchmarks/fit_speed.py`.

The states are synthetic and have the spectrum of an LLM's: a few directions hold most of their power. They are
memory-mapped, as the cache's are. The objective is correctness, with one strength. Each case runs in its own process.
The baseline solves the same problem by the same L-BFGS in plain coordinates, as a straightforward fit would. Prints
seconds, steps and peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

WIDTH = 576  # SmolLM2-135M's
STRENGTH = 0.01
CASES = ((5_000, 7), (50_000, 7), (1_000_000, 7), (5_000, 1_000), (50_000, 1_000))
_CHUNK = 50_000


def make(folder: Path, count: int, experts: int) -> None:
    """Write hidden, log_mass and scores as arrays that can be memory-mapped."""
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, WIDTH + 1) ** -1.0) * np.sqrt(WIDTH)  # power law, like an LLM's principal components
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    mean = 3 * rng.normal(size=WIDTH)
    truth = rng.normal(size=(WIDTH, experts)) / np.sqrt(WIDTH)
    ease = rng.normal(size=experts)
    names = {"hidden": (count, WIDTH), "scores": (count, experts)}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
        for name, shape in names.items()
    }
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        plain = rng.normal(size=(size, WIDTH))
        arrays["hidden"][start : start + size] = (plain * spectrum) @ turn.T + mean
        odds = plain @ truth * 1.5 + ease
        arrays["scores"][start : start + size] = rng.random((size, experts)) < 1 / (1 + np.exp(-odds))
    for array in arrays.values():
        array.flush()
    np.save(folder / "log_mass.npy", np.zeros(count, np.float32))


def solve(folder: Path, plain: bool) -> dict[str, float]:
    """Fit rows in whitened coordinates, or in plain ones, and return seconds, steps, loss and peak memory in GiB."""
    from expertoken.modeling.logits import LogitTransform
    from expertoken.modeling.states import States
    from expertoken.train.row_optimizer import Problem, RowSpace
    from expertoken.train.tokens import fit_rows

    if plain:
        setattr(RowSpace, "whitened", lambda self, *_: torch.eye(len(self.moment), dtype=torch.float64))  # noqa: B010
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("hidden", "scores", "log_mass")}
    count = len(arrays["hidden"])
    problem = Problem(
        States(arrays["hidden"], arrays["log_mass"]), arrays["scores"], arrays["scores"],
        np.ones(count, np.float32), ["b"] * count,
    )  # fmt: skip
    started = time.perf_counter()
    fit = fit_rows(
        problem, objective="correctness", l2=[STRENGTH], transform=LogitTransform(), folds=0, max_iterations=1000
    )
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "steps": fit.iterations, "loss": fit.loss, "memory": memory}


def main() -> None:
    """Parse the command line, run each case in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        default=",".join(f"{n}x{k}" for n, k in CASES),
        help="Cases as STATESxEXPERTS, separated by commas. Default: %(default)s.",
    )
    parser.add_argument(
        "--plain-up-to",
        type=int,
        default=50_000,
        help="Largest number of states to fit in plain coordinates too. Default: %(default)s.",
    )
    parser.add_argument("--solve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solve:
        print(json.dumps(solve(options.solve, options.plain)))
        return
    print("| states | experts | coordinates | seconds | steps | loss | peak GiB | states, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for case in options.cases.split(","):
        count, experts = map(int, case.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count, experts)
            for plain in (False, True) if count <= options.plain_up_to else (False,):
                command = [sys.executable, __file__, "--solve", folder, *(["--plain"] if plain else [])]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                found = json.loads(done.stdout.splitlines()[-1])
                cells = [f"{count:,}", f"{experts:,}", "plain" if plain else "whitened", f"{found['seconds']:.1f}"]
                cells += [str(found["steps"]), f"{found['loss']:.6f}", f"{found['memory']:.2f}"]
                print(f"| {' | '.join(cells)} | {count * WIDTH * 4 / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
