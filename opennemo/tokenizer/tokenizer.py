"""The interface of every tokenizer: a map between text and ids that no text can trick.

Each token stands for fixed bytes (`token_bytes`), control tokens for none. Decoding is then joining
bytes, and streaming is the same with an incremental UTF-8 decoder. Control ids are looked up by
name (`control`) and `encode` never returns them, so nothing that a user types can forge a turn.
chat.py lays out conversations.
"""

import codecs
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice, takewhile
from typing import Any

import numpy as np


class Tokenizer(ABC):
    """A vocabulary and the way it splits text.

    Attributes:
        vocab_size: number of ids, control tokens included.
        bos_id, eos_id: ids that begin a text and end an answer.
        control: name -> id of every control token, e.g. ``{"<s>": 1, "[INST]": 3}``.
        instruct_version: Mistral's name of the chat layout this vocabulary was trained with
            ("v1", "v3-tekken" and the others of LAYOUTS), or None where `chat_template` says it.
        chat_template: the Jinja source found beside the vocabulary, or None.
        settings: what a prompt may set of the model, by name: {"values": [...], "default": ...}.
        add_bos: whether a text by itself begins with BOS, as Mistral's do.
        dummy_prefix: SentencePiece puts a space before the text and takes it away when decoding.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    control: Mapping[str, int]
    instruct_version: str | None = None
    chat_template: str | None = None
    settings: Mapping[str, Mapping[str, Any]] = {}
    add_bos: bool = True
    dummy_prefix: bool = False
    _bytes: Sequence[bytes]  # of every id

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, never a control id."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, each (n,) uint32: for corpora, as fast as the machine allows."""
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def expect_corpus(self) -> None:  # noqa: B027
        """Take up to a second to become several times as fast, for the same ids.

        For callers that will encode millions of characters; `encode_batch` does it by itself.
        """

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for; b"" for a control token. IndexError if out of range."""
        if id < 0:
            raise IndexError(f"{id} is not a token id")
        return self._bytes[id]

    @cached_property
    def _in_order(self) -> list[int]:
        """All ids by the bytes they stand for."""
        return sorted(range(self.vocab_size), key=self.token_bytes)

    def ids_beginning_with(self, start: bytes) -> Iterable[int]:
        """Ids of the tokens whose bytes begin with these."""
        first = bisect_left(self._in_order, start, key=self.token_bytes)
        rest = islice(self._in_order, first, None)
        return takewhile(lambda id: self.token_bytes(id).startswith(start), rest)

    @cached_property
    def has_superwords(self) -> bool:
        """Whether any token holds more than one word, with the space between."""
        return any(len(token.split()) > 1 for token in self._bytes)

    def has_vocabulary_of(self, other: "Tokenizer") -> bool:
        """Whether every id stands for the same in both."""
        if (self.vocab_size, dict(self.control)) != (other.vocab_size, dict(other.control)):
            return False
        return all(self.token_bytes(i) == other.token_bytes(i) for i in range(self.vocab_size))

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """Text of the ids; control tokens vanish, or appear by name with `show_control`.

        Bytes that are not UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`.
        """
        names = self.control_names if show_control else {}
        data = b"".join(names[id].encode() if id in names else self.token_bytes(id) for id in ids)
        text = data.decode("utf-8", errors="replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def stream(self, known: bytes = b"") -> "StreamDecoder":
        """A decoder for ids that arrive one at a time, and begin with bytes that are `known`."""
        return StreamDecoder(self, known)

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a prompt by default."""
        defaults = ((name, choice.get("default")) for name, choice in self.settings.items())
        return {name: default for name, default in defaults if default}

    @property
    def control_names(self) -> dict[int, str]:
        """id -> name, the inverse of `control`."""
        return {id: name for name, id in self.control.items()}


class StreamDecoder:
    """Turns ids into text as they come, holding back bytes until they are whole characters.

    The pieces joined, with `flush()` last, equal `Tokenizer.decode` of all the ids. Bytes that are
    `known` have been shown before: as many are left out at the beginning.

    >>> stream = tokenizer.stream()
    >>> [stream.push(id) for id in tokenizer.encode("né 🦙")] + [stream.flush()]
    ['n', 'é', ' ', '', '🦙', '']
    """

    def __init__(self, tokenizer: Tokenizer, known: bytes = b""):
        self._tokenizer, self._n_known = tokenizer, len(known)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.dummy_prefix and not known

    def push(self, id: int) -> str:
        """The characters that this id completes, often none."""
        data = self._tokenizer.token_bytes(id)
        new = data[self._n_known :]
        self._n_known -= len(data) - len(new)
        return self._clean(self._utf8.decode(new))

    def flush(self) -> str:
        """The rest at the end: U+FFFD if the last character is incomplete."""
        return self._clean(self._utf8.decode(b"", final=True))

    def _clean(self, text: str) -> str:
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def repair_surrogates(text: str) -> str:
    """Join surrogates that form a pair, and replace others, which UTF-8 cannot hold, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
