"""Byte-pair encoding: a split pattern and ranked tokens turn text into ids, exactly and fast.

The definition is `merge` and `encode_plainly`, twenty lines of Python. `tiktoken` does the same in
Rust and is ready within a quarter of a second; a CorpusEncoder is faster. The tests compare both
with the definition on every kind of text.

Knows nothing about files and control tokens. BPE: arXiv:1508.07909, on bytes: GPT-2 (2019).
"""

import base64
import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import regex  # comes with tiktoken; reads \p{...} as Rust's libraries do
import tiktoken

from opennemo.tokenizer.corpus_encoder import CorpusTokenizer, probe
from opennemo.tokenizer.tokenizer import repair_surrogates

if TYPE_CHECKING:
    import fastokens

# tiktoken's regex engine overflows its stack, and panics, at a million whitespace characters.
MAX_BLANKS = 900_000


def merge(piece: bytes, ranks: Mapping[bytes, int], n_parts: int = 1) -> list[bytes]:
    """Join the neighbours whose union ranks lowest, the first such, until `n_parts` are left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > n_parts:
        unions = enumerate(a + b for a, b in pairwise(parts))
        candidates = [(ranks[union], i) for i, union in unions if union in ranks]
        if not candidates:
            break
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def encode_plainly(text: str, pattern: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Ranks of the text's tokens: what the fast libraries must equal; far too slow to use."""
    pieces = (match.group().encode() for match in regex.finditer(pattern, text))
    parts = ([piece] if piece in ranks else merge(piece, ranks) for piece in pieces)
    return [ranks[part] for piece in parts for part in piece]


class BytePairTokenizer(CorpusTokenizer):
    """A vocabulary of ranked tokens, where the id of a token is its rank + `first_id`.

    Args:
        pattern: regular expression whose successive matches are encoded each by itself.
        tokens: bytes of every token, most frequent first; the single bytes come before all.

    Raises:
        ValueError: the pattern does not compile, or a token is empty or occurs twice.
    """

    def __init__(self, pattern: str, tokens: Sequence[bytes], first_id: int):
        self.pattern, self.tokens, self.first_id = pattern, list(tokens), first_id
        self.vocab_size = first_id + len(tokens)
        self._bytes = [b""] * first_id + self.tokens
        ids = dict(zip(tokens, range(first_id, self.vocab_size), strict=True))
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

    def encode_prompt(self, text: str) -> list[int]:
        """`encode` by tiktoken."""
        try:
            if len(text) > MAX_BLANKS and re.search(rf"\s{{{MAX_BLANKS}}}", text):
                pieces = (match.group() for match in regex.finditer(self.pattern, text))
                return [id for piece in pieces for id in self._tiktoken._encode_single_piece(piece)]
            return self._tiktoken.encode_ordinary(text)
        except UnicodeEncodeError:
            return self.encode_prompt(repair_surrogates(text))

    def build_fastokens(self, library: "type[fastokens.Tokenizer]") -> "fastokens.Tokenizer":
        """This vocabulary for fastokens, through a file of ranks."""
        # Ids start at `first_id`, but fastokens needs them dense: pairs of bytes that no UTF-8
        # contains fill the places below and can never match.
        unused = (bytes([high, low]) for high in range(0xF8, 0x100) for low in range(256))
        fillers = [next(unused) for _ in range(self.first_id)]
        lines = (
            base64.b64encode(token) + b" %d\n" % id
            for id, token in enumerate([*fillers, *self.tokens])
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vocabulary.tiktoken"
            file.write_bytes(b"".join(lines))
            return library.from_tiktoken(str(file), pattern=self.pattern)
