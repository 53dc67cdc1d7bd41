"""Thinking is separate in every protocol, whole and streamed, and can be sent back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from opennemo.llm import LLM
from opennemo.tokenizer.tekken import SINGLE_BYTES, V3_SPECIAL_TOKENS, Tekken
from tests import tiny
from tests.serve.conftest import Running, run_server

anthropic = pytest.importorskip("anthropic")
mistralai = pytest.importorskip("mistralai.client")
openai = pytest.importorskip("openai")

LATER = ("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")
SETTINGS = {"reasoning_effort": {"type": "enum", "values": ["none", "high"], "default": "none"}}
V15 = Tekken(
    r"[\s\S]", SINGLE_BYTES, n_special=64, version="v15", settings=SETTINGS,
    special_tokens=(*V3_SPECIAL_TOKENS, *LATER),
)  # fmt: skip
ASK = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
THOUGHT, WORDS = "Why\n", "Bé."


def ids_of(*texts: str) -> list[int]:
    control = V15.control
    pieces = ([control[t]] if t in control else V15.encode(t) for t in texts)
    return [id for ids in pieces for id in ids]


def thinker(folder: Path, *answer: str) -> LLM:
    """A model whose every answer is this one: no token may come twice in it."""
    ids = [*ids_of(*answer), V15.eos_id]
    assert len({*ids}) == len(ids)
    pairs = tiny.chain(ids, V15.control["[/INST]"])
    tiny.write(folder, tiny.weights(V15.vocab_size, pairs))
    V15.save(folder / "tekken.json")
    return LLM.load(str(folder))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Iterator[Running]:
    llm = thinker(tmp_path_factory.mktemp("speaker"), "[THINK]", THOUGHT, "[/THINK]", WORDS)
    with run_server(llm) as server:
        yield server


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> Iterator[Running]:
    answer = ("[THINK]", THOUGHT, "[/THINK]", "[TOOL_CALLS]", "f", "[ARGS]", "{}")
    with run_server(thinker(tmp_path_factory.mktemp("caller"), *answer)) as server:
        yield server


def test_a_reply_keeps_thinking_apart(speaker: Running):
    reply = speaker.llm.chat(ASK)
    pieces = list(reply.pieces())
    assert [c for c, _ in pieces] == ["thinking"] * len(THOUGHT) + ["text"] * len(WORDS)
    assert reply.text == WORDS and reply.answers[0].thinking == THOUGHT
    thought = {"role": "assistant", "content": WORDS, "reasoning_content": THOUGHT}
    assert reply.message == thought
    kept = speaker.llm.chat([*ASK, reply.message, *ASK])
    assert V15.decode(kept.prompt_ids, show_control=True).count(f"[THINK]{THOUGHT}[/THINK]") == 1
    assert "".join(speaker.llm.chat(ASK)) == WORDS


def test_calls_come_after_thinking(caller: Running):
    for choice in ("auto", "required"):
        reply = caller.llm.chat(ASK, tools=TOOLS, tool_choice=choice)
        (call,) = reply.message["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": "{}"}
        assert reply.message["reasoning_content"] == THOUGHT == reply.answers[0].thinking
        (streamed,) = reply.answers[0].calls
        assert (streamed.name, streamed.arguments) == ("f", "{}")


def test_a_budget_ends_thinking_with_the_closing_token(speaker: Running, caller: Running):
    for n in (1, 3):
        reply = speaker.llm.chat(ASK, thinking_budget=n)
        assert reply.finish().answers[0].thinking == THOUGHT[:n] and reply.text == WORDS
        reply = caller.llm.chat(ASK, thinking_budget=n, tools=TOOLS)
        assert reply.message["reasoning_content"] == THOUGHT[:n] and reply.message["tool_calls"]
    plenty = speaker.llm.chat(ASK, thinking_budget=50).finish()
    assert plenty.answers[0].thinking == THOUGHT and plenty.text == WORDS
    with speaker.client() as http:
        body = {"model": speaker.llm.name, "messages": ASK, "thinking_token_budget": 2}
        (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
        assert choice["message"]["reasoning_content"] == THOUGHT[:2]
        body = {"model": speaker.llm.name, "messages": ASK, "max_tokens": 20}
        body["thinking"] = {"type": "enabled", "budget_tokens": 2}
        assert http.post("/v1/messages", json=body).json()["content"][0]["thinking"] == THOUGHT[:2]
        body["thinking"] = {"type": "enabled", "budget_tokens": -1}
        assert http.post("/v1/messages", json=body).status_code == 400


def test_openai(speaker: Running, caller: Running):
    settings = {"model": "any", "messages": ASK}
    with openai.OpenAI(base_url=f"{speaker.url}/v1", api_key="any", max_retries=0) as client:
        settings["model"] = client.models.list().data[0].id
        whole = client.chat.completions.create(**settings, logprobs=True)
        message = whole.choices[0].message
        assert (message.content, message.reasoning_content) == (WORDS, THOUGHT)
        assert whole.usage.completion_tokens_details.reasoning_tokens == len(THOUGHT)
        chunks = list(client.chat.completions.create(**settings, logprobs=True, stream=True))
        choices = [chunk.choices[0] for chunk in chunks]
        assert "".join(c.delta.content or "" for c in choices) == WORDS
        deltas = [getattr(c.delta, "reasoning_content", "") for c in choices]
        assert "".join(filter(None, deltas)) == THOUGHT
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.content]
        assert tokens == whole.choices[0].logprobs.content
        client.chat.completions.create(**settings, reasoning_effort="high")
        with pytest.raises(openai.BadRequestError, match="'low' is not one of none, high"):
            client.chat.completions.create(**settings, reasoning_effort="low")
        items = client.responses.create(model=settings["model"], input="Hi").output
        assert [item.type for item in items] == ["reasoning", "message"]
        assert items[0].content[0].text == THOUGHT and items[1].content[0].text == WORDS
        with client.responses.stream(model=settings["model"], input="Hi") as stream:
            events = list(stream)
        deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == THOUGHT
        final = events[-1].response
        assert [item.type for item in final.output] == ["reasoning", "message"]
        assert final.usage.output_tokens_details.reasoning_tokens == len(THOUGHT)
        sent = [item.model_dump(exclude_none=True) for item in items]
        question = {"role": "user", "content": "Hi"}
        again = client.responses.create(model=settings["model"], input=[question, *sent, question])
        assert again.usage.input_tokens > 2 * len(THOUGHT) + len(WORDS.encode())
        empty = client.responses.create(
            model=settings["model"], input=[question, *sent[1:], question]
        )
        n_marks = 2
        assert again.usage.input_tokens - empty.usage.input_tokens == len(THOUGHT) + n_marks
    with openai.OpenAI(base_url=f"{caller.url}/v1", api_key="any", max_retries=0) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(model=model, messages=ASK, tools=TOOLS)
        message = answer.choices[0].message
        assert message.tool_calls[0].function.name == "f"
        assert message.reasoning_content == THOUGHT and not message.content


def test_mistral(speaker: Running):
    with mistralai.Mistral(server_url=speaker.url, api_key="any") as client:
        model = client.models.list().data[0].id
        settings = {"model": model, "messages": ASK, "random_seed": 1}
        message = client.chat.complete(**settings).choices[0].message
        thought, words = message.content
        assert thought.type == "thinking" and thought.thinking[0].text == THOUGHT
        assert words.text == WORDS
        told = {"thinking": "", "text": ""}
        for chunk in client.chat.stream(**settings):
            content = chunk.data.choices[0].delta.content or ""
            if isinstance(content, str):
                told["text"] += content
            else:
                told["thinking"] += content[0].thinking[0].text
        assert told == {"thinking": THOUGHT, "text": WORDS}
        again = client.chat.complete(model=model, messages=[*ASK, message, *ASK])
        plain = [*ASK, {"role": "assistant", "content": WORDS}, *ASK]
        without = client.chat.complete(model=model, messages=plain)
        assert again.usage.prompt_tokens - without.usage.prompt_tokens == len(THOUGHT) + 2


def test_anthropic(speaker: Running):
    with anthropic.Anthropic(base_url=speaker.url, api_key="any", max_retries=0) as client:
        model = client.models.list().data[0].id
        settings = {"model": model, "messages": ASK, "max_tokens": 30}
        whole = client.messages.create(**settings)
        thought, words = whole.content
        assert (thought.type, thought.thinking, words.text) == ("thinking", THOUGHT, WORDS)
        with client.messages.stream(**settings) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        assert final.content[0].thinking == THOUGHT and final.content[1].text == WORDS
        dialogue = [*ASK, {"role": "assistant", "content": whole.content}, *ASK]
        count = client.messages.count_tokens(model=model, messages=dialogue).input_tokens
        dialogue[1] = {"role": "assistant", "content": WORDS}
        plain = client.messages.count_tokens(model=model, messages=dialogue).input_tokens
        assert count - plain == len(THOUGHT) + 2


def test_thinking_by_a_template(tmp_path: Path):
    """Tags of a template's own, which the prompt may have opened already."""
    template = (
        "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}"
        "{{ m.reasoning_content }}[/INST]{% endfor %}{# </think> #}{{ '<think>\\n' }}"
    )
    answer = [*V15.encode("Oy</think>B."), V15.eos_id]
    pairs = tiny.chain(answer, V15.encode("\n")[0])
    tiny.write(tmp_path, tiny.weights(V15.vocab_size, pairs))
    V15.save(tmp_path / "tekken.json")
    (tmp_path / "chat_template.jinja").write_text(template)
    with LLM.load(str(tmp_path)) as llm:
        reply = llm.chat(ASK)
        thought = {"role": "assistant", "content": "B.", "reasoning_content": "Oy"}
        assert reply.message == thought
        told_what = llm.chat(ASK, format=("choice", '["ja", "nee"]')).finish().answers[0]
        assert told_what.thinking == "Oy" and told_what.text in ("ja", "nee")
        told = [*ASK, {"role": "assistant", "content": "A", "reasoning_content": "Zq"}, *ASK]
        assert "AZq" in V15.decode(llm.chat(told).prompt_ids)
