"""Opens any tokenizer: of a model's folder, of a file, or OpenNemo's own by its name."""

from copy import copy
from pathlib import Path

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.tokenizer.rank_files import OWN, RankFile, own_tokenizer
from opennemo.tokenizer.tokenizer import Tokenizer

NAMES = (
    "tekken.json", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1",
    "tokenizer.json", "tokenizer.model",
)  # fmt: skip


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that holds its vocabulary."""
    return next((folder / name for name in NAMES if (folder / name).exists()), None)


def load_tokenizer(model: Path | str) -> Tokenizer:
    """The tokenizer of a model folder, of a `.gguf` file, or of a tokenizer file by itself.

    In a folder `tekken.json` is preferred, then `tokenizer.model.v1` to `.v3` (SentencePiece), then
    `tokenizer.json`, then a `tokenizer.model` without version: Mistral's own files before converted
    ones, but not before a `tokenizer.json` to which a fine-tune may have added tokens. Where a
    template of the model's own lies beside `tekken.json`, `tokenizer.json` is preferred to it.

    Raises:
        CheckpointError: there is no tokenizer, or the file is damaged.
    """
    # Imported late: their libraries take 30 to 90 ms each.
    from opennemo.tokenizer.chat_layouts import LAYOUTS
    from opennemo.tokenizer.gguf_vocabulary import load_gguf
    from opennemo.tokenizer.huggingface import HuggingFace, read_chat_template
    from opennemo.tokenizer.sentencepiece import SentencePiece
    from opennemo.tokenizer.tekken import Tekken
    from opennemo.tokenizer.template import follow_own_template

    model = Path(model)
    file = tokenizer_file(model) or model
    if file.suffix == ".gguf":
        return load_gguf(file)
    if file.suffix == ".json" and "tekken" in file.name:
        tokenizer = Tekken.load(file)
        tokenizer.chat_template = read_chat_template(file.parent)
        follow_own_template(tokenizer)
        converted = file.with_name("tokenizer.json")
        if tokenizer.instruct_version is None and file.parent == model and converted.exists():
            return HuggingFace.load(converted)
        if tokenizer.instruct_version not in (None, *LAYOUTS):
            versions = ", ".join(n.removesuffix("-tekken") for n in LAYOUTS if "-tekken" in n)
            raise CheckpointError(
                f"{file}: version {tokenizer.version!r} is not understood, only {versions} are"
            )
        return tokenizer
    if ".model" in file.suffixes[-2:]:
        return SentencePiece.load(file, chat_template=read_chat_template(file.parent))
    if file.suffix == ".json":
        return HuggingFace.load(file)
    raise CheckpointError(
        f"{model}: no tokenizer there (tekken.json, tokenizer.model, tokenizer.json or a .gguf)"
    )


def difference_beside(folder: Path, tokenizer: Tokenizer) -> str | None:
    """How the tokenizer or template beside an adapter differs from the model's; None if alike.

    Raises:
        CheckpointError: a tokenizer or template beside it is damaged, or the tokenizer is of
            another vocabulary.
    """
    from opennemo.tokenizer.huggingface import read_chat_template

    if tokenizer_file(folder) is not None:
        return difference(load_tokenizer(folder), tokenizer, folder)
    if (template := read_chat_template(folder)) is None:
        return None
    other = copy(tokenizer)
    other.chat_template, other.instruct_version = template, None
    return difference(other, tokenizer, folder)


def difference(other: Tokenizer, tokenizer: Tokenizer, where: Path) -> str | None:
    """How another tokenizer or its template differs from a model's; None if alike.

    Raises:
        CheckpointError: it is of another vocabulary.
    """
    from opennemo.tokenizer.chat import encode_chat
    from opennemo.tokenizer.template import PROBES

    for id in range(min(other.vocab_size, tokenizer.vocab_size)):
        ours, theirs = tokenizer.token_bytes(id), other.token_bytes(id)
        if ours and theirs and ours != theirs:
            raise CheckpointError(
                f"{where}: its vocabulary is another one: id {id} is {theirs!r}, not {ours!r}"
            )
    if other.vocab_size > tokenizer.vocab_size:
        return f"its tokenizer has {other.vocab_size:,} tokens, not {tokenizer.vocab_size:,}"

    def lay_out(by: Tokenizer, messages: list[dict]) -> list[int] | None:
        try:
            return encode_chat(by, messages)
        except InvalidRequest:
            return None

    for messages in PROBES:
        theirs = lay_out(other, messages)
        if theirs is not None and theirs != lay_out(tokenizer, messages):
            return "its chat template lays out conversations in another way"
    return None


def open_tokenizer(path: Path | str) -> Tokenizer:
    """Any tokenizer of the package, a file of ranks, or by its name the one that comes with it.

    Raises:
        CheckpointError: there is no tokenizer, or the file is damaged.
    """
    path = Path(path)
    if str(path) == OWN and not path.exists():
        return own_tokenizer()
    if path.is_file():
        with path.open("rb") as file:
            first = file.read(1024).partition(b"\n")[0].split()
        if len(first) == 2 and first[1] == b"0":
            return RankFile(path)
    return load_tokenizer(path)
