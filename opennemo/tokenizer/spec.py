"""The content of a `tokenizer.json`: which token has which id and stands for which bytes.

Two families of vocabularies are known: tokens that spell bytes in GPT-2's alphabet (NeMo, Llama 3,
Qwen, SmolLM), and SentencePiece's, with `▁` for a space and `<0x0A>` for a byte (Mistral 7B,
Llama 2). Format: the `tokenizers` library.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 on.
UNPRINTABLE = (*range(33), *range(127, 161), 173)
SPELLED = {byte: 256 + i for i, byte in enumerate(UNPRINTABLE)}
METASPACE_STEPS = {"ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
BYTE_OF = {chr(SPELLED.get(byte, byte)): byte for byte in range(256)}


def added_tokens(ids: Mapping[str, int], *, special: bool) -> list[dict[str, Any]]:
    """Entries of tokenizer.json for tokens that are not merged from others."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": id, "content": name, "special": special, **flags} for name, id in ids.items()]


def byte_level_spec(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    patterns: Sequence[str],
    added: Mapping[str, bool],
    *,
    ignore_merges: bool,
) -> dict[str, Any]:
    """The content of a tokenizer.json, for tokens spelled in GPT-2's alphabet.

    Text is split at the `patterns` one after the other; `added` are the tokens that are not merged
    from others, and whether each is a control token.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    byte_level["trim_offsets"] = True
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [{**split, "pattern": {"Regex": pattern}} for pattern in patterns]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            token
            for name, special in added.items()
            for token in added_tokens({name: vocab[name]}, special=special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": list(merges),
            "ignore_merges": ignore_merges,
        },
    }


def spelled(token: bytes) -> str:
    """The bytes in GPT-2's alphabet."""
    return token.decode("latin-1").translate(SPELLED)


def token_names(spec: dict[str, Any]) -> dict[int, str]:
    """id -> name of every token."""
    names = {id: name for name, id in spec["model"]["vocab"].items()}
    return names | {added["id"]: added["content"] for added in spec.get("added_tokens") or []}


def how_it_decodes(decoder: dict[str, Any]) -> tuple[bool, bool]:
    """Whether tokens spell bytes in GPT-2's alphabet (or else `▁`), and whether a space is added.

    Raises:
        ValueError: neither family; names what was found.
    """
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type"): step for step in steps}
    if kinds.keys() == {"ByteLevel"}:
        return True, False
    if not {"ByteFallback", "Metaspace"} & kinds.keys() or not kinds.keys() <= METASPACE_STEPS:
        raise ValueError(f"its decoder {[*kinds]} is neither ByteLevel nor with ByteFallback")
    metaspace = kinds.get("Metaspace", {"prepend_scheme": "never"})
    added = metaspace.get("add_prefix_space", metaspace.get("prepend_scheme") != "never")
    return False, bool(added) or kinds.get("Strip", {}).get("start", 0) > 0


def byte_level_meaning(name: str) -> bytes:
    """The bytes of a token of the first family; one outside the alphabet stands for itself."""
    try:
        return bytes(BYTE_OF[character] for character in name)
    except KeyError:
        return name.encode()


def metaspace_meaning(name: str) -> bytes:
    """The bytes of a token of the second family."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    return name.replace("▁", " ").encode()


def without_control(spec: dict[str, Any], control: dict[str, int]) -> dict[str, Any]:
    """The tokenizer without its control tokens, the other tokens keeping their ids."""
    model = spec["model"]
    added = [a for a in spec.get("added_tokens") or [] if a["content"] not in control]
    # In the vocabulary as well, or the library would renumber them.
    vocab = {name: id for name, id in model["vocab"].items() if name not in control}
    vocab |= {a["content"]: a["id"] for a in added}
    merges = (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
    merges = [[a, b] for a, b in merges if not {a, b, a + b} & control.keys()]
    unk_token = None if model.get("unk_token") in control else model.get("unk_token")
    return {
        **spec,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": added,
        "model": {**model, "vocab": vocab, "merges": merges, "unk_token": unk_token},
    }
