"""How texts are split before byte pairs are merged: regular expressions by family.

Sources: tekken.json of Mistral NeMo, tiktoken's `openai_public.py`, Llama 3's `tokenizer.py`; the
names in GGUF files, `llama-vocab.cpp` of llama.cpp.
"""

_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_NAME = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS_AND = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|NUMBER| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANK}"
)
PATTERNS = {
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD}|[^\r\n\p{{L}}\p{{N}}]?{_NAME}|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD}{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_NAME}{_SUFFIX}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}",
    "llama3": _WORDS_AND.replace("NUMBER", r"\p{N}{1,3}"),
    "qwen2": _WORDS_AND.replace("NUMBER", r"\p{N}"),
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# A vocabulary with superwords splits less than the pattern of its words: a piece is all of a line
# up to a digit or the end of a sentence, with the indentation before and the line break after it.
# The repetition is possessive (++), which changes no match: without it PCRE2 runs out of stack on a
# long line.
_ENDS = ".!?\u2026\u3002\uff01\uff1f\u0964\u061f"  # of sentences, in any script
_PART = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD}|[^\r\n\p{{L}}\p{{N}}]?{_NAME}| ?[^\s\p{{L}}\p{{N}}{_ENDS}]+"
)
_REST = rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}"
SUPERWORDS = {
    "tekken": rf"[^\S\r\n]*(?:{_PART})++(?: ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+| )?|{_REST}",
}
# A file of ranks does not say how it splits text; its number of ranks identifies that.
PATTERN_OF_RANKS = {50_256: "gpt2", 100_256: "llama3", 128_000: "llama3", 199_998: "o200k"}
PATTERN_OF_RANKS |= {200_000: "o200k"}  # Llama 4

# Names in GGUF files, and the patterns to split at one after the other.
LLAMA_3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe", "dbrx")
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
GGUF_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "mpt", "olmo"), (PATTERNS["gpt2"],)),
    **dict.fromkeys(_DIGITS_FIRST, (r"\p{N}", PATTERNS["gpt2"])),
    **dict.fromkeys(LLAMA_3, (PATTERNS["llama3"],)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (PATTERNS["qwen2"],)),
    "tekken": (PATTERNS["tekken"],),
}
