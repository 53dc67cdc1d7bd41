"""`tokenizer.json` of Hugging Face behind the same interface (saving.py writes such files).

The control tokens are taken out of the vocabulary before the `tokenizers` library sees it, so no
text, however spelled, can become one. Two families of vocabularies are supported, those whose
tokens spell bytes in GPT-2's alphabet (NeMo, Llama 3, Qwen, SmolLM) and SentencePiece's with `▁`
for a space and `<0x0A>` for a byte (Mistral 7B, Llama 2).

The `tokenizers` library encodes prompts, a CorpusEncoder corpora and very long texts, for the same
ids in a ninth of the time (docs/results/tokenizer.md).

Format: the `tokenizers` library; files beside it: `PreTrainedTokenizerBase` of transformers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from opennemo.errors import CheckpointError
from opennemo.files import read_json
from opennemo.tokenizer.chat_layouts import layout_version
from opennemo.tokenizer.corpus_encoder import CorpusTokenizer
from opennemo.tokenizer.spec import (
    added_tokens,
    byte_level_meaning,
    how_it_decodes,
    metaspace_meaning,
    token_names,
    without_control,
)
from opennemo.tokenizer.template import follow_own_template, names_written_by, turn_end
from opennemo.tokenizer.tokenizer import repair_surrogates

if TYPE_CHECKING:
    import fastokens

LONG = 250_000  # characters, for which a corpus encoder saves more time than it takes to build
MAX_IDS = 1 << 24  # the largest known vocabularies have a quarter of a million


class HuggingFace(CorpusTokenizer):
    """A vocabulary in the terms of `tokenizer.json`.

    Args:
        spec: the content of the file.
        bos_id, eos_id: ids that begin a text and end an answer, control tokens in any case.
        end_ids: others that end an answer or are special. Control tokens are these, what
            `added_tokens` call special, and what the chat template writes as control; the last are
            shown when decoded, since they may be a part of the answer (`<think>`).

    Raises:
        ValueError: a kind of vocabulary that is not supported, or one that is inconsistent.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        bos_id: int,
        eos_id: int,
        chat_template: str | None = None,
        add_bos: bool = True,
        end_ids: Iterable[int | None] = (),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if (kind := spec["model"].get("type", "BPE")) != "BPE":
            raise ValueError(f"its model is {kind!r}, not 'BPE'")
        byte_level, self.dummy_prefix = how_it_decodes(spec.get("decoder") or {})
        names = token_names(spec)
        if not 0 <= min(names) <= max(names) < MAX_IDS:
            raise ValueError(f"its ids go from {min(names):,} to {max(names):,}")
        for id in (bos_id, eos_id):
            if id not in names:
                raise ValueError(f"it has no token {id!r}, which is to begin or end a text")
        if wrong := [name for name in names.values() if not isinstance(name, str)]:
            raise ValueError(f"its token {wrong[0]!r} is not text")
        added = {added["content"]: added for added in spec.get("added_tokens") or []}
        special = {entry["id"] for entry in added.values() if entry["special"]} | {bos_id, eos_id}
        special |= {id for id in end_ids if id in names}
        shown = _shown_control(spec, names, chat_template) - special
        self.control = {names[id]: id for id in sorted(special | shown)}
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, add_bos
        self.chat_template = chat_template
        version = "v3-tekken" if byte_level else "v3"
        self.settings = settings or {}
        self.instruct_version = layout_version(self.control, chat_template, version, self.settings)
        if shown:
            shown -= {turn_end(self)}  # never a part of an answer, however it is marked
        self.vocab_size = max(names) + 1
        self._bytes = [b""] * self.vocab_size
        self.plain_tokens = set(added)
        meaning = byte_level_meaning if byte_level else metaspace_meaning
        for id, name in names.items():
            if name not in self.control or id in shown:
                self._bytes[id] = name.encode() if name in self.plain_tokens else meaning(name)
        without, control_ids = without_control(spec, self.control), {*self.control.values()}
        for name, id in without["model"]["vocab"].items():
            if id in control_ids:  # text could become it
                raise ValueError(f"{name!r} and {names[id]!r} have the id {id}")
        text_only = json.dumps(without, ensure_ascii=False)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text_only)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(str(error)) from error
        # Only bytes as they are: normalizing, fastokens was seen to compose some characters that
        # tokenizers leaves apart.
        self._is_plain_bytes = byte_level and not spec.get("normalizer")
        follow_own_template(self)

    @classmethod
    def load(cls, path: Path) -> "HuggingFace":
        """Read a `tokenizer.json` and, where they are, the files that say how it is used.

        Raises:
            CheckpointError: a file is damaged, or of a kind that is not supported.
        """
        folder = path.parent
        settings: dict[str, Any] = {}
        for name in ("config", "generation_config", "special_tokens_map", "tokenizer_config"):
            if (file := folder / f"{name}.json").exists():
                settings |= {k: v for k, v in read_json(file).items() if v is not None}
        spec = read_json(path)
        try:
            ids = {name: id for id, name in token_names(spec).items()}
            bos_id, eos_id = (_id_of(which, settings, ids) for which in ("bos", "eos"))
            if eos_id is None:
                raise ValueError("no file beside it names the token that ends a text")
            bos = json.dumps(next((name for name, id in ids.items() if id == bos_id), None))
            begins = bos in json.dumps(spec.get("post_processor"), ensure_ascii=False)
            return cls(
                spec,
                bos_id=eos_id if bos_id is None else bos_id,
                eos_id=eos_id,
                chat_template=read_chat_template(folder),
                add_bos=settings.get("add_bos_token", begins),
                end_ids=[*_listed(settings.get("eos_token_id")), *_called_special(settings, ids)],
                settings=settings.get("model_settings"),
            )
        except KeyError as error:
            raise CheckpointError(f"{path}: the key {error} is missing") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a usable tokenizer.json: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, never a control id."""
        if len(text) > LONG:
            self.expect_corpus()
        return super().encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, each (n,) uint32, on all processors."""
        self.expect_corpus()
        if self.fastokens is not None:
            return super().encode_batch(texts)
        encodings = self._tokenizer.encode_batch_fast([repair_surrogates(text) for text in texts])
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """`encode` by tokenizers."""
        return self._tokenizer.encode(repair_surrogates(text)).ids

    def build_fastokens(self, library: "type[fastokens.Tokenizer]") -> "fastokens.Tokenizer | None":
        """This vocabulary for fastokens, if its tokens are bytes as they are."""
        if not self._is_plain_bytes:
            return None
        spec = json.loads(self._tokenizer.to_str())
        vocabulary = spec["model"]["vocab"]
        # It needs ids without gaps: names that no merge leads to can never match.
        holes = {*range(self.vocab_size)} - {*vocabulary.values()}
        vocabulary |= {f"\uf8ff{id}": id for id in holes}
        return library.from_json_str(json.dumps(spec))

    def spec(self) -> dict[str, Any]:
        """The content of a tokenizer.json with all tokens, the control tokens among them."""
        spec = json.loads(self._tokenizer.to_str())
        for name, id in self.control.items():
            spec["added_tokens"] += added_tokens({name: id}, special=not self._bytes[id])
        spec["added_tokens"].sort(key=lambda token: token["id"])
        spec["model"]["vocab"] |= self.control
        return spec


def _shown_control(
    spec: dict[str, Any], names: dict[int, str], chat_template: str | None
) -> set[int]:
    """Ids of tokens that the template writes as control but that are not marked special."""
    if chat_template is None:
        return set()
    ids = {name: id for id, name in names.items()}
    added = [entry["content"] for entry in spec.get("added_tokens") or []]
    written = names_written_by(chat_template, ids, added)
    if made := written.difference(added):  # only in the vocabulary: control if no text becomes it
        merges = (m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"])
        written -= made.intersection("".join(merge) for merge in merges)
    return {ids[name] for name in written}


def _called_special(settings: dict[str, Any], ids: dict[str, int]) -> list[int | None]:
    """Ids of the tokens that the files beside a tokenizer.json call special."""
    names = [
        name["content"] if isinstance(name, dict) else name
        for key in ("additional_special_tokens", "extra_special_tokens")
        for name in _listed(settings.get(key) or [])
    ]
    decoder = settings.get("added_tokens_decoder") or {}
    names += [entry["content"] for entry in decoder.values() if entry.get("special")]
    return [ids.get(name) for name in names if isinstance(name, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_chat_template(folder: Path) -> str | None:
    """The Jinja source beside a tokenizer, in any of the three places where there may be one."""
    if (file := folder / "chat_template.jinja").exists():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):  # several, by name
                named = {each.get("name"): each for each in template if isinstance(each, dict)}
                template = named.get("default", {}).get("template")
            if isinstance(template, str):
                return template
    return None


def _id_of(which: str, settings: dict[str, Any], ids: dict[str, int]) -> int | None:
    """The id of the "bos" or "eos" token: by name, or else by number, as the configs have it."""
    name = settings.get(f"{which}_token")
    name = name["content"] if isinstance(name, dict) else name
    if name in ids:
        return ids[name]
    return next(iter(_listed(settings.get(f"{which}_token_id"))), None)
