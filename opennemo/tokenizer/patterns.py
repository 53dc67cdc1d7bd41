"""How texts are split before byte pairs are merged: regular expressions by family.

Sources: tekken.json of Mistral NeMo, tiktoken's `openai_public.py`, Llama 3's `tokenizer.py`.
"""

_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_NAME = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD}|[^\r\n\p{{L}}\p{{N}}]?{_NAME}|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD}{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_NAME}{_SUFFIX}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}",
    "llama3": rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANK}",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
