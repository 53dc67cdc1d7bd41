"""The memory that a model needs and that is available: arithmetic before anything is loaded.

A `Form` says what weights become as they are loaded, `forms` which of them a model can have, and
`Needs` what one takes. The engine decides how much context fits beside it (engine/sizes.py).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import EMBEDDING, HEAD, Checkpoint, Form
from opennemo.model.compressed import is_stored_in_codes, misfit
from opennemo.model.formats import FORMATS, by_name, names
from opennemo.model.pages import rounding_of
from opennemo.model.transformer import ModelConfig
from opennemo.progress import size

# Leaves room for uncounted memory: PyTorch's own, grammars, fragments.
USABLE = 0.9
STORED = "stored"  # the form of a model that stays in the codes it is stored in
# What weights that do not fit are rounded to, best first.
# `int4` is for a model whose widths no block fits, and for a GPU, where nothing becomes blocks.
ROUNDED = {"cpu": ("int8", "q4_k", "int4"), "cuda": ("fp8", "int4")}


def open_device(name: str | None = None) -> str:
    """The device of this name ("cpu", "cuda", "cuda:1"), by default a GPU if there is one.

    Raises:
        InvalidRequest: there is no such device here.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if n_gpus else "cpu"
    match = re.fullmatch("cpu|cuda(?::([0-9]+))?", name)
    if match is None:
        raise InvalidRequest(f"device {name!r}: allowed are cpu, cuda, and cuda:0 and so on")
    if name != "cpu" and int(match[1] or 0) >= n_gpus:
        found = f"{n_gpus} GPUs" if n_gpus else "no GPU"
        if not torch.backends.cuda.is_built():
            found = "only the CPU: this build has no CUDA (pip install torch has, on Linux)"
        raise InvalidRequest(f"device {name}: PyTorch {torch.__version__} finds {found}")
    return name


def forms(checkpoint: Checkpoint, device: str, *, ranks: bool = False) -> dict[str, Form]:
    """The forms that a model can run in on "cpu" or "cuda", by name; the best comes first.

    PyTorch runs many `ranks` on a CPU: its numbers between products are of the type of the weights.
    Ranks take no codes.
    """
    on_cpu, shapes = device == "cpu", checkpoint.shapes
    short = checkpoint.dtype == torch.bfloat16 and not ranks
    multiplied = on_cpu or (find_spec("triton") and checkpoint.unpacked_on_gpu)
    blocks = bool(multiplied and checkpoint.in_blocks and not ranks)
    rest = torch.bfloat16 if short or not on_cpu else torch.float32
    best = ("bf16", "fp32") if short or not on_cpu else ("fp32", "bf16")
    # A quarter of a small model's time is its head. Codes of 8 bits cost it next to nothing
    # (docs/results/quantisation.md), and llama.cpp does the same; folders keep it whole for others.
    head = FORMATS["int8"] if on_cpu else None
    made = {}
    if checkpoint.format or blocks:
        made[STORED] = Form(dtype=rest, blocks=blocks, head=head if checkpoint.format else None)
    if checkpoint.format is None:
        for name in dict.fromkeys((*best, *ROUNDED[device], *names("load"))):
            row = by_name(name)
            if not row.in_codes:
                made[name] = Form(dtype=row.weights.dtype)
            elif not ranks and (name in FORMATS or (on_cpu and not misfit(row, shapes))):
                made[name] = Form(dtype=rest, blocks=blocks, format=row, head=head)
    return made


def automatic(made: Iterable[str], device: str) -> list[str]:
    """The names of `forms` that are tried by default, in this order."""
    tried = [name for name in made if name in (STORED, "fp32", "bf16")]
    # After codes, or 16 bits, wider numbers would add no precision.
    tried = tried if tried[0] == "fp32" else tried[:1]
    return tried + [name for name in ROUNDED[device] if name in made]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The bytes that a model takes in a form."""

    weights: int  # as they run
    loading: int  # besides, while they are loaded
    read: int  # of the weights, for one token

    @classmethod
    def of(cls, checkpoint: Checkpoint, form: Form, device: str = "cpu") -> "Needs":
        """Without loading it."""
        on_cpu, shapes = device == "cpu", checkpoint.shapes
        tied = checkpoint.config.tied_embeddings
        weights = read = largest = 0
        layers: Counter[str] = Counter()  # bytes that are packed together, by layer or name
        for name, shape in (shapes | ({HEAD: shapes[EMBEDDING]} if tied else {})).items():
            format = checkpoint.runs_in(name, form)
            packed = on_cpu and len(shape) == 2 and name != EMBEDDING
            bytes_of = format.packed_bytes if packed else format.nbytes
            n_bytes = bytes_of(math.prod(shape[:-1]), shape[-1])
            if not (name == HEAD and tied) or packed:
                weights += n_bytes
            if name != EMBEDDING:
                read += n_bytes
            # A matrix is read as it is stored, or dequantised, before it has its form.
            number = max(checkpoint.dtype.itemsize, checkpoint.files.bytes_to_decode)
            in_blocks = format.kernel is not None and format.kernel.in_blocks
            stays = in_blocks and not (form.format and is_stored_in_codes(name))
            largest = max(largest, number * math.prod(shape) * (not stays))
            of_layer = name.split(".")[1] if name.startswith("layers.") else name
            layers[of_layer] += n_bytes * packed
        # First, matrices get their form one by one; then a CPU packs layer after layer.
        return cls(weights=weights, loading=max(largest, *layers.values()), read=read)


def kv_bytes(config: ModelConfig, kv: str) -> int:
    """Bytes of a token of context in a KV cache of a format, in all layers."""
    heads = 2 * config.n_layers * config.n_kv_heads
    return math.ceil(heads * rounding_of(kv).row_bytes(config.head_dim))


def activations(config: ModelConfig, n_tokens: int, n_rows: int) -> int:
    """Bytes of a CPU's step of this many tokens, with three copies of the logits of `n_rows`."""
    c = config
    attention = (2 * c.n_heads + 2 * c.n_kv_heads + 1) * c.head_dim
    return 4 * (n_tokens * (3 * c.dim + attention + 2 * c.hidden_dim) + 3 * n_rows * c.vocab_size)


def machine_memory() -> dict[str, int]:
    """Bytes of memory by device: "cpu", within a container's limit, and each "cuda:N"."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = {"cpu": min([physical, *(limit for limit, _ in _control_groups())])}
    for i in range(torch.cuda.device_count()):
        memory[f"cuda:{i}"] = torch.cuda.get_device_properties(i).total_memory
    return memory


def available_memory() -> dict[str, int]:
    """The memory that is available now; cached files do not count as used."""
    free = [machine_memory()["cpu"], *(limit - used for limit, used in _control_groups())]
    if (meminfo := Path("/proc/meminfo")).exists():
        match = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text("ascii"), re.MULTILINE)
        free += [int(match[1]) * 1024] if match else []
    memory = {"cpu": max(0, min(free))}
    for i in range(torch.cuda.device_count()):
        memory[f"cuda:{i}"] = torch.cuda.mem_get_info(i)[0]
    return memory


def refuse_beyond(n_bytes: int, what: str) -> None:
    """Raises: InvalidRequest, this much main memory is not available."""
    room = int(USABLE * available_memory()["cpu"])
    if n_bytes > room:
        raise InvalidRequest(f"{what} takes {size(n_bytes)}, and {size(room)} may be taken")


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limits of this process's groups, and what is used of each: cgroups of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            mount, limit, usage, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, prefix = root / "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's; its own group is then mounted at the top.
        inner = mount / path.lstrip("/")
        for group in (inner, *inner.parents):
            if not group.is_relative_to(mount):
                break
            try:
                most, used = (group / limit).read_text("ascii"), (group / usage).read_text("ascii")
                stat = (group / "memory.stat").read_text("ascii")
            except OSError:
                continue
            if most.strip().isdigit():
                files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", stat, re.MULTILINE)
                yield int(most), max(0, int(used) - sum(map(int, files)))
