"""Cost of active waiting by OpenMP's threads that share a core: `python benchmarks/shared_core.py`.

SmolLM2-135M-Instruct answers a batch of questions with two threads, first on two cores and then on one, as on a busy
machine. Each case runs with libgomp's default setting and with the one that `expertoken` sets. A case that takes more
than `--patience` seconds counts as infinite. Runs on Linux only. Prints seconds and ratios.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TOKENS, QUESTIONS = 10, 7


def answer(cores: int) -> None:
    """Answer the batch on `cores` cores and print the seconds.

    Each case needs its own process, because loading torch fixes how threads wait.
    """
    from expertoken.examples.smollm2 import smollm2
    from expertoken.inference.backends.local import LocalBackend
    from expertoken.inference.backends.models import LocalModels
    from expertoken.modeling.backend import Generation
    from expertoken.modeling.source import Source

    backend = LocalBackend(LocalModels("cpu"), Source(str(smollm2())))
    chats = [[{"role": "user", "content": f"What is {number} + {2 * number}?"}] for number in range(QUESTIONS)]
    backend.complete(chats, Generation(max_new_tokens=TOKENS))
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), set(range(cores)))
    started = time.perf_counter()
    backend.complete(chats, Generation(max_new_tokens=TOKENS))
    print(time.perf_counter() - started)


def main() -> None:
    """Parse the command line, run each case in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--patience", type=float, default=120, help="Seconds before a case is stopped. Default: %(default)s."
    )
    options = parser.parse_args()
    if options.cores:
        answer(options.cores)
        return
    print(
        f"{QUESTIONS} answers of {TOKENS} tokens\n\n| | libgomp's own, s | expertoken's, s | ratio |\n|---|---|---|---|"
    )
    for cores in (2, 1):
        took = []
        for setting in ({}, {"GOMP_SPINCOUNT": "1000"}):
            environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
            environment |= {"OMP_NUM_THREADS": "2"} | setting
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--cores", str(cores)], env=environment, capture_output=True,
                    text=True, check=True, timeout=options.patience,
                )  # fmt: skip
                took.append(float(done.stdout.split()[-1]))
            except subprocess.TimeoutExpired:
                took.append(float("inf"))
        print(
            f"| two threads on {cores} core(s) | {took[0]:.2f} | {took[1]:.2f} | {took[0] / took[1]:.1f}x |", flush=True
        )


if __name__ == "__main__":
    main()
