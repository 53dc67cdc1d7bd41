"""Any tokenizer of the package as the files that Hugging Face's libraries read.

`tokenizer.json` can express every tokenizer of this package, so one file serves any source of a
vocabulary, with a `tokenizer_config.json` of names beside it. Where a model has one of Mistral's
chat layouts and no template, a template of that layout is written too.

Formats: the `tokenizers` library; `PreTrainedTokenizerBase` of transformers.
"""

import json
from pathlib import Path
from typing import Any

from opennemo.tokenizer.bpe import merge
from opennemo.tokenizer.chat_layouts import LAYOUTS
from opennemo.tokenizer.huggingface import HuggingFace
from opennemo.tokenizer.sentencepiece import SentencePiece
from opennemo.tokenizer.spec import byte_level_spec, spelled
from opennemo.tokenizer.tekken import Tekken
from opennemo.tokenizer.tokenizer import Tokenizer


def save_huggingface(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` that give the same ids as `tokenizer`.

    Raises:
        ValueError: a token is spelled like a control token, which this format cannot tell apart.
    """
    spec, names = spec_of(tokenizer)
    bos = names[tokenizer.bos_id]
    if tokenizer.add_bos:
        begin = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, second = ({"Sequence": {"id": id, "type_id": n}} for n, id in enumerate("AB"))
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, begin, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "bos_token": bos,
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name[1:-1]}_token": name for name in ("<unk>", "<pad>") if name in names.values()}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    elif layout := LAYOUTS.get(tokenizer.instruct_version or ""):
        config["chat_template"] = layout.template_with(tokenizer.settings)
        if tokenizer.settings:
            config["model_settings"] = tokenizer.settings
    for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def spec_of(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[int, str]]:
    """The content of tokenizer.json, and id -> name of the control tokens as they are in it.

    Raises:
        ValueError: a token is spelled like a control token, which this format cannot tell apart.
    """
    if isinstance(tokenizer, Tekken):
        return _tekken_spec(tokenizer)
    assert isinstance(tokenizer, SentencePiece | HuggingFace)
    return tokenizer.spec(), tokenizer.control_names


def _tekken_spec(tokenizer: Tekken) -> tuple[dict[str, Any], dict[int, str]]:
    control = list(tokenizer.control)
    if tokenizer.version == "v3":
        # NeMo was not trained on these, which came later; their absence marks it as v3.
        control[17:20] = [f"<SPECIAL_{id}>" for id in (17, 18, 19)]
    names = [*control, *map(spelled, tokenizer.tokens)]
    vocab = {name: id for id, name in enumerate(names)}
    if len(vocab) != len(names):
        raise ValueError("a token is spelled like a control token")
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    halves = (merge(token, ranks, n_parts=2) for token in tokenizer.tokens[256:])
    # A token that no merges lead to has more parts; it still stands for a whole piece of text.
    merges = [list(map(spelled, pair)) for pair in halves if len(pair) == 2]
    added = dict.fromkeys(control, True)
    spec = byte_level_spec(vocab, merges, [tokenizer.pattern], added, ignore_merges=True)
    return spec, dict(enumerate(control))
