"""The native kernel as a shared library: from the wheel, or compiled on the machine that runs it.

`cpu.cpp` is built once for each set of instructions, under a name made of its text, its flags and
those instructions. A wheel brings all of them in `prebuilt/`, and no compiler is needed. Elsewhere
any C++ compiler builds the one that is needed, in the user's cache folder. Wheels are built without
PyTorch, so this file does not import it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# Instruction sets, best first: the features of the processor, and the flags for the compiler. No
# -mtune=native, so that wheels are as fast: on a Zen 3 haswell is 0.99 of it, and none 0.97.
INSTRUCTIONS = {
    "avx512": (
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"},
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma",
         "-mf16c"],
    ),
    "avxvnni": ({"avx_vnni", "avx2", "fma", "f16c"}, ["-mavxvnni", "-mavx2", "-mfma", "-mf16c"]),
    "avx2": ({"avx2", "fma", "f16c"}, ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]),
    "neon": ({"asimddp"}, ["-march=armv8.2-a+dotprod"]),
    "portable": (set(), []),
}  # fmt: skip
# What a wheel for a machine holds. On other machines a compiler is needed.
OF_MACHINE = {
    "x86_64": ["avx512", "avxvnni", "avx2", "portable"],
    "aarch64": ["neon", "portable"],
}
# Without the last, GCC moves additions behind their products, whose sums then no longer fit in
# registers: 74 instead of 105 billion products a second with codes of four bits.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC", "-pthread", "-fno-tree-ter"]  # fmt: skip
PREBUILT = Path(__file__).with_name("prebuilt")


class CompilerMissing(Exception):
    """The kernel cannot be compiled or loaded here; the message says why."""


@cache
def available_instructions() -> list[str]:
    """Names of `INSTRUCTIONS` that this processor can run, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = ("flags", "Features")  # on x86 and on ARM
    flags = set(next((line for line in lines if line.startswith(names)), "").split())
    return [name for name, (needed, _) in INSTRUCTIONS.items() if needed <= flags]


def build(instructions: str) -> Path:
    """The shared library for these instructions: prebuilt, compiled before, or compiled now.

    Raises:
        CompilerMissing: it has to be compiled, and that failed as `compile_into` says.
    """
    name = library_name(instructions)
    if (library := PREBUILT / name).exists():
        return library
    library = cached_path(name)
    return library if library.exists() else compile_into(library.parent, instructions)


def cached_path(name: str) -> Path:
    """Where a file of this name is or may be written: the user's cache, if it is writable."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opennemo"
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists() or os.access(folder, os.W_OK):
            return folder / name
    with suppress(OSError, AttributeError):  # AttributeError: Windows has no user ids
        folder = Path(tempfile.gettempdir()) / f"opennemo-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.stat()
        # The library will run, so no other user may have written it.
        if about.st_uid == os.getuid() and not about.st_mode & 0o077:
            return folder / name
    return Path(tempfile.mkdtemp(prefix="opennemo-")) / name


def library_name(instructions: str) -> str:
    """The file's name, which changes with the source and the flags."""
    source = Path(__file__).with_name("cpu.cpp")
    parts = (source, source.with_name("blocks.h"), source.with_name("scales.h"))
    text = b"".join(part.read_bytes() for part in parts)
    options = FLAGS + INSTRUCTIONS[instructions][1]
    digest = hashlib.sha256(text + repr((sys.platform, options)).encode()).hexdigest()
    return f"cpu-{instructions}-{digest[:16]}.so"


def compile_into(folder: Path, instructions: str) -> Path:
    """Compile the kernel for these instructions, whole or not at all, unless another process has.

    Raises:
        CompilerMissing: no compiler was found ($CXX, c++, g++, clang++), it failed, or the folder
            cannot be written.
    """
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for n in names if n and (path := shutil.which(n))), None)
    if compiler is None:
        raise CompilerMissing("no C++ compiler found (tried $CXX, c++, g++ and clang++)")
    library = folder / library_name(instructions)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if library.exists():
                return library
            print(f"Compiling the CPU kernels ({instructions}), once ...", file=sys.stderr)
            built = Path(scratch) / library.name
            options = FLAGS + INSTRUCTIONS[instructions][1]
            source = Path(__file__).with_name("cpu.cpp")
            command = [compiler, *options, str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                reason = next((s for s in lines if "error" in s or "failed" in s), "".join(lines))
                raise CompilerMissing(f"{compiler} failed: {reason[-500:]}")
            # Renamed when whole: another process sees all of it or nothing.
            built.replace(library)
    except OSError as error:  # a full disk, or a compiler that does not start
        raise CompilerMissing(
            f"the CPU kernels cannot be compiled into {folder}: {error}"
        ) from error
    return library


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits for processes that compile into the same folder; Windows lets them all compile."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
