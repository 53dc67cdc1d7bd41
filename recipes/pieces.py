"""A model folder in small pieces, with its matrices in FP8: to carry away and train further.

    python -m recipes.pieces pack MODEL PIECES [--most 16000000]
    python -m recipes.pieces unpack PIECES MODEL

A piece is a safetensors file of at most that many bytes. Matrices become E4M3 with a scale a row, a
quarter of float32; vectors and the folder's other files (settings, vocabulary) stay as they are.
`unpack` gives a folder in float32, which a recipe takes as `model.path`: the state of the optimiser
is left behind, so a run that continues from there warms up again. Every piece names how many there
are, and each row's place: missing or changed pieces are refused.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opennemo.errors import CheckpointError, OpenNemoError
from opennemo.files import new_folder
from opennemo.model.formats import FORMATS

MOST = 16_000_000  # bytes of a piece
HEADER = 100_000  # of those, for its header
SPLIT = "#"  # between a matrix's name and the first of its rows that lie here
SCALE, FILE = ".scale", "file:"


def pack(model: Path, out: Path, most: int = MOST) -> int:
    """Write a model folder as pieces into a new folder; returns how many.

    Raises:
        CheckpointError: there is no model, or a file of it is larger than a piece; or `out` exists.
    """
    room = most - HEADER
    if room <= 0:
        raise CheckpointError(f"pieces of {most:,} bytes: {HEADER:,} of each are for its header")
    pieces: list[dict[str, Tensor]] = [{}]
    used = 0
    for tensors in _parts(model, room):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if used + size > room:
            pieces.append({})
            used = 0
        pieces[-1] |= tensors
        used += size
    with new_folder(out) as folder:
        for i, tensors in enumerate(pieces):
            digest = _digest(tensors)
            place = {"piece": str(i), "pieces": str(len(pieces)), "sha256": digest}
            save_file(tensors, folder / f"{i:03}.safetensors", place)
    return len(pieces)


def unpack(pieces: Path, out: Path) -> None:
    """The opposite of `pack`: a model folder in float32.

    Raises:
        CheckpointError: a piece is missing, damaged, or of another model; or `out` exists.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    files: dict[str, Tensor] = {}
    for tensors in _read(pieces):
        for name, tensor in tensors.items():
            if name.startswith(FILE):
                files[name.removeprefix(FILE)] = tensor
            elif not name.endswith(SCALE):
                whole, _, start = name.partition(SPLIT)
                if start:
                    scale = tensors[name + SCALE]
                    tensor = FORMATS["fp8"].weights.dequantize(tensor, scale, torch.float32)
                parts.setdefault(whole, []).append((int(start or 0), tensor))
    weights = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        weights[name] = torch.cat([tensor for _, tensor in found])
    with new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for name, content in files.items():
            (folder / name).write_bytes(bytes(content.tolist()))


def _parts(model: Path, room: int) -> Iterator[dict[str, Tensor]]:
    """What goes into one piece together: rows of a matrix and their scales, a vector, a file."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model}: holds no model in safetensors files")
    for path in sorted(set(model.iterdir()) - set(files)):
        # The index names files that will not be there.
        if path.is_file() and not path.name.endswith(".safetensors.index.json"):
            content = path.read_bytes()
            if len(content) > room:
                raise CheckpointError(f"{path}: {len(content):,} bytes, more than a piece holds")
            yield {
                FILE + path.name: torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)
            }
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                yield from _rows(name, file.get_tensor(name), room)


def _rows(name: str, weight: Tensor, room: int) -> Iterator[dict[str, Tensor]]:
    if weight.dim() != 2:
        yield {name: weight.float()}
        return
    if weight.dtype == torch.float8_e4m3fn:
        raise CheckpointError(f"{name}: is in codes already; pack the model in full precision")
    rows = max(1, room // (weight.shape[1] + 4))
    for start in range(0, len(weight), rows):
        codes, scale = FORMATS["fp8"].weights.quantize(weight[start : start + rows])
        yield {f"{name}{SPLIT}{start}": codes, f"{name}{SPLIT}{start}{SCALE}": scale}


def _read(pieces: Path) -> Iterator[dict[str, Tensor]]:
    paths = sorted(pieces.glob("*.safetensors"))
    expected = max(len(paths), 1)
    for i in range(expected):
        path = pieces / f"{i:03}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                place = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if place.get("pieces") != str(expected):
            raise CheckpointError(
                f"{path}: one of {place.get('pieces', 'no')} pieces, and {len(paths)} are here"
            )
        if _digest(tensors) != place.get("sha256"):
            raise CheckpointError(f"{path}: damaged: its content is not what was written")
        yield tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(tensors)).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path, help="a model folder, or one of pieces")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--most", type=int, default=MOST, help="bytes of a piece")
    options = parser.parse_args()
    try:
        if options.verb == "pack":
            print(f"{pack(options.source, options.out, options.most)} pieces in {options.out}")
        else:
            unpack(options.source, options.out)
    except OpenNemoError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
