"""Token shards on disk, and mixtures of them as an endless sequence of windows.

The tokens of window i follow from (seed, sources, i) by arithmetic. No state is drawn, kept or
advanced, so a run resumes exactly at any step, and any number of processes see the same data.
Windows follow shares of a mixture as evenly as whole numbers can, and the windows of a source pass
in a new order each epoch, by a permutation that is computed and never stored.

A folder of shards holds `NNNNN.ids` (uint32), `NNNNN.ends` (int64: where each document ends, in
tokens of this shard; both little-endian) and `index.json`, written last, with the size and the
SHA-256 of each file. A document is BOS, if the tokenizer puts it before texts, its ids, and EOS.

It does not know what the documents say or how windows become batches. Permutation: Luby and
Rackoff (1988), with the cycle walking of Black and Rogaway (2002).
"""

import bisect
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.files import write_json, write_whole
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.tokenizer import Tokenizer

FORMAT = "opennemo shards 1"
IDS, ENDS = np.dtype("<u4"), np.dtype("<i8")
SHARD_TOKENS = 1 << 26  # 256 MiB of ids
GOLDEN, WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1
ROUNDS = 8  # of the permutation; with 4, short ones are measurably uneven


class Corpus:
    """A mixture of token shards as windows 0, 1, 2, ... without end.

    Each epoch of a source cuts its documents, laid end to end, into windows, and each window comes
    once. Where the cuts lie changes with the epoch, so that no token is always left over.

    Attributes:
        n_tokens: of all sources together.
        vocab_size: ids are below it.

    Raises:
        CheckpointError: a folder is missing, unfinished or damaged; the size of a file or, with
            `verify`, its SHA-256 is not the index's; its tokenizer is another one.
        InvalidRequest: no source, a weight that is not above 0, or a source smaller than a window.
    """

    n_tokens: int
    vocab_size: int

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        window: int,
        seed: int,
        weights: Sequence[float] | None = None,
        tokenizer_hash: str | None = None,
        verify: bool = False,
    ):
        """`weights` are shares of the tokens drawn, which need not sum to 1; by default equal."""
        if not folders:
            raise InvalidRequest("a mixture needs at least one source")
        if window < 1:
            raise InvalidRequest(f"a window is {window} tokens, but must be 1 or more")
        self._weights = [1.0] * len(folders) if weights is None else [*weights]
        self._window, self._seed = window, seed
        self._shards = [_Shards(folder) for folder in folders]
        first = self._shards[0]
        self.vocab_size = first.tokenizer["vocab_size"]
        expected = tokenizer_hash or first.tokenizer["hash"]
        wanted = "this run's" if tokenizer_hash else f"that of {first.path}"
        for shards, weight in zip(self._shards, self._weights, strict=True):
            if not 0 < weight < math.inf:
                raise InvalidRequest(f"{shards.path}: weight {weight} is not above 0")
            if (hash := shards.tokenizer["hash"]) != expected:
                raise CheckpointError(
                    f"{shards.path}: made with the tokenizer {hash[:12]} "
                    f"({shards.tokenizer['name']}), but {wanted} is {expected[:12]}"
                )
            if shards.n_tokens < window:
                raise InvalidRequest(
                    f"{shards.path}: {shards.n_tokens:,} tokens, less than a window of {window:,}"
                )
            if verify:
                shards.verify()
        self.n_tokens = sum(shards.n_tokens for shards in self._shards)
        parts = [Fraction(weight) for weight in self._weights]
        self._shares = [part / sum(parts) for part in parts]
        # The share of each source in what the earlier ones leave.
        left = [sum(parts[j:]) for j in range(len(parts))]
        self._splits = [(w / rest).as_integer_ratio() for w, rest in zip(parts, left, strict=True)]

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Window i >= 0: ids (window,) uint32, and how they fall into documents (S,) int64.

        The first and the last of the S lengths may be parts of documents.
        """
        if (i := operator.index(i)) < 0:
            raise IndexError(f"window {i}: they are counted from 0")
        source, n_before = self._draw(i)
        shards = self._shards[source]
        n_windows, left_over = divmod(shards.n_tokens, self._window)
        epoch, place = divmod(n_before, n_windows)
        key = _key(self._seed, source, epoch)
        begin = _permuted(place, n_windows, key) * self._window + key % (left_over + 1)
        return shards.read(begin, begin + self._window)

    def describe(self) -> dict[str, Any]:
        """The data behind the windows, for the folder of a run.

        After n windows a source has been seen n / `windows_an_epoch` times.
        """
        sources = [
            {
                "path": str(shards.path),
                "weight": weight,
                "share": float(share),
                "tokens": shards.n_tokens,
                "documents": shards.n_documents,
                "windows_an_epoch": float(shards.n_tokens // self._window / share),
                "index_sha256": shards.sha256,
            }
            for shards, weight, share in zip(self._shards, self._weights, self._shares, strict=True)
        ]
        tokenizer = self._shards[0].tokenizer
        return {
            "window": self._window, "seed": self._seed, "tokenizer": tokenizer, "sources": sources
        }  # fmt: skip

    def _draw(self, i: int) -> tuple[int, int]:
        """The source of window i, and how many windows before i were of the same.

        The first source with share s gets those i where floor(i s) steps up, the others share the
        rest in the same way. So every stretch of windows holds the right number of each source,
        within one for the first and one more for each that follows.
        """
        for source, (numerator, denominator) in enumerate(self._splits):
            n_before = i * numerator // denominator
            if (i + 1) * numerator // denominator > n_before:
                return source, n_before
            i -= n_before
        raise AssertionError("the last source takes all that is left")


def tokenizer_hash(path: Path) -> str:
    """The SHA-256 of the vocabulary of a model folder or a tokenizer file, in whatever layout."""
    return vocabulary_hash(open_tokenizer(path))


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """The SHA-256 over the bytes of every token, the ids of control tokens, BOS and EOS.

    Not over the names of control tokens, which differ between the layouts of one vocabulary.
    """
    digest = hashlib.sha256()
    for id in range(tokenizer.vocab_size):
        token = tokenizer.token_bytes(id)
        digest.update(len(token).to_bytes(4, "little") + token)
    ids = [tokenizer.bos_id, tokenizer.eos_id, *sorted(tokenizer.control.values())]
    digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


class ShardWriter:
    """Writes documents into a folder of shards; `finish` completes it.

    The same documents give the same bytes. Until `finish` there is no `index.json`, so an
    unfinished folder is never taken for a corpus.
    """

    def __init__(
        self, folder: Path, tokenizer: dict[str, Any], *, shard_tokens: int = SHARD_TOKENS
    ):
        """`tokenizer` describes it as `describe_tokenizer` does."""
        self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._ids: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._n_tokens = self._n_text_bytes = 0

    def add(self, ids: np.ndarray, ends: np.ndarray, text_bytes: np.ndarray) -> None:
        """Documents end to end: ids (T,), where each ends (S,), and its bytes of text (S,)."""
        assert not len(ends) or (ends[-1] == len(ids) and ids.max() < self._tokenizer["vocab_size"])
        begin = first = 0
        while first < len(ends):
            room = self._shard_tokens - self._n_tokens
            # As many documents as fit; an empty shard takes one of any length.
            last = int(np.searchsorted(ends, begin + room, "right"))
            if last == first and self._n_tokens:
                self._flush()
                continue
            last = max(last, first + 1)
            end = int(ends[last - 1])
            self._ids.append(ids[begin:end].astype(IDS))
            self._ends.append(ends[first:last].astype(ENDS) - begin + self._n_tokens)
            self._n_tokens += end - begin
            self._n_text_bytes += int(text_bytes[first:last].sum())
            begin, first = end, last

    def finish(self) -> dict[str, Any]:
        """Write what is left and the index; returns the index."""
        self._flush()
        totals = {
            name: sum(shard[name] for shard in self._shards)
            for name in ("tokens", "documents", "text_bytes")
        }
        index = {"format": FORMAT, "tokenizer": self._tokenizer, **totals, "shards": self._shards}
        write_json(self._folder / "index.json", index)
        return index

    def _flush(self) -> None:
        if not self._n_tokens:
            return
        name = f"{len(self._shards):05}"
        shard: dict[str, Any] = {"name": name, "tokens": self._n_tokens}
        shard |= {"documents": sum(map(len, self._ends)), "text_bytes": self._n_text_bytes}
        for kind, arrays in (("ids", self._ids), ("ends", self._ends)):
            digest = hashlib.sha256()
            for array in arrays:
                digest.update(array.data)
            write_whole(self._folder / f"{name}.{kind}", *(array.data for array in arrays))
            shard[kind] = {"bytes": sum(a.nbytes for a in arrays), "sha256": digest.hexdigest()}
        self._shards.append(shard)
        self._ids, self._ends, self._n_tokens, self._n_text_bytes = [], [], 0, 0


def describe_tokenizer(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """What an index says about the tokenizer of its ids."""
    return {
        "name": name,
        "hash": vocabulary_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id if tokenizer.add_bos else None,
        "eos_id": tokenizer.eos_id,
    }


class _Shards:
    """One folder of shards, mapped into memory, as one run of tokens."""

    def __init__(self, path: Path):
        self.path = path
        try:
            data = (path / "index.json").read_bytes()
            index = json.loads(data)
            if index["format"] != FORMAT:
                raise CheckpointError(f"{path}: its format is {index['format']!r}, not {FORMAT!r}")
            self.sha256 = hashlib.sha256(data).hexdigest()
            self.tokenizer: dict[str, Any] = index["tokenizer"]
            self.n_tokens, self.n_documents = int(index["tokens"]), int(index["documents"])
            self._index: list[dict[str, Any]] = index["shards"]
            self._ids = [self._map(shard, "ids", IDS, "tokens") for shard in self._index]
            self._ends = [self._map(shard, "ends", ENDS, "documents") for shard in self._index]
            texts = [self.tokenizer["hash"], self.tokenizer["name"]]
            texts += [shard[kind]["sha256"] for shard in self._index for kind in ("ids", "ends")]
            vocab_size = self.tokenizer["vocab_size"]
            if not (isinstance(vocab_size, int) and all(isinstance(t, str) for t in texts)):
                raise TypeError("a hash, a name or a size is invalid")
        except FileNotFoundError as error:
            what = Path(error.filename).name
            hint = "; `opennemo tokenize` writes it last" if what == "index.json" else ""
            raise CheckpointError(
                f"{path}: no token shards there, {what} is missing{hint}"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path}: its index.json is damaged ({error!r})") from error
        self._starts = [0, *accumulate(map(len, self._ids))]
        ends = [int(ends[-1]) for ends in self._ends]
        if [*accumulate(ends, initial=0)] != self._starts or self._starts[-1] != self.n_tokens:
            raise CheckpointError(f"{path}: its documents do not end where its tokens do")

    def __reduce__(self) -> tuple[type["_Shards"], tuple[Path]]:
        return _Shards, (self.path,)  # another process maps the files again, instead of a copy

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens begin to end: ids (T,) uint32, and how they fall into documents (S,) int64."""
        ids, lengths = zip(*self._pieces(begin, end), strict=True)
        # Always copied: mapped files are read-only, and PyTorch needs a writable array.
        return np.concatenate(ids, dtype=np.uint32), np.concatenate(lengths)

    def verify(self) -> None:
        """Compare every file with the SHA-256 in the index."""
        files = [(shard, kind) for shard in self._index for kind in ("ids", "ends")]

        def digest(file: tuple[dict[str, Any], str]) -> str:
            with (self.path / f"{file[0]['name']}.{file[1]}").open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for (shard, kind), actual in zip(files, threads.map(digest, files), strict=True):
                if actual != shard[kind]["sha256"]:
                    raise CheckpointError(
                        f"{self.path / shard['name']}.{kind}: damaged, its SHA-256 is "
                        f"{actual[:12]} and not {shard[kind]['sha256'][:12]}"
                    )

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        shard = bisect.bisect_right(self._starts, begin) - 1
        while begin < end:
            start, stop = self._starts[shard], min(end, self._starts[shard + 1])
            ends = self._ends[shard]
            first = ends.searchsorted(begin - start, "right")
            last = ends.searchsorted(stop - start)  # the document that stop is in, or ends
            borders = np.empty(last - first + 2, np.int64)
            borders[0], borders[1:-1], borders[-1] = begin - start, ends[first:last], stop - start
            yield self._ids[shard][begin - start : stop - start], borders[1:] - borders[:-1]
            begin, shard = stop, shard + 1

    def _map(self, shard: dict[str, Any], kind: str, dtype: np.dtype, count: str) -> np.ndarray:
        file = self.path / f"{shard['name']}.{kind}"
        size, expected = file.stat().st_size, shard[kind]["bytes"]
        if size != expected or size != shard[count] * dtype.itemsize:
            raise CheckpointError(f"{file}: {size:,} bytes, but the index says {expected:,}")
        return np.memmap(file, dtype, mode="r").view(np.ndarray)


def _key(*parts: int) -> int:
    """A hash of 64 bits over the parts, as good as random."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def _permuted(place: int, n: int, key: int) -> int:
    """Where `place` goes in the permutation of range(n) that belongs to the key."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round in range(ROUNDS):
            left, right = right, left ^ _mixed(key + round * GOLDEN ^ right) & mask
        place = left << half | right
        if place < n:  # else continue: places outside lead back inside
            return place


def _mixed(x: int) -> int:
    """64 bits, each of which depends on every bit of x, as in splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31
