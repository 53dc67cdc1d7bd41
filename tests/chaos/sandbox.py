"""A process that opens files that may be anything, and is watched for everything they could do.

Whatever is done to a file, a loader may answer in two ways: with what it loaded, or with an
OpenNemoError of one line. `Sandbox.open` fails a test for everything else: another exception, a
crash of the process, an answer that does not come, or memory out of proportion to the file.
"""

import multiprocessing
import resource
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds for a file of some kilobytes: what takes so long hangs
ROOM = 2 << 30  # bytes of addresses beyond what good files of every kind take
# Bytes that may be touched besides 32 times the file's: allocators keep some, and tokenizers have
# tables for every id.
FIXED = 64 << 20


class Sandbox:
    """Opens files in a process of its own, which is started again when a file has ended it."""

    def __init__(self, good: dict[str, Path]):
        """`good` has a file, or folder, of every kind that will be opened."""
        self._good, self._process = good, None

    def open(self, kind: str, path: Path, n_bytes: int) -> str | None:
        """Load a file or folder, in which so many bytes are strange -> why it was refused."""
        if self._process is None:
            self._start()
        refusal, failure, used = self._ask(kind, path)
        assert failure is None, f"{kind}: {failure}"
        assert refusal is None or "\n" not in refusal, f"{kind}: more than a line: {refusal}"
        most = FIXED + 32 * n_bytes
        assert used <= most, f"{kind}: {used:,} bytes of memory for a file of {n_bytes:,}"
        return refusal

    def _start(self) -> None:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))  # where the process looks for this module
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        for kind, path in self._good.items():  # imports what it takes
            refusal, failure, _ = self._ask(kind, path)
            assert not refusal and not failure, f"{kind}: {refusal or failure}"
        self._pipe.send((None, None))

    def _ask(self, kind: str, path: Path) -> tuple[str | None, str | None, int]:
        assert self._process is not None
        self._pipe.send((kind, path))
        try:
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
            what = f"no answer within {PATIENCE} s"
        except EOFError:
            what = "the process died"
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        raise AssertionError(f"{kind}: {what} ({code})")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _work(pipe: Connection) -> None:
    from opennemo.errors import OpenNemoError
    from tests.chaos.loaders import LOADERS

    while True:
        try:
            kind, path = pipe.recv()
        except EOFError:
            return
        if kind is None:  # imports are over: from now on memory is bounded
            size = _status("VmSize") + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            continue
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before, refusal, failure = _status("VmHWM"), None, None
        try:
            LOADERS[kind](path)
        except OpenNemoError as error:
            refusal = str(error)
        except BaseException:  # noqa: BLE001  a panic of a Rust library is no Exception
            failure = traceback.format_exc()
        pipe.send((refusal, failure, _status("VmHWM") - before))


def _status(field: str) -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
