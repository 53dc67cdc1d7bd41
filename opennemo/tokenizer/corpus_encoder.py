"""Encodes corpora by `fastokens`, up to ten times as fast as the libraries that encode prompts.

Building it takes up to a second, so it is built only on request (`Tokenizer.expect_corpus`). It is
used only if it agrees with the other library on a text that would show a difference, since both
have their own regular expression engines; the tests compare far more text.

fastokens 0.3.5 would start threads of its own for long texts, which never return from a hundred
thousand newlines. It reads their number from the environment at its first long text, and has no
other setting, so `_one_thread` surrounds that one. `tests/tokenizer/test_bpe.py` shows both.
"""

import os
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from opennemo.tokenizer.tokenizer import Tokenizer, repair_surrogates

if TYPE_CHECKING:
    import fastokens

BATCH_CHARS = 1 << 19  # what a thread encodes at a time, some 10 ms


class CorpusTokenizer(Tokenizer):
    """A tokenizer that fastokens makes faster once a corpus is expected.

    Attributes:
        fastokens: None until it is built, or if it lacks this platform or vocabulary.
        plain_tokens: texts that are a token each by definition, not by merging.
    """

    fastokens: "fastokens.Tokenizer | None" = None
    plain_tokens: Collection[str] = ()

    @abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """`encode` by the library that needs no preparation."""

    @abstractmethod
    def build_fastokens(self, library: "type[fastokens.Tokenizer]") -> "fastokens.Tokenizer | None":
        """This vocabulary for fastokens, None if it does not suit; ValueError if it is refused."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, never a control id."""
        if self.fastokens is None:
            return self.encode_prompt(text)
        return _encode(self.fastokens, [text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, each (n,) uint32, on all processors, without Python's lock."""
        self.expect_corpus()
        if self.fastokens is None:
            return super().encode_batch(texts)
        ends = accumulate(map(len, texts))
        parts = groupby(zip(texts, ends, strict=True), lambda pair: pair[1] // BATCH_CHARS)
        batches = [[text for text, _ in part] for _, part in parts]
        encode = partial(_encode, self.fastokens)
        if len(batches) < 2:
            return [ids for batch in batches for ids in encode(batch)]
        with ThreadPoolExecutor() as threads:
            return [ids for part in threads.map(encode, batches) for ids in part]

    def expect_corpus(self) -> None:
        """Build fastokens, once, and keep it if it agrees with `encode_prompt`."""
        if "fastokens" in vars(self):
            return
        self.fastokens = None
        try:
            import fastokens  # here, because it takes as long to import as a prompt to encode

            library = self.build_fastokens(fastokens.Tokenizer)
        except (ImportError, ValueError, AttributeError, OSError):
            return
        text = " ".join([*self.plain_tokens, probe() * 8])
        with _one_thread(), suppress(ValueError):  # its regular expressions may fail on a text
            if library and _encode(library, [text])[0].tolist() == self.encode_prompt(text):
                self.fastokens = library

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "fastokens"}


def _encode(library: "fastokens.Tokenizer", texts: list[str]) -> list[np.ndarray]:
    try:
        ids, offsets = library.encode_batch_flat(texts)
    except UnicodeEncodeError:
        ids, offsets = library.encode_batch_flat([repair_surrogates(text) for text in texts])
    writable = np.frombuffer(ids, "<u4").astype(np.uint32)
    return np.split(writable, np.frombuffer(offsets, "<u8")[1:-1])


@contextmanager
def _one_thread() -> Iterator[None]:
    name = "FASTOKENS_BPE_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def probe() -> str:
    """A text that would show a difference: every script, blanks, digits, cases, look-alikes."""
    scripts = "".join(chr(c) for c in range(0, 0x30000, 23) if not 0xD800 <= c < 0xE000)
    blanks = " ".join(f"a{'  ' * n}\t{n}\n{' ' * n}b\r\n\n" for n in range(9))
    words = "DON'T don't I'LL camelCase HTTPServer x86_64 12345 3.14 <s>[INST]</s> //\n/* é e\u0301"
    return f"{words}{blanks}{scripts}{words}"
