"""Runs scripts as from the command line, in processes that fork from one with torch imported, which takes seconds."""

import fcntl
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).parents[1]
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["torch", "torch._dynamo"])  # none of ours: each process imports it anew


class _Descriptor:
    """A file descriptor that is sent to the other process."""

    def __init__(self, fd: int):
        self.fd = fd

    def __reduce__(self):
        return reduction.DupFd(self.fd).detach, ()


def _run(argv: list[str], descriptors: list[int], cwd: str, environment: dict[str, str], controlled: bool) -> None:
    """Become that script: the exit code is multiprocessing's affair."""
    for fd, given in enumerate(descriptors):
        os.dup2(given, fd)
    if controlled:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    first, *rest = argv
    sys.path.insert(0, cwd if first in ("-c", "-m") else os.path.dirname(first))  # as Python itself does
    sys.argv = rest if first == "-m" else argv
    if first == "-c":
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


class Script:
    """A script of ours that runs: `argv` begins with its path, or has Python's -c or -m before what these take.

    stdin, stdout, stderr: file descriptors; this process may close its own when the script has been started.
    controlled: stdin is a terminal, and the Ctrl-C that it reads interrupts the script.
    """

    def __init__(
        self,
        *argv: Any,
        stdin: int,
        stdout: int,
        stderr: int,
        cwd: Path = REPO,
        controlled: bool = False,
        **environment: str,
    ):
        streams = [_Descriptor(fd) for fd in (stdin, stdout, stderr)]
        argv = [argv[0] if argv[0] in ("-c", "-m") else str(REPO / argv[0]), *map(str, argv[1:])]
        args = argv, streams, str(cwd), os.environ | environment, controlled
        self.process = FORKING.Process(target=_run, args=args)
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 120) -> int | None:
        """The exit code; None if the script still runs after so many seconds."""
        self.process.join(timeout)
        return self.process.exitcode


def run_script(
    *argv: Any, stdin: bytes | int = b"", encoding: str = "utf-8", **more: Any
) -> subprocess.CompletedProcess:
    """Run a script to its end, as subprocess.run would with its output captured.

    stdin: what it reads, or a file descriptor.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if isinstance(stdin, bytes):
            given.write(stdin)
            given.seek(0)
            stdin = given.fileno()
        code = Script(*argv, stdin=stdin, stdout=out.fileno(), stderr=err.fileno(), **more).wait()
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess([*argv], code, *said)
