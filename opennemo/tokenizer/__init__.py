"""Text to ids and back, and conversations to ids and back; this floor imports no torch."""

from opennemo.tokenizer.tekken import Tekken
from opennemo.tokenizer.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["StreamDecoder", "Tekken", "Tokenizer", "load_tokenizer"]
