"""Several models of one shape merged into one, matrix by matrix.

The arithmetic is mergekit's, in float32. `linear` is a weighted mean (model soups). `slerp` goes
along the arc between two models. `ties` and `dare` add to a base what fine-tunes changed in it:
TIES keeps the largest changes of each and those that agree in sign with their sum, DARE keeps
random ones and scales them up.

A matrix of each model is mapped as it is stored and read some rows at a time, so that a merge needs
memory for one matrix of each model and for the result, however large the models are.

Sources: model soups (arXiv:2203.05482), SLERP (Shoemake 1985), task arithmetic (arXiv:2212.04089),
TIES (arXiv:2306.01708), DARE (arXiv:2311.03099), and mergekit's parameters (arXiv:2403.13257).
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.files import new_folder
from opennemo.model.checkpoint import Checkpoint, open_checkpoint, write_model
from opennemo.model.companions import copy_companions
from opennemo.model.layouts import Layout
from opennemo.progress import Progress
from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.load import difference

Method = Literal["linear", "slerp", "ties", "dare"]
METHODS: tuple[Method, ...] = ("linear", "slerp", "ties", "dare")
ON_A_BASE = ("ties", "dare")
ROWS = 2**20  # numbers of a matrix that are computed at a time
PARALLEL = 0.9995  # a cosine beyond which an arc is a line
MAX_MODELS = 64


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How models are merged, with mergekit's names.

    Attributes:
        weights: of each model; one number stands for all, none for equal shares.
        densities: of ties and dare, the share of each model's changes that is kept, from 0 to 1.
        t: of slerp, from 0 (the first model) to 1 (the second).
        normalize: whether the sum is divided by the weights that are in it; by default for linear
            and ties, as in mergekit.
        seed: of dare; the same seed drops the same changes.
    """

    method: Method
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    t: float = 0.5
    normalize: bool | None = None
    seed: int = 0

    def for_models(self, n_given: int, chosen: Sequence[int] | None = None) -> "Mixing":
        """The same with a weight and a density for each of so many models, or of those `chosen`.

        Raises:
            InvalidRequest: a number is out of bounds or does not belong to the method, or there are
                not as many as models.
        """
        if self.method not in METHODS:
            raise InvalidRequest(f"method is {self.method}, allowed are {', '.join(METHODS)}")
        chosen = range(n_given) if chosen is None else chosen
        n, two_only = len(chosen), self.method == "slerp"
        if not 2 - (self.method in ON_A_BASE) <= n <= (2 if two_only else MAX_MODELS):
            wanted = "two models" if two_only else f"up to {MAX_MODELS} models beside a base"
            wanted = f"two to {MAX_MODELS} models" if self.method == "linear" else wanted
            raise InvalidRequest(f"{self.method} merges {wanted}, and there are {n}")
        if two_only and self.weights:
            raise InvalidRequest("weights do not belong to slerp, which has t")
        for name, is_given, methods in (
            ("densities", self.densities, ON_A_BASE),
            ("t", self.t != Mixing.t, ("slerp",)),
            ("normalize", self.normalize, ("linear", *ON_A_BASE)),
            ("seed", self.seed != Mixing.seed, ("dare",)),
        ):
            if is_given and self.method not in methods:
                owners = " and ".join(methods)
                raise InvalidRequest(f"{name} does not belong to {self.method}, but to {owners}")
        weights, densities = self.weights or (1 / n,), self.densities or (1.0,)
        for name, given in (("weights", weights), ("densities", densities)):
            if len(given) not in (1, n_given):
                wrong = f"{name} are {len(given)} numbers, and there are {n_given} models"
                raise InvalidRequest(wrong)
        weights, densities = (
            tuple(given[i if len(given) > 1 else 0] for i in chosen)
            for given in (weights, densities)
        )
        if bad := [w for w in weights if not -100 <= w <= 100]:
            raise InvalidRequest(f"a weight is {bad[0]:g}, allowed is -100 to 100")
        if bad := [d for d in densities if not 0 < d <= 1]:
            raise InvalidRequest(f"a density is {bad[0]:g}, allowed is more than 0, up to 1")
        if not 0 <= self.t <= 1:
            raise InvalidRequest(f"t is {self.t:g}, allowed is 0 to 1")
        normalize = self.method in ("linear", "ties") if self.normalize is None else self.normalize
        if normalize and self.method != "slerp" and abs(sum(weights)) < 1e-8:
            raise InvalidRequest("weights add up to 0, by which a sum cannot be divided")
        return replace(self, weights=weights, densities=densities, normalize=normalize)


def merge_models(
    paths: Sequence[Path],
    dst: Path,
    mixing: Mixing,
    *,
    base: Path | None = None,
    companions: Path | None = None,
    to: Layout = "hf",
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the merge of some models as a folder in a layout, or as a GGUF file.

    A base that is also among the models does not count as one of them. Folders get a card that says
    how they were made.

    Args:
        base: what the models of ties and dare were made of.
        companions: whose settings, tokenizer and template are taken: one of the models; by default
            the base, or else the first.
        dtype: of the weights, by default as those of `companions` are stored.
        progress: called with the bytes of weights that are written, and of all.
        say: called with each warning, one line.

    Raises:
        InvalidRequest: a setting of the method is missing or invalid.
        CheckpointError: as for `convert`; or models differ in shape, in what they compute or in
            their vocabulary; the first five tensors or settings are named.
    """
    if (base is not None) != (mixing.method in ON_A_BASE):
        needs = "needs the base that the models were made of" if base is None else "has no base"
        raise InvalidRequest(f"{mixing.method} {needs}")
    first = companions or base or paths[0]
    if first not in (*paths, base):
        raise InvalidRequest(f"{first}: is not one of the models that are merged")
    chosen = [i for i, path in enumerate(paths) if path != base]
    mixing, paths = mixing.for_models(len(paths), chosen), [paths[i] for i in chosen]
    opened = {path: open_checkpoint(path) for path in dict.fromkeys((first, *paths, base)) if path}
    source = opened[first]
    for path, other in opened.items():
        _compare(first, source, path, other)
    _compare_vocabularies(first, list(opened), say)
    of_base = opened[base] if base else None
    wanted = dtype or source.dtype

    def read(name: str) -> Tensor:
        given = [opened[path].read(name) for path in paths]
        return merged(mixing, name, given, of_base and of_base.read(name), wanted)

    if to == "gguf":
        from opennemo.model import gguf_writer as writer

        types, number = writer.plain_types(source.shapes, wanted)
        writer.write_gguf(
            dst, first, source, types=types, file_type=number, read=read, progress=progress
        )
        return
    with new_folder(dst) as partial:
        tensors = {name: (wanted, shape) for name, shape in source.shapes.items()}
        write_model(partial, to, source.config, tensors, read, progress=progress)
        copy_companions(first, partial, layout=to)
        card = _card(dst.name, mixing, paths, base, first, wanted)
        (partial / "README.md").write_text(card, encoding="utf-8")


def merged(
    mixing: Mixing,
    name: str,
    given: Sequence[Tensor],
    base: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One weight of the merged model from those of the models, all of one shape.

    Args:
        mixing: with a number for each model (`for_models`).
        name: of the weight; dare's random numbers follow from it.
        base: the weight of the base, for ties and dare.
    """
    out, at = torch.empty(given[0].shape, dtype=dtype), 0
    flat = [tensor.reshape(-1) for tensor in (*given, *([] if base is None else [base]))]
    combine = {"linear": _linear, "slerp": _slerp, "ties": _ties, "dare": _dare}[mixing.method]
    step = combine(mixing, name, flat)
    for parts in zip(*(tensor.split(ROWS) for tensor in flat), strict=True):
        part = step([part.float() for part in parts])
        out.view(-1)[at : at + len(part)] = part.to(dtype)
        at += len(part)
    return out


Step = Callable[[list[Tensor]], Tensor]  # the same numbers of all models, the base last -> merged


def _linear(mixing: Mixing, name: str, flat: Sequence[Tensor]) -> Step:
    """The sum of w_i times W_i, over the sum of w_i if it is normalised."""
    total = sum(mixing.weights) if mixing.normalize else 1.0
    return lambda parts: _sum([w / total for w in mixing.weights], parts)


def _slerp(mixing: Mixing, name: str, flat: Sequence[Tensor]) -> Step:
    """The weights of both as vectors, and the point `t` of the arc between them.

    sin((1 - t) a) / sin(a) of the first and sin(t a) / sin(a) of the second, where a is the angle.
    """
    dot = first = second = 0.0
    for one, other in zip(*(tensor.split(ROWS) for tensor in flat), strict=True):
        one, other = one.double(), other.double()
        dot += float(one @ other)
        first, second = first + float(one @ one), second + float(other @ other)
    cosine = dot / max(math.sqrt(first * second), 1e-300)
    shares = [1 - mixing.t, mixing.t]
    if abs(cosine) <= PARALLEL:
        angle = math.acos(cosine)
        shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
    return lambda parts: _sum(shares, parts)


def _ties(mixing: Mixing, name: str, flat: Sequence[Tensor]) -> Step:
    """The changes that are among the largest of a model and have the sign of their weighted sum."""
    *models, base = flat
    trims = [_largest(m, base, d) for m, d in zip(models, mixing.densities, strict=True)]

    def step(parts: list[Tensor]) -> Tensor:
        *models, base = parts
        changes = torch.stack([trim(m - base) for trim, m in zip(trims, models, strict=True)])
        weights = torch.tensor(mixing.weights)[:, None]
        changes *= weights
        elected = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
        agrees = changes.sign() == elected
        total = (changes * agrees).sum(0)
        if mixing.normalize:
            divisor = (weights * agrees).sum(0)
            total /= torch.where(divisor == 0, 1, divisor)
        return base + total

    return step


def _largest(model: Tensor, base: Tensor, density: float) -> Callable[[Tensor], Tensor]:
    """Sets all but the largest changes of a model to zero; of equal ones, the first stay."""
    if density >= 1:
        return lambda change: change
    n_kept = max(1, int(density * len(model)))
    least, room = _nth_largest(model, base, n_kept)

    def trim(change: Tensor) -> Tensor:
        nonlocal room
        size = change.abs()
        kept, equal = size > least, (size == least).nonzero().flatten()
        kept[equal[:room]] = True
        room -= min(room, len(equal))
        return change * kept

    return trim


def _nth_largest(model: Tensor, base: Tensor, n: int) -> tuple[float, int]:
    """The size of the n-th largest change, and how many of that size are among those n.

    Positive numbers have the order of their bits: the upper half of them is counted, then the lower
    half of those that share the upper, so that nothing has to be sorted or kept.
    """

    def count(halves: Callable[[Tensor], Tensor]) -> Tensor:
        """How many changes are at least of each half, (2**16,), the smallest first."""
        counts = torch.zeros(2**16, dtype=torch.int64)
        for one, other in zip(model.split(ROWS), base.split(ROWS), strict=True):
            bits = (one.float() - other.float()).abs().view(torch.int32)
            counts += torch.bincount(halves(bits), minlength=2**16)
        return counts.flip(0).cumsum(0).flip(0)

    at_least = count(lambda bits: bits >> 16)
    upper = int((at_least >= n).nonzero()[-1])
    n -= int(at_least[upper + 1])
    at_least = count(lambda bits: (bits & 0xFFFF)[bits >> 16 == upper])
    lower = int((at_least >= n).nonzero()[-1])
    beyond = int(at_least[lower + 1]) if lower < 0xFFFF else 0
    size = torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32)
    return float(size), n - beyond


def _dare(mixing: Mixing, name: str, flat: Sequence[Tensor]) -> Step:
    """Each change, kept with the probability `density` and divided by it; then task arithmetic."""
    streams = [_random(f"{mixing.seed}/{i}/{name}") for i in range(len(flat) - 1)]
    total = sum(mixing.weights) if mixing.normalize else 1.0

    def step(parts: list[Tensor]) -> Tensor:
        *models, base = parts
        out = base.clone()
        for m, w, d, random in zip(models, mixing.weights, mixing.densities, streams, strict=True):
            kept = torch.rand(len(m), generator=random) < d
            out += (w / total / d) * kept * (m - base)
        return out

    return step


def _random(key: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed % 2**63)


def _sum(shares: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    out = shares[0] * parts[0]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        out += share * part
    return out


def _compare(first: Path, one: Checkpoint, path: Path, other: Checkpoint) -> None:
    if other.format:
        raise CheckpointError(
            f"{path}: is stored as {other.format}, and a merge is nothing that those codes could "
            "hold; merge what it was made from, then quantize"
        )
    names = [*dict.fromkeys([*one.shapes, *other.shapes])]
    problems = [
        f"{name} is {other.shapes.get(name, 'missing')}, not {one.shapes.get(name, 'there')}"
        for name in names
        if one.shapes.get(name) != other.shapes.get(name)
    ]
    mine, theirs = asdict(one.config), asdict(other.config)
    # It limits the context, and changes no number of a shorter one.
    ignored = "max_position_embeddings"
    problems = problems or [
        f"{name} is {theirs[name]}, not {mine[name]}"
        for name in mine
        if mine[name] != theirs[name] and name != ignored
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path}: cannot be merged with {first}: {'; '.join(problems[:5])}{more}"
        )


def _compare_vocabularies(first: Path, paths: list[Path], say: Callable[[str], None]) -> None:
    """Refuse vocabularies that contradict each other; say which template is not taken."""
    own = _tokenizer(first)
    for path in paths:
        if path == first or (other := _tokenizer(path)) is None:
            continue
        if own is None:
            say(f"{first} has no tokenizer, and what {path} has is not taken")
        elif words := difference(other, own, path):
            say(f"{path}: {words}; the merged model has those of {first}")


def _tokenizer(path: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(path)
    except CheckpointError as error:
        if "no tokenizer there" not in str(error):
            raise
        return None


def _card(
    title: str, mixing: Mixing, paths: Sequence[Path], base: Path | None, first: Path,
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """The model card: from what and how a merge was made, also in mergekit's form."""
    from huggingface_hub import ModelCardData

    of_each = {"linear": ("weights",), "ties": ("weights", "densities"),
               "dare": ("weights", "densities")}.get(mixing.method, ())  # fmt: skip
    one = {"weights": "weight", "densities": "density"}
    models = [
        {"model": path.name, "parameters": {one[k]: getattr(mixing, k)[i] for k in of_each}}
        for i, path in enumerate(paths)
    ]
    names = {"dare": "dare_linear"}
    how: dict[str, object] = {
        "merge_method": names.get(mixing.method, mixing.method), "models": models,
        "dtype": str(dtype).removeprefix("torch."), "tokenizer_source": first.name,
    }  # fmt: skip
    if mixing.method == "slerp":
        how |= {"base_model": paths[0].name, "parameters": {"t": mixing.t}}
    else:
        how |= {"parameters": {"normalize": mixing.normalize}}
    if base is not None:
        how["base_model"] = base.name
    if mixing.method == "dare":
        how["random_seed"] = mixing.seed
    front = ModelCardData(
        library_name="opennemo", base_model=[p.name for p in (*paths, base) if p], tags=["merge"]
    )
    made_by = f"Made with `opennemo merge` {version('opennemo')}, torch {torch.__version__}."
    lines = ["---", front.to_yaml(), "---", "", f"# {title}", "", made_by, "",
             "In mergekit's form:", "", "```json", json.dumps(how, indent=2),
             "```", ""]  # fmt: skip
    return "\n".join(lines)
