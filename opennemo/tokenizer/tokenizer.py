"""What every tokenizer of the package is: a map between text and ids that no text can trick.

One idea makes the rest small: each token stands for fixed bytes (`token_bytes`), control tokens
for none. Decoding is then joining bytes, and streaming is the same with an incremental UTF-8
decoder. Control ids are asked for by name (`control`) and never come out of `encode`, so nothing
that a user types can forge a turn. How conversations are laid out is chat.py's business.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from opennemo.errors import CheckpointError
from opennemo.tokenizer.mistral_template import mistral_template

V3 = {  # what its layout is written with
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
}  # fmt: skip


class Tokenizer(ABC):
    """A vocabulary and the way it splits text.

    Attributes:
        vocab_size: number of ids, control tokens included.
        bos_id, eos_id: ids that begin a text and end an answer.
        control: name -> id of every control token, e.g. ``{"<s>": 1, "[INST]": 3}``.
        instruct_version: Mistral's name of the chat layout this vocabulary was trained with
            ("v1", "v2", "v3", "v3-tekken"), or None where `chat_template` says it.
        chat_template: the Jinja source found beside the vocabulary, or None.
        add_bos: whether a text by itself begins with BOS, as Mistral's do.
        dummy_prefix: SentencePiece puts a space before the text and takes it away when decoding.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    control: Mapping[str, int]
    instruct_version: str | None = None
    chat_template: str | None = None
    add_bos: bool = True
    dummy_prefix: bool = False
    _bytes: Sequence[bytes]  # of every id

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, never a control id."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, each (n,) uint32: for corpora, as fast as the machine allows."""
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for; b"" for a control token. IndexError if out of range."""
        if id < 0:
            raise IndexError(f"{id} is no token id")
        return self._bytes[id]

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """Text of the ids; control tokens vanish, or appear by name with `show_control`.

        Bytes that are not UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`.
        """
        names = self.control_names if show_control else {}
        data = b"".join(names[id].encode() if id in names else self.token_bytes(id) for id in ids)
        text = data.decode("utf-8", errors="replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self)

    @property
    def control_names(self) -> dict[int, str]:
        """id -> name, the inverse of `control`."""
        return {id: name for name, id in self.control.items()}


class StreamDecoder:
    """Turns ids into text as they come, holding back bytes until they are whole characters.

    The pieces joined, with `flush()` last, equal `Tokenizer.decode` of all the ids.

    >>> stream = tokenizer.stream()
    >>> [stream.push(id) for id in tokenizer.encode("né 🦙")] + [stream.flush()]
    ['n', 'é', ' ', '', '🦙', '']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.dummy_prefix

    def push(self, id: int) -> str:
        """The characters that this id completes, often none."""
        return self._clean(self._utf8.decode(self._tokenizer.token_bytes(id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never became whole."""
        return self._clean(self._utf8.decode(b"", final=True))

    def _clean(self, text: str) -> str:
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def repair_surrogates(text: str) -> str:
    """Join surrogates that form a pair, and make U+FFFD of the others: what UTF-8 cannot hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def mistral_version(
    control: Mapping[str, int], chat_template: str | None, version: str
) -> str | None:
    """`version` if the control tokens are those of Mistral's v3, and no template says otherwise.

    v7 brought [SYSTEM_PROMPT]. A fine-tune may keep the vocabulary and change the layout. Older
    layouts are known by the templates that we write for them.
    """
    for older in ("v1", "v2"):
        if chat_template == mistral_template(older):
            return older
    is_v3 = control.keys() >= V3 and "[SYSTEM_PROMPT]" not in control
    return version if is_v3 and (chat_template is None or "[INST]" in chat_template) else None


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a model folder, of a `.gguf` file, or of a tokenizer file by itself.

    In a folder `tekken.json` is preferred, then `tokenizer.model.v1` to `.v3` (SentencePiece), then
    `tokenizer.json`, then a `tokenizer.model` without version: Mistral's own files before converted
    ones, but not before a `tokenizer.json` to which a fine-tune may have added tokens.

    Raises:
        CheckpointError: nothing there that is known, or the file is damaged.
    """
    # The kinds of tokenizers are built on this module, hence imported late.
    from opennemo.tokenizer.gguf_vocabulary import load_gguf
    from opennemo.tokenizer.huggingface import HuggingFace, read_chat_template
    from opennemo.tokenizer.sentencepiece import SentencePiece
    from opennemo.tokenizer.tekken import Tekken

    file = model
    if model.is_dir():
        known = ["tekken.json", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1"]
        known += ["tokenizer.json", "tokenizer.model"]
        file = next((model / name for name in known if (model / name).exists()), model)
    if file.suffix == ".gguf":
        return load_gguf(file)
    if file.suffix == ".json" and "tekken" in file.name:
        return Tekken.load(file)
    if ".model" in file.suffixes[-2:]:
        return SentencePiece.load(file, chat_template=read_chat_template(file.parent))
    if file.suffix == ".json":
        return HuggingFace.load(file)
    raise CheckpointError(
        f"{model}: no tokenizer there (tekken.json, tokenizer.model, tokenizer.json or a .gguf)"
    )
