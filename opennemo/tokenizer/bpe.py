"""Byte-pair encoding: a split pattern and ranked tokens turn text into ids, exactly and fast.

The definition is `merge` and `encode_plainly`, twenty lines of Python. What runs is one of two
Rust libraries that are held equal to it, by the tests on every kind of text and, for the faster
one, by a probe each time it is built. `tiktoken` is ready within a quarter of a second and does
what a chat needs; `fastokens` encodes fresh text up to ten times as fast, but takes more than a
second to build, so it is built in the background by whoever turns out to encode a lot.

Knows nothing of files and control tokens. BPE: arXiv:1508.07909, on bytes: GPT-2 (2019).
"""

import base64
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; reads \p{...} as Rust's libraries do
import tiktoken

from opennemo.tokenizer.tokenizer import repair_surrogates

try:
    import fastokens
except ImportError:  # no wheel for this platform: tiktoken then does everything
    fastokens = None

# tiktoken needs about 0.1 s for so many characters; who encodes them will probably go on.
MANY_CHARS = 1_000_000
BATCH_CHARS = 1 << 19  # what a thread encodes at a time, some 10 ms
# tiktoken's regex engine overflows its stack, and panics, at a million whitespace characters.
MAX_BLANKS = 900_000


def merge(piece: bytes, ranks: Mapping[bytes, int], n_parts: int = 1) -> list[bytes]:
    """Join the neighbours whose union ranks lowest, the first such, until `n_parts` are left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > n_parts:
        unions = enumerate(a + b for a, b in pairwise(parts))
        known = [(ranks[union], i) for i, union in unions if union in ranks]
        if not known:
            break
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def encode_plainly(text: str, pattern: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Ranks of the text's tokens: what the fast libraries must equal; far too slow to use."""
    pieces = (match.group().encode() for match in regex.finditer(pattern, text))
    parts = ([piece] if piece in ranks else merge(piece, ranks) for piece in pieces)
    return [ranks[part] for piece in parts for part in piece]


class BytePairEncoding:
    """Text to ids, where the id of a token is its rank + `first_id`.

    Args:
        pattern: regular expression whose successive matches are encoded each by itself.
        tokens: bytes of every token, most frequent first; the single bytes come before all.

    Raises:
        ValueError: the pattern does not compile, or a token is empty or occurs twice.
    """

    def __init__(self, pattern: str, tokens: Sequence[bytes], first_id: int):
        self._pattern, self._tokens, self._first_id = pattern, tokens, first_id
        ids = dict(zip(tokens, range(first_id, first_id + len(tokens)), strict=True))
        if len(ids) < len(tokens) or b"" in ids:
            last = {token: rank for rank, token in enumerate(tokens)}
            bad = next(rank for rank, token in enumerate(tokens) if not token or last[token] > rank)
            again = f"is token {last[tokens[bad]]} again" if tokens[bad] else "is empty"
            raise ValueError(f"token {bad} {again}")
        self._tiktoken = tiktoken.Encoding(
            "tekken", pat_str=pattern, mergeable_ranks=ids, special_tokens={}
        )
        try:
            if not all(match.group() for match in regex.finditer(pattern, probe())):
                raise ValueError("its pattern matches where there is nothing")  # tiktoken panics
        except regex.error as error:
            raise ValueError(f"its pattern: {error}") from None
        self._fast = None
        self._chars_left = MANY_CHARS  # until fastokens is worth its construction
        self._threads, self._process = None, 0
        self._building = threading.Lock()
        self._may_build = True

    def __reduce__(self) -> tuple:
        return BytePairEncoding, (self._pattern, self._tokens, self._first_id)

    def encode(self, text: str) -> list[int]:
        """Ids of the text; lone surrogates count as U+FFFD."""
        try:
            if self._fast is not None:
                return self._fast.encode_ordinary(text).ids
            return self._encode_slowly(text)
        except UnicodeEncodeError:
            return self.encode(repair_surrogates(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, each (n,) uint32, on all processors and without Python's lock."""
        self._build()
        if self._fast is None:
            return [np.array(self.encode(text), np.uint32) for text in texts]
        batches = list(_batches(texts))
        if len(batches) < 2:
            return [ids for batch in batches for ids in self._encode_quickly(batch)]
        if self._threads is None or self._process != os.getpid():  # threads do not survive a fork
            n_threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
            self._threads, self._process = ThreadPoolExecutor(n_threads), os.getpid()
        return [ids for run in self._threads.map(self._encode_quickly, batches) for ids in run]

    def _encode_quickly(self, texts: list[str]) -> list[np.ndarray]:
        assert self._fast is not None
        try:
            ids, offsets = self._fast.encode_batch_flat(texts)
        except UnicodeEncodeError:
            ids, offsets = self._fast.encode_batch_flat([repair_surrogates(t) for t in texts])
        writable = np.frombuffer(ids, "<u4").astype(np.uint32)
        return np.split(writable, np.frombuffer(offsets, "<u8")[1:-1])

    def _encode_slowly(self, text: str) -> list[int]:
        self._chars_left -= len(text)
        if self._may_build and self._chars_left < 0:
            # Not a daemon: killing a thread inside native code at exit can abort the process.
            threading.Thread(target=self._build, name="build fastokens").start()
        if len(text) > MAX_BLANKS and re.search(rf"\s{{{MAX_BLANKS}}}", text):
            # Waiting for fastokens would take longer than splitting the text here.
            pieces = (match.group() for match in regex.finditer(self._pattern, text))
            return [id for piece in pieces for id in self._tiktoken._encode_single_piece(piece)]
        return self._tiktoken.encode_ordinary(text)

    def _build(self) -> None:
        """Build fastokens, once, and take it into use if it agrees with tiktoken."""
        with self._building:
            if fastokens is None or not self._may_build:
                return
            self._may_build = False
            # Threads of ours share out a corpus; those it would start by itself cost a fifth more.
            os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
            # Ids start at `first_id`, but fastokens wants them dense: pairs of bytes that occur
            # in no UTF-8 fill the places below and can never match.
            unused = (bytes([high, low]) for high in range(0xF8, 0x100) for low in range(256))
            fillers = [next(unused) for _ in range(self._first_id)]
            lines = (
                base64.b64encode(token) + b" %d\n" % id
                for id, token in enumerate([*fillers, *self._tokens])
            )
            try:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "vocabulary.tiktoken"
                    file.write_bytes(b"".join(lines))
                    fast = fastokens.Tokenizer.from_tiktoken(str(file), pattern=self._pattern)
            except (ValueError, OSError):  # tokens that no merge reaches, or no room on the disk
                return
            text = probe()
            if fast.encode_ordinary(text).ids == self._tiktoken.encode_ordinary(text):
                self._fast = fast


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, about `BATCH_CHARS` at a time."""
    batch, n_chars = [], 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def probe() -> str:
    """A text that would show a difference: every script, blanks, digits, cases, look-alikes."""
    scripts = "".join(chr(c) for c in range(0, 0x30000, 23) if not 0xD800 <= c < 0xE000)
    blanks = " ".join(f"a{'  ' * n}\t{n}\n{' ' * n}b\r\n\n" for n in range(9))
    words = "DON'T don't I'LL camelCase HTTPServer x86_64 12345 3.14 <s>[INST]</s> //\n/* é e\u0301"
    return f"{words}{blanks}{scripts}{words}"
