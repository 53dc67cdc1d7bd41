"""SentencePiece models: `tokenizer.model` of Mistral 7B and its kin, behind the same interface.

The `sentencepiece` library does everything; this file says which bytes each piece stands for and
which chat layout goes with which file name, as mistral-common does (`tokenizer.model.v3` is v3).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from opennemo.errors import CheckpointError
from opennemo.tokenizer.chat_layouts import layout_version
from opennemo.tokenizer.spec import added_tokens
from opennemo.tokenizer.template import follow_own_template, names_written_by, turn_end
from opennemo.tokenizer.tokenizer import Tokenizer, repair_surrogates


class SentencePiece(Tokenizer):
    """A SentencePiece vocabulary with byte fallback.

    Args:
        model: the serialised model, the content of a `tokenizer.model`.
        instruct_version: by default "v3" if it has the control tokens of v3, "v1" if it has none
            and no template says better.

    Raises:
        ValueError: these bytes are not a SentencePiece model.
    """

    def __init__(
        self,
        model: bytes,
        *,
        instruct_version: str | None = None,
        chat_template: str | None = None,
        add_bos: bool = True,
    ):
        if not model:  # the library accepts this as a model and logs to stderr from then on
            raise ValueError("it is empty")
        try:
            self._model = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError("it is not a SentencePiece model") from error
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(id) for id in range(self.vocab_size)]
        self._bytes = [self._bytes_of(id, piece) for id, piece in enumerate(pieces)]
        self.control = {
            piece: id
            for id, piece in enumerate(pieces)
            if self._model.is_control(id) or self._model.is_unknown(id)
        }
        ids = {piece: id for id, piece in enumerate(pieces)}
        # Text may merge to a token that the template writes as control; such text becomes bytes.
        self._spelled = {
            ids[name]: [ids[f"<0x{byte:02X}>"] for byte in name.encode()]
            for name in (names_written_by(chat_template, ids, ()) if chat_template else ())
            if name not in self.control
        }
        self.control |= {pieces[id]: id for id in self._spelled}
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.eos_id < 0 or self.bos_id < 0:
            raise ValueError("it has no token that begins or ends a text")
        self.dummy_prefix = self._model.encode("a", out_type=str)[0].startswith("▁")
        self.chat_template, self.add_bos = chat_template, add_bos
        self.instruct_version = instruct_version or layout_version(
            self.control, chat_template, "v3"
        )
        if self.instruct_version is None and chat_template is None:
            self.instruct_version = "v1"
        follow_own_template(self)
        if self._spelled and (end := turn_end(self)) in self._spelled:
            self._bytes[end] = b""

    @classmethod
    def load(cls, path: Path, *, chat_template: str | None = None) -> "SentencePiece":
        """Read a `tokenizer.model`; a last suffix such as `.v2` names the chat layout.

        Raises:
            CheckpointError: the file cannot be read or is not a SentencePiece model.
        """
        # The second number in "v7m1" is of image tokens.
        version = re.fullmatch(r"\.(v\d+)(m\d+)?", path.suffix)
        try:
            return cls(
                path.read_bytes(),
                instruct_version=version[1] if version else None,
                chat_template=chat_template,
            )
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not a usable tokenizer.model: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, never a control id."""
        return self._as_text(self._model.encode(repair_surrogates(text)))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, each (n,) uint32, on all processors."""
        ids = self._model.encode([repair_surrogates(text) for text in texts], num_threads=-1)
        return [np.array(self._as_text(i), np.uint32) for i in ids]

    def _as_text(self, ids: list[int]) -> list[int]:
        if self._spelled.keys().isdisjoint(ids):
            return ids
        return [id for token in ids for id in self._spelled.get(token, [token])]

    def spec(self) -> dict[str, Any]:
        """The content of a tokenizer.json of the same tokens, merged in the same order."""
        model = self._model
        names = [model.id_to_piece(id) for id in range(self.vocab_size)]
        vocab = {name: id for id, name in enumerate(names)}
        texts = [id for id in vocab.values() if self._bytes[id] and not model.is_byte(id)]
        merges: list[tuple[float, str, str]] = []
        whole: dict[str, int] = {}
        for id in texts:
            name, score = names[id], model.get_score(id)
            halves = [(name[:i], name[i:]) for i in range(1, len(name))]
            halves = [(score, a, b) for a, b in halves if a in vocab and b in vocab]
            merges += halves
            if len(name) > 1 and not halves and id in model.encode(name.replace("▁", " ")):
                whole[name] = id  # what the library calls user-defined
        merges.sort(key=lambda merge: (-merge[0], -len(merge[1])))
        to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        from_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = [{"type": "Prepend", "prepend": "▁"}] * self.dummy_prefix
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * self.dummy_prefix
        steps = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
        special = {name: id for name, id in self.control.items() if id not in self._spelled}
        whole |= {names[id]: id for id in self._spelled}
        added = added_tokens(special, special=True) + added_tokens(whole, special=False)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, from_space]},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": steps},
            "model": {
                "type": "BPE",
                "unk_token": names[model.unk_id()],
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": [(a, b) for _, a, b in merges],
            },
        }

    def _bytes_of(self, id: int, piece: str) -> bytes:
        model = self._model
        if model.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if model.is_control(id) or model.is_unknown(id) or model.is_unused(id):
            return b""
        return piece.replace("▁", " ").encode()
