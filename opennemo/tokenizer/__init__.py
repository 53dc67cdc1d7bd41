"""Text to ids and back, and conversations to ids and back; this floor imports no torch."""

from opennemo.tokenizer import tokenizer
from opennemo.tokenizer.load import load_tokenizer, open_tokenizer
from opennemo.tokenizer.tekken import Tekken
from opennemo.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tekken", "Tokenizer", "load_tokenizer", "open_tokenizer"]

setattr(tokenizer, "load_tokenizer", load_tokenizer)  # noqa: B010  where version 0.1 had it
