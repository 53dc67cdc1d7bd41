"""The vocabulary inside a GGUF file, and the metadata it lies among.

One pass over the file's head gives a plain dict; the tensors behind it are never touched. (The
`gguf` package makes an object of every string, which takes seconds for a vocabulary.) A `gpt2`
vocabulary becomes the tokenizer.json it was made from, a `llama` vocabulary the tokenizer.model.

Format: docs/gguf.md of ggml. Split patterns by name: `llama-vocab.cpp` of llama.cpp.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from opennemo.errors import CheckpointError
from opennemo.tokenizer.huggingface import HuggingFace, byte_level_spec
from opennemo.tokenizer.sentencepiece import SentencePiece
from opennemo.tokenizer.tekken import PATTERN
from opennemo.tokenizer.tokenizer import Tokenizer

# Kinds of tokens; the same numbers as in SentencePiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = "llama3 llama-v3 llama-bpe falcon3 pixtral smaug-bpe dbrx"
# Names of ways to split text, and the patterns to split at one after the other.
SPLITS = {
    "gpt-2 default phi-2 mpt olmo": [GPT_2],
    "smollm starcoder refact command-r codeshell exaone": [r"\p{N}", GPT_2],
    LLAMA_3: [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2 deepseek-r1-qwen stablelm2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [PATTERN],
}

# Types of values: those that `struct` has codes for, and the two others.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the file's head with its value: numbers, strings, and lists of these.

    Raises:
        CheckpointError: the file cannot be read, is no GGUF file, or ends too early.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_head(Cursor(data))[0]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not GGUF: {error}") from error


def load_gguf(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        CheckpointError: damaged, or a kind of vocabulary that is not supported, with its name.
    """
    metadata = read_metadata(path)
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    template = metadata.get("tokenizer.chat_template")
    readers = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = fields.get("model")
    if kind not in readers:
        raise CheckpointError(f"{path}: vocabulary {kind!r} is not supported, only {[*readers]}")
    try:
        return readers[kind](fields, template)
    except KeyError as error:
        missing = f"tokenizer.ggml.{error.args[0]}"
        raise CheckpointError(f"{path}: the key {missing} is missing") from error
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path}: its vocabulary is not usable: {error}") from error


def _byte_level(fields: dict[str, Any], template: str | None) -> HuggingFace:
    name = str(fields.get("pre", "gpt-2"))
    split = next((split for names, split in SPLITS.items() if name in names.split()), None)
    if split is None:
        raise ValueError(f"how {name!r} splits text is not known, only {', '.join(SPLITS)}")
    kinds = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    whole = (UNKNOWN, CONTROL, USER_DEFINED)
    spec = byte_level_spec(
        {name: id for id, name in enumerate(fields["tokens"])},
        [merge.split(" ") for merge in fields["merges"]],
        split,
        {name: kind != USER_DEFINED for name, kind in kinds.items() if kind in whole},
        ignore_merges=name == "tekken" or name in LLAMA_3.split(),
    )
    eos_id = fields["eos_token_id"]
    return HuggingFace(
        spec,
        bos_id=fields.get("bos_token_id", eos_id),
        eos_id=eos_id,
        chat_template=template,
        add_bos=fields.get("add_bos_token", name in LLAMA_3.split()),
    )


def _sentencepiece(fields: dict[str, Any], template: str | None) -> SentencePiece:
    """The model that the fields were copied from, serialised again (sentencepiece_model.proto)."""
    tokens, scores, kinds = fields["tokens"], fields["scores"], fields["token_type"]
    unk_id = fields.get("unknown_token_id", 0)
    kinds[unk_id] = UNKNOWN
    pieces = [
        _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind)
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    ]
    trainer = _field(3, 2) + _field(35, 1)  # byte pairs, with byte fallback
    for number, key in ((41, "bos_token_id"), (42, "eos_token_id")):
        trainer += _field(number, fields[key])
    trainer += _field(40, unk_id)
    space = int(fields.get("add_space_prefix", True))
    normalizer = _field(1, b"identity") + _field(3, space) + _field(4, 0) + _field(5, 1)
    model = b"".join(_field(1, piece) for piece in pieces)
    model += _field(2, trainer) + _field(3, normalizer)
    add_bos = fields.get("add_bos_token", True)
    return SentencePiece(model, chat_template=template, add_bos=add_bos)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer."""
    match value:
        case int():
            return _varint(number << 3) + _varint(value)
        case float():
            return _varint(number << 3 | 5) + struct.pack("<f", value)
        case _:
            return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


class Cursor:
    """A place in a GGUF file that moves on as values are read, and never leaves the file."""

    def __init__(self, data: mmap.mmap | memoryview):
        self.data, self.at = data, 0

    def numbers(self, code: str, n: int) -> tuple[Any, ...]:
        """The next `n` numbers of a type of `struct`; struct.error where the file ends."""
        if n > len(self.data):
            raise ValueError(f"{n:,} values are said to follow at byte {self.at:,}")
        values = struct.unpack_from(f"<{n}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{n}{code}")
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        return self.numbers("s", self.number("Q"))[0].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, n = self.number("I"), self.number("Q")
            if kind in NUMBERS:
                return list(self.numbers(NUMBERS[kind], n))
            return [self.value(kind) for _ in range(n)]
        if kind not in NUMBERS:
            raise ValueError(f"{kind} is no type of a value")
        return self.number(NUMBERS[kind])


def read_head(cursor: Cursor) -> tuple[dict[str, Any], int]:
    """The metadata, and how many tensors are described where it ends."""
    (magic,) = cursor.numbers("s", 4)
    version, n_tensors, n_keys = (cursor.number(code) for code in "IQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}, not GGUF of version 2 or 3")
    return {cursor.text(): cursor.value(cursor.number("I")) for _ in range(n_keys)}, n_tensors
