"""A Python for tests without import time: each process is forked from one that has imported the libraries.

An ordinary Python process takes 5 to 10 seconds of processor time for its imports. The program `python()` is used like
Python (`-m MODULE`, a script) and is a process with its own output, signals and exit status. A fork of a server does
the work. In the fork `sys.executable` is this program too.

Tests of the entry point, of import time, and of environment variables at import start Python and `expertoken`
themselves.
"""

import atexit
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

# The client exits with the fork's status or signal. When the client is killed, the server kills the fork.
_CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
given = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(given).to_bytes(8, "big")], [0, 1, 2])
server.sendall(given)
pid = int.from_bytes(server.recv(8), "big")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int.from_bytes(server.recv(8), "big", signed=True)
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@cache
def python() -> str:
    """Start the server and return the path of the client program. The server ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="fresh"))
    address, program = str(folder / "socket"), folder / "python"
    program.write_text(_CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o700)
    given = [sys.executable, "-m", "expertoken.tests.fresh", address]
    server = subprocess.Popen(given, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    assert server.stdout is not None
    assert "listening\n" in iter(server.stdout.readline, "")  # libraries may print lines before it
    return str(program)


def expertoken(*arguments, **options) -> "subprocess.CompletedProcess[str]":
    """Run the command `expertoken` to its end."""
    return subprocess.run(command(*arguments), **{"capture_output": True, "text": True, "timeout": 550} | options)


def command(*arguments) -> list[str]:
    """Return the command line of `expertoken`."""
    return [python(), str(Path(sys.executable).parent / "expertoken"), *map(str, arguments)]


def _serve(address: str) -> None:
    """Fork for each connection and send the fork's exit status to it."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    while True:
        done = set()  # a fork may end at the same moment as its client
        for key, _ in waiting.select():
            if key.fileobj is listening:
                connection, _ = listening.accept()
                if (pid := _forked(connection)) is None:
                    connection.close()
                    continue
                with suppress(OSError):
                    connection.sendall(pid.to_bytes(8, "big"))
                ended = os.pidfd_open(pid)
                waiting.register(ended, selectors.EVENT_READ, (pid, ended, connection))
                waiting.register(connection, selectors.EVENT_READ, (pid, ended, connection))
                continue
            pid, ended, connection = key.data
            if pid in done:
                continue
            done.add(pid)
            waiting.unregister(ended)
            waiting.unregister(connection)
            if key.fileobj is connection:  # the client has exited
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(OSError):
                connection.sendall(status.to_bytes(8, "big", signed=True))
            os.close(ended)
            connection.close()


def _forked(connection: socket.socket) -> int | None:
    """Read a request, fork, and return the fork's process id, or None if the client left during its request.

    In the fork this function does not return.
    """
    length, files, *_ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(length, "big"), []
    while left:
        parts.append(connection.recv(min(left, 2**20)))
        if not parts[-1]:
            return None
        left -= len(parts[-1])
    argv, folder, environment = json.loads(b"".join(parts))
    if (pid := os.fork()) == 0:
        status = 1
        try:
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.closerange(3, 1024)
            status = _live(argv, folder, environment)
        finally:
            os._exit(status)
    for file in files:
        os.close(file)
    return pid


def _live(argv: list[str], folder: str, environment: dict[str, str]) -> int:
    """Run a module, a script or code as Python would, and return the exit status."""
    import torch

    sys.executable, *rest = argv
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server's parent may ignore SIGINT
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    places = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [place for place in places if place and place not in sys.path]
    sys.argv = [part for part in rest if part != "-u"] if rest[0] == "-u" else rest
    status: object = 0
    try:
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif sys.argv[0] == "-c":
            code = sys.argv.pop(1)
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0


if __name__ == "__main__":
    from expertoken.tests.torchvision_apart import usable_torchvision

    usable_torchvision()
    from expertoken.tests import preloaded  # noqa: F401

    _serve(sys.argv[1])
