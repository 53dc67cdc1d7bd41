"""The vocabulary inside a GGUF file.

A `gpt2` vocabulary becomes the tokenizer.json it was made from, a `llama` vocabulary the
tokenizer.model. Format: docs/gguf.md of ggml.
"""

import struct
from pathlib import Path
from typing import Any

from opennemo.errors import CheckpointError
from opennemo.tokenizer.gguf_head import read_metadata
from opennemo.tokenizer.huggingface import HuggingFace
from opennemo.tokenizer.patterns import GGUF_SPLITS, LLAMA_3
from opennemo.tokenizer.sentencepiece import SentencePiece
from opennemo.tokenizer.spec import byte_level_spec
from opennemo.tokenizer.tokenizer import Tokenizer

# Kinds of tokens; the same numbers as in SentencePiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


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
    if name not in GGUF_SPLITS:
        raise ValueError(f"how {name!r} splits text is not known, only {', '.join(GGUF_SPLITS)}")
    kinds = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    whole = (UNKNOWN, CONTROL, USER_DEFINED)
    spec = byte_level_spec(
        {name: id for id, name in enumerate(fields["tokens"])},
        [merge.split(" ") for merge in fields["merges"]],
        GGUF_SPLITS[name],
        {name: kind != USER_DEFINED for name, kind in kinds.items() if kind in whole},
        ignore_merges=name == "tekken" or name in LLAMA_3,
    )
    eos_id = fields["eos_token_id"]
    return HuggingFace(
        spec,
        bos_id=fields.get("bos_token_id", eos_id),
        eos_id=eos_id,
        chat_template=template,
        add_bos=fields.get("add_bos_token", name in LLAMA_3),
        end_ids=[fields.get(f"{which}_token_id") for which in ("eot", "eom")],
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
