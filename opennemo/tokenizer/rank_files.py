"""Files of ranks in tiktoken's format: Llama 3's for comparison, and OpenNemo's own vocabulary.

Each line is a token in base64 and its rank, which is a fifth of a tekken.json. Such a file names
no control tokens and no split pattern: for OpenNemo's own they are known; others serve for
measuring and inspection, not to run a model. Format: tiktoken, `load.py`.
"""

import base64
import binascii
import gzip
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from opennemo.errors import CheckpointError
from opennemo.tokenizer.bpe import BytePairTokenizer
from opennemo.tokenizer.patterns import PATTERN_OF_RANKS, PATTERNS, SUPERWORDS
from opennemo.tokenizer.tekken import Tekken

OWN = "opennemo-tekken-32k"


class RankFile(BytePairTokenizer):
    """A vocabulary without control tokens; the id of a token is its rank.

    Raises:
        CheckpointError: it is not such a file, or its number of ranks is unknown.
    """

    def __init__(self, path: Path):
        try:
            tokens = _read(path.read_bytes())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a tiktoken file ({error})") from error
        if (pattern := PATTERN_OF_RANKS.get(len(tokens))) is None:
            numbers = ", ".join(f"{n:,}" for n in PATTERN_OF_RANKS)
            raise CheckpointError(
                f"{path}: {len(tokens):,} ranks, so its split pattern is unknown "
                f"(known are files of {numbers})"
            )
        super().__init__(PATTERNS[pattern], tokens, first_id=0)
        self.control, self.bos_id, self.eos_id = {}, -1, -1


def own_tokenizer() -> Tekken:
    """The vocabulary that comes with OpenNemo: 32,768 ids, the last of them superwords.

    Learned from 773 languages and code.
    """
    packed = files("opennemo.tokenizer").joinpath("data", f"{OWN}.tiktoken.gz").read_bytes()
    return Tekken(SUPERWORDS["tekken"], _read(gzip.decompress(packed)))


def pack(tokens: Sequence[bytes]) -> bytes:
    """The tokens as a file of ranks, compressed, and the same bytes each time."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return gzip.compress(b"".join(lines), mtime=0)


def _read(data: bytes) -> list[bytes]:
    lines = (line.split() for line in data.splitlines())
    return [binascii.a2b_base64(token, strict_mode=True) for token, _rank in lines]
