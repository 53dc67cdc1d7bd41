"""A vocabulary as the fields of a GGUF file, which give llama.cpp and us the same ids.

tokenizer.json can express any vocabulary, so the fields are made from that. GGUF
has no regular expressions, only names of some (patterns.py): others are refused. Of SentencePiece's
merges it has only scores, which are the places in the list of merges.

Format: docs/gguf.md of ggml; llama.cpp's reader: `llama-vocab.cpp`.
"""

from typing import Any

from opennemo.tokenizer.chat_layouts import LAYOUTS
from opennemo.tokenizer.gguf_vocabulary import CONTROL, UNKNOWN, USER_DEFINED
from opennemo.tokenizer.patterns import GGUF_SPLITS, LLAMA_3, PATTERNS
from opennemo.tokenizer.saving import spec_of
from opennemo.tokenizer.spec import how_it_decodes, token_names
from opennemo.tokenizer.tokenizer import Tokenizer

NORMAL, UNUSED, BYTE = 1, 5, 6
# Normalizers that make SentencePiece's spaces, which llama.cpp does by itself.
SPACES = ("Prepend", "Replace")


def gguf_fields(tokenizer: Tokenizer, n_rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*` of a file whose embedding has so many rows.

    Raises:
        ValueError: a part of the vocabulary has no place in such a file; names it.
    """
    spec, control = spec_of(tokenizer)
    names = token_names(spec)
    if tokenizer.vocab_size > n_rows:
        raise ValueError(f"its {tokenizer.vocab_size:,} tokens are more than {n_rows:,} embeddings")
    model, byte_level = spec["model"], how_it_decodes(spec["decoder"])[0]
    special = {added["id"]: added["special"] for added in spec["added_tokens"]}
    unknown = model.get("unk_token") or "<unk>"
    kinds = []
    for id in range(n_rows):
        name = names.get(id)
        kinds.append(
            UNUSED if name is None
            else UNKNOWN if name == unknown and not byte_level
            else CONTROL if id in control
            else USER_DEFINED if id in special
            else BYTE if not byte_level and len(name) == 6 and name.startswith("<0x")
            else NORMAL
        )  # fmt: skip
    fields: dict[str, Any] = {
        "tokens": [names.get(id, f"[PAD{id}]") for id in range(n_rows)],
        "token_type": kinds,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if byte_level:
        fields |= {"model": "gpt2", "pre": _name_of_splits(spec), "merges": merges}
    else:
        _refuse_normalizers(spec)
        fields |= {"model": "llama", "pre": "default", "scores": _scores(fields["tokens"], merges)}
        fields |= {"add_space_prefix": tokenizer.dummy_prefix}
        # llama.cpp looks for these in the text as it is.
        whole = {id for id, kind in enumerate(kinds) if kind == USER_DEFINED}
        fields["tokens"] = [
            name.replace("▁", " ") if id in whole else name
            for id, name in enumerate(fields["tokens"])
        ]
    ids = {name: id for id, name in names.items()}
    for which, name in (("unknown", unknown), ("padding", "<pad>")):
        if name in ids:
            fields[f"{which}_token_id"] = ids[name]
    layout = LAYOUTS.get(tokenizer.instruct_version or "")
    template = tokenizer.chat_template or (
        layout.template_with(tokenizer.settings) if layout else None
    )
    keys = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _name_of_splits(spec: dict[str, Any]) -> str:
    """GGUF's name for how a byte-level vocabulary splits text."""
    if spec.get("normalizer"):
        raise ValueError(f"its normalizer {spec['normalizer'].get('type')!r} has no place in GGUF")
    first = spec.get("pre_tokenizer") or {}
    patterns = []
    for step in first.get("pretokenizers", [first]):
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [PATTERNS["gpt2"]] * step.get("use_regex", True)
            case _:
                raise ValueError(f"its pre-tokenizer {step.get('type')!r} has no place in GGUF")
    whole_first = bool(spec["model"].get("ignore_merges"))
    for name, splits in GGUF_SPLITS.items():
        if splits == tuple(patterns) and (name == "tekken" or name in LLAMA_3) == whole_first:
            return name
    raise ValueError(
        f"GGUF has no name for how it splits text: {' then '.join(patterns)}, whole words "
        f"{'first' if whole_first else 'not first'}"
    )


def _refuse_normalizers(spec: dict[str, Any]) -> None:
    normalizer = spec.get("normalizer") or {"normalizers": []}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") not in SPACES or step.get("pattern", {"String": " "}) != {
            "String": " "
        }:
            raise ValueError(f"its normalizer {step.get('type')!r} has no place in GGUF")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """The sooner a token is merged, the higher; tokens that are not merged are never compared."""
    place: dict[str, int] = {}
    for i, merge in enumerate(merges):
        place.setdefault(merge.replace(" ", "", 1), i)
    return [-float(place.get(token, 0)) for token in tokens]
