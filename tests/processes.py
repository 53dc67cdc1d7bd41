"""Python programs in processes of their own, which begin where PyTorch is imported.

Each is a fork of one process that waits (this file, run), and saves the seconds that importing and
unloading takes. Files, arguments, environment, folder, session and exit code are its own, as if
Python had been started. Where forks are not safe Python is started.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Fork:
    """A process that was forked, as `subprocess.Popen` shows one."""

    def __init__(self, answers: socket.socket):
        self._answers, self.returncode = answers, None
        self.pid = int(answers.recv(99))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._answers.recv(99))
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: Any,
    stdin: Any = subprocess.DEVNULL,
    stdout: Any = None,
    stderr: Any = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    session: bool = False,
) -> "Fork | subprocess.Popen[bytes]":
    """`python ARGUMENTS`: `-m MODULE`, `-c CODE` or a file, and what it is given.

    Args:
        stdin, stdout, stderr: files or descriptors, or DEVNULL; by default this process' output.
        session: whether it leads a session, on the terminal that `stdin` may be.
    """
    command = list(map(str, arguments))
    if sys.platform == "linux":
        import resource
    else:
        return subprocess.Popen(
            [sys.executable, *command], stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd,
            env=env, start_new_session=session,
        )  # fmt: skip
    asked = {
        "arguments": command, "cwd": str(cwd or Path.cwd()), "session": session,
        "env": dict(os.environ if env is None else env),
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
    }  # fmt: skip
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, open(os.devnull, "r+b") as nothing:
        files: list[Any] = [theirs]
        for file, usual in ((stdin, 0), (stdout, 1), (stderr, 2)):
            files.append(nothing if file == subprocess.DEVNULL else usual if file is None else file)
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        socket.send_fds(_waiting(), [json.dumps(asked).encode()], numbers)
    return Fork(ours)


def run(*arguments: Any, input: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """What `subprocess.run` gives of it, with its output captured."""
    file = tempfile.TemporaryFile
    with file() as given, file() as out, file() as err:
        given.write(input)
        given.seek(0)
        process = start(*arguments, stdin=given, stdout=out, stderr=err, **options)
        try:
            code = process.wait(600)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


@cache
def _waiting() -> socket.socket:
    """Where the process that waits takes requests; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return ours


# ---- the process that waits ----------------------------------------------------------------------


def _forked(requests: socket.socket) -> list[str]:
    """Waits for requests, and returns in a fork for each of them: the arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, files, *_ = socket.recv_fds(requests, 2**20, 4)
        if not data:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers, *files = files
    if pid := os.fork():  # a parent of its own for each, which says how it ends
        for file in files:
            os.close(file)
        with socket.socket(fileno=answers) as answer:
            answer.send(str(pid).encode())
            answer.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        os._exit(0)
    os.close(answers)
    asked = json.loads(data)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    import fcntl
    import resource
    import termios

    if asked["session"]:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, asked["descriptors"])
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    return asked["arguments"]


def _end(code: int) -> None:
    """As Python ends, but that nothing is unloaded, which takes longer than most programs."""
    import atexit
    import threading

    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _main() -> None:
    import gc
    import runpy
    import traceback

    import opennemo.cli
    import opennemo.llm
    import opennemo.terminal

    with suppress(ModuleNotFoundError):  # packages of an extra
        import opennemo.batch.api
        import opennemo.serve.server  # noqa: F401
    gc.freeze()
    first, *rest = _forked(socket.socket(fileno=int(sys.argv[1])))
    try:
        if first == "-m":
            sys.argv, sys.path[0] = rest, str(Path.cwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = [first, *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  as Python does
        traceback.print_exc()
        code = 1
    _end(code)


if __name__ == "__main__":
    _main()
