"""A run that is killed again and again comes to the weights of one that was not: `python benchmarks/kill_resume.py`.

Method lora on a tiny random model, dropout and Adam included. One run goes straight through; another is sent SIGKILL,
all its processes, at ten random moments (while it starts, trains, or writes a checkpoint) and started again by the same
command each time. Prints where each kill fell and the largest difference of any weight at the end.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

from expertoken.data_prep.supervision import build_supervision
from expertoken.tests.tiny import tiny_folder, tiny_pool, tiny_results
from expertoken.tests.train.launching import kill, start, trained
from expertoken.train.checkpoints import last_complete_checkpoint

RUN = ("--save_steps", "5", "--logging_steps", "1000", "--lora_dropout", "0.1", "--seed", "3", "--learning_rate",
       "1e-3", "--warm_start", "false", "--save_total_limit", "2", "--num_train_epochs", "1000")  # fmt: skip


def reached(folder: Path) -> str:
    """The last whole checkpoint, and whether a half-written one is there."""
    if not folder.exists():
        return "nothing yet"
    whole = last_complete_checkpoint(folder)
    torn = [entry.name for entry in folder.glob("checkpoint-*") if not (entry / "trainer_state.json").exists()]
    return f"{whole.name if whole else 'no whole checkpoint'}{', torn: ' + ', '.join(torn) if torn else ''}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ddp", help="launch configuration (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="keep everything in this folder; a temporary one where not given")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        base = tiny_folder(work / "base")
        build_supervision(tiny_results(), tiny_pool(base)).save(work / "supervision")
        run = (base, work / "supervision", *RUN, "--max_steps", str(options.steps))
        begun = time.perf_counter()
        straight = start(options.config, work / "straight", *run)
        while straight.poll() is None and not last_complete_checkpoint(work / "straight"):
            time.sleep(0.1)
        beginning = time.perf_counter() - begun
        if straight.wait():
            sys.exit("the straight run failed")
        length = time.perf_counter() - begun
        print(f"straight: {length:.0f} s, of which {beginning:.0f} to the first checkpoint", flush=True)
        for number in range(options.kills):
            process = start(options.config, work / "killed", *run)
            # Some fall into the start-up, and together the others leave something of the run for the last start.
            moment = moments.uniform(0.5 * beginning, beginning + 1.5 * (length - beginning) / options.kills)
            try:
                if process.wait(moment):
                    sys.exit(f"kill {number + 1}: the run ended by itself with an error")
                sys.exit(f"kill {number + 1}: the run was through before it; take more --steps")
            except psutil.TimeoutExpired:
                kill(process)
            print(f"kill {number + 1} after {moment:.1f} s: {reached(work / 'killed')}", flush=True)
        if start(options.config, work / "killed", *run).wait():
            sys.exit("the killed run could not be finished")
        straight, killed = trained(work / "straight"), trained(work / "killed")
        worst = max(float((straight[key] - killed[key]).abs().max()) for key in straight)
        print(f"largest difference of any weight: {worst}")
        sys.exit(worst > 0)


if __name__ == "__main__":
    main()
