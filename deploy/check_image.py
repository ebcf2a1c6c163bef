"""Check of the image without a container engine: `check_image.py --roots DIR --mount demo/composite:/composite`.

The script runs each instruction of deploy/Dockerfile in bare Debian roots that debootstrap makes. Then it starts
ENTRYPOINT and CMD in the last root, waits for the health check, and requests an answer. It needs root, `debootstrap`,
`dockerfile-parse` (extra `dev`), and a network connection to Debian and to a package index. It stops at an unknown
instruction, so that the whole file is checked. It also stops at base images other than Debian's.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from dockerfile_parse import DockerfileParser

_DOCKERFILE = Path(__file__).with_name("Dockerfile")
_CONTEXT = _DOCKERFILE.parent.parent
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IGNORED = ("EXPOSE", "COMMENT")
_KEY = "a-key-for-this-check-alone"


@dataclass
class Stage:
    """State after one FROM and the instructions that follow: a root folder, and settings for later commands."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    folder: str = "/"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def chroot(self, command: list[str], **more: str) -> tuple[list[str], dict[str, str]]:
        """Return the command line and the environment of a command inside this root, with its user and folder."""
        inside = ["/bin/sh", "-c", f"cd {shlex.quote(self.folder)} && exec {shlex.join(command)}"]
        environment = {"PATH": _PATH} | self.arguments | self.environment | more
        return ["chroot", f"--userspec={self.user}", str(self.root), *inside], environment

    def run(self, script: str, **more: str) -> None:
        """Run a shell script inside this root.

        Raises:
            SystemExit: The script failed.
        """
        command, environment = self.chroot(["/bin/sh", "-ec", script], **more)
        if (code := subprocess.run(command, env=environment, check=False).returncode) != 0:
            raise SystemExit(f"exited with status {code}: {script}")


def bare(image: str, root: Path) -> None:
    """Create a bare Debian root.

    Raises:
        SystemExit: The image is not Debian's.
    """
    name, _, tag = image.partition(":")
    if name != "debian":
        raise SystemExit(f"{image}: expected debian:SUITE-slim, the only base image that this script can make")
    subprocess.run(["debootstrap", "--variant=minbase", tag.removesuffix("-slim"), str(root)], check=True)


def copied(value: str, stage: Stage, stages: dict[str, Stage]) -> None:
    """Execute COPY, from the checkout's tracked files or from an earlier stage.

    Raises:
        SystemExit: The instruction has options that this script does not support.
    """
    *options, source, target = shlex.split(value)
    unknown = [option for option in options if not option.startswith("--from=")]
    if unknown or len(options) > 1:
        raise SystemExit(f"COPY {value}: expected one source and no option except --from")
    to = stage.root / target.lstrip("/")
    if options:
        shutil.copytree(stages[options[0].removeprefix("--from=")].root / source.lstrip("/"), to, symlinks=True)
    elif source == ".":
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=_CONTEXT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_CONTEXT / name, to / name)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_CONTEXT / source, to)


def build(roots: Path, given: dict[str, str], host_files: list[Path], host_variables: dict[str, str]) -> Stage:
    """Execute the whole file and return its last stage.

    Args:
        roots: Folder for the root of each stage. It has to be empty or missing.
        given: Values for ARG, as `--build-arg` gives them.
        host_files: Files and folders that a build needs on this machine, such as a package index's settings. They are
            in the roots during RUN.
        host_variables: Environment of RUN, for the same purpose.

    Raises:
        SystemExit: An instruction failed or is unknown.
    """
    stages: dict[str, Stage] = {}
    stage = Stage(roots)
    for step in DockerfileParser(path=str(_DOCKERFILE)).structure:
        kind, value = step["instruction"], step["value"]
        print(f"--- {kind} {value[:150]}", flush=True)
        if kind == "FROM":
            image, _, name = value.partition(" AS ")
            stage = stages[name or "last"] = Stage(roots / (name or "last"))
            bare(image, stage.root)
        elif kind == "ARG":
            name, _, default = value.partition("=")
            stage.arguments[name] = given.get(name, default)
        elif kind == "RUN":
            placed = [place(path, stage.root) for path in host_files]
            stage.run(value, **host_variables)
            for path in filter(None, placed):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif kind == "COPY":
            copied(value, stage, stages)
        elif kind not in _IGNORED:
            setting(kind, value, stage)
    return stage


def setting(kind: str, value: str, stage: Stage) -> None:
    """Execute an instruction that changes no file.

    Raises:
        SystemExit: The instruction is unknown.
    """
    if kind == "ENV":
        for pair in shlex.split(value):
            name, _, text = pair.partition("=")
            stage.environment[name] = text.replace("$PATH", stage.environment.get("PATH", _PATH))
    elif kind == "USER":
        stage.user = value
    elif kind == "WORKDIR":
        stage.folder = value
    elif kind == "HEALTHCHECK":
        stage.health = json.loads(value.partition("CMD ")[2])
    elif kind == "ENTRYPOINT":
        stage.entrypoint = json.loads(value)
    elif kind == "CMD":
        stage.command = json.loads(value)
    else:
        raise SystemExit(f"{kind}: unknown instruction. Add it to this script.")


def place(path: Path, root: Path) -> Path | None:
    """Copy a file or folder of this machine to the same path in a root. Return that path if it is new."""
    to = root / str(path).lstrip("/")
    new = not to.exists()
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, to, dirs_exist_ok=True)
    else:
        shutil.copy2(path, to)
    return to if new else None


def asked(stage: Stage, mounted: dict[Path, str]) -> None:
    """Start the image's command, wait for its health check, and request one answer.

    Args:
        stage: Last stage of the file.
        mounted: Files and folders of this machine, each with its path in the image. The composite is one of them.

    Raises:
        SystemExit: The server does not become healthy within two minutes.
        HTTPStatusError: The server returns an error instead of an answer.
        TimeoutExpired: The server does not exit after SIGTERM.
    """
    for source, target in mounted.items():
        to = stage.root / target.lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, to) if source.is_dir() else shutil.copy2(source, to)
    process_files = str(stage.root / "proc")  # every engine mounts it into a container, and PyTorch reads it
    subprocess.run(["mount", "-t", "proc", "proc", process_files], check=True)
    given, environment = stage.chroot([*stage.entrypoint, *stage.command], EXPERTOKEN_API_KEYS=_KEY, HF_HUB_OFFLINE="1")
    server = subprocess.Popen(given, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 120
        health, quiet = stage.chroot(stage.health)
        while subprocess.run(health, env=quiet, stderr=subprocess.DEVNULL, check=False).returncode:
            if time.monotonic() > end or server.poll() is not None:
                raise SystemExit("the health check did not succeed within two minutes, or the server exited")
            time.sleep(1)
        body = {"model": "composite", "messages": [{"role": "user", "content": "What is 34 + 58?"}], "max_tokens": 20}
        reply = httpx.post(
            "http://127.0.0.1:8000/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {_KEY}"},
            timeout=120,
        )
        print(reply.status_code, reply.text[:1000])
        reply.raise_for_status()
        os.killpg(server.pid, signal.SIGTERM)
        print("exited with status", server.wait(timeout=60))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        subprocess.run(["umount", "--lazy", process_files], check=True)


def main() -> None:
    """Read the command line, build the image, and request an answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roots", type=Path, required=True, help="Folder for the roots, which take some gigabytes.")
    parser.add_argument(
        "--mount",
        action="append",
        required=True,
        metavar="SOURCE:TARGET",
        help="Composite, or a model that it names, with its path in the image. May be repeated.",
    )
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="Value for ARG.")
    parser.add_argument(
        "--host-file",
        type=Path,
        action="append",
        default=[],
        help="File of this machine that RUN instructions read, such as pip.conf. Repeatable.",
    )
    parser.add_argument(
        "--host-variable",
        action="append",
        default=[],
        help="Name of a variable here that RUN instructions read.",
    )
    arguments = parser.parse_args()
    stage = build(
        arguments.roots,
        dict(pair.split("=", 1) for pair in arguments.build_arg),
        arguments.host_file,
        {name: os.environ[name] for name in arguments.host_variable},
    )
    asked(stage, {Path(source): target for source, target in (pair.split(":", 1) for pair in arguments.mount)})


if __name__ == "__main__":
    main()
