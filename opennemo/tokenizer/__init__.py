"""Text to ids and back, and conversations to ids and back; this floor imports no torch."""

from opennemo.tokenizer.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]
