"""Weights of a run that is killed repeatedly, compared to an undisturbed run's: `python benchmarks/kill_resume.py`.

The run is method lora on a tiny random model, with dropout and Adam. One run is not disturbed. All processes of another
run receive SIGKILL at ten random moments, while it starts, trains, or writes a checkpoint. The same command resumes it
each time. Prints the checkpoint reached at each kill and the largest difference of any weight at the end. The exit
status is 0 only if that difference is 0.
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
    """Describe the last complete checkpoint and any incomplete ones."""
    if not folder.exists():
        return "no output folder yet"
    whole = last_complete_checkpoint(folder)
    torn = [entry.name for entry in folder.glob("checkpoint-*") if not (entry / "trainer_state.json").exists()]
    return f"{whole.name if whole else 'no complete checkpoint'}{', incomplete: ' + ', '.join(torn) if torn else ''}"


def main() -> None:
    """Parse the command line, run both and compare their weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ddp", help="Launch configuration. Default: %(default)s.")
    parser.add_argument("--kills", type=int, default=10, help="Number of kills. Default: %(default)s.")
    parser.add_argument("--steps", type=int, default=1000, help="Number of training steps. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the kills' moments. Default: %(default)s.")
    parser.add_argument("--work", type=Path, help="Folder to keep all files in. Default: a temporary folder.")
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
            sys.exit("The undisturbed run failed.")
        length = time.perf_counter() - begun
        print(f"undisturbed run: {length:.0f} s, {beginning:.0f} s of it to the first checkpoint", flush=True)
        for number in range(options.kills):
            process = start(options.config, work / "killed", *run)
            # Some kills fall into the start-up. The others together leave a part of the run for the last start.
            moment = moments.uniform(0.5 * beginning, beginning + 1.5 * (length - beginning) / options.kills)
            try:
                if process.wait(moment):
                    sys.exit(f"Kill {number + 1}: the run failed before it.")
                sys.exit(f"Kill {number + 1}: the run finished before it. Increase --steps.")
            except psutil.TimeoutExpired:
                kill(process)
            print(f"kill {number + 1} after {moment:.1f} s: {reached(work / 'killed')}", flush=True)
        if start(options.config, work / "killed", *run).wait():
            sys.exit("The killed run failed after its last resume.")
        straight, killed = trained(work / "straight"), trained(work / "killed")
        worst = max(float((straight[key] - killed[key]).abs().max()) for key in straight)
        print(f"largest difference of any weight: {worst}")
        sys.exit(worst > 0)


if __name__ == "__main__":
    main()
