"""OpenAI's, Mistral's and Anthropic's own clients, unchanged, over loopback."""

import json

import pytest

anthropic = pytest.importorskip("anthropic")
mistralai = pytest.importorskip("mistralai.client")
openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]


@pytest.fixture(scope="module")
def oai(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def mistral(server):
    with mistralai.Mistral(server_url=server.url, api_key=server.key) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as client:
        yield client


def test_openai_whole_equals_stream(oai):
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "seed": 5, "n": 2}
    whole = oai.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    chunks = list(
        oai.chat.completions.create(
            **settings, logprobs=True, top_logprobs=2, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    usage = chunks.pop().usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert len(whole.choices) == 2 and whole.choices[0].message != whole.choices[1].message
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
        tokens = [t for c in mine if c.logprobs for t in c.logprobs.content]
        assert tokens == choice.logprobs.content and len(tokens[0].top_logprobs) == 2
        text = b"".join(bytes(t.bytes) for t in tokens).decode(errors="replace")
        assert text == choice.message.content


def test_openai_tools_round_trip(oai):
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    settings = {"model": "tiny", "tools": TOOLS, "seed": 1, "max_tokens": 3000}
    choice = {"type": "function", "function": {"name": "add"}}
    answer = oai.chat.completions.create(messages=messages, tool_choice=choice, **settings)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls[:1]
    assert call.function.name == "add" and len(call.id) == 9
    assert 0 <= json.loads(call.function.arguments)["n"] <= 99
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "4"}
        for call in answer.choices[0].message.tool_calls
    ]
    messages += [answer.choices[0].message, *results]
    again = oai.chat.completions.create(
        messages=messages, tool_choice="none", model="tiny", tools=TOOLS, max_tokens=5
    )
    assert again.choices[0].message.content and not again.choices[0].message.tool_calls


def test_openai_streams_tool_calls_as_it_tells_them_whole(oai):
    settings = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
    for seed in range(4):
        whole = oai.chat.completions.create(**settings, seed=seed, max_tokens=300)
        stream = oai.chat.completions.create(**settings, seed=seed, max_tokens=300, stream=True)
        calls, finish = {}, None
        for chunk in stream:
            for delta in chunk.choices[0].delta.tool_calls or []:
                if delta.id:
                    calls[delta.index] = [delta.function.name, ""]
                calls[delta.index][1] += delta.function.arguments
            finish = chunk.choices[0].finish_reason or finish
        want = [
            [c.function.name, c.function.arguments] for c in whole.choices[0].message.tool_calls
        ]
        assert list(calls.values()) == want and finish == whole.choices[0].finish_reason


def test_openai_structured_output(oai):
    import pydantic

    class Number(pydantic.BaseModel):
        n: int
        kind: str = pydantic.Field(pattern="^[ab]{2}$")

    parsed = oai.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Number, max_tokens=400, seed=2
    )
    assert parsed.choices[0].message.parsed.kind in ("aa", "ab", "ba", "bb")
    for extra, check in (
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdecimal()),
        ({"json": SCHEMA}, lambda text: 0 <= json.loads(text)["n"] <= 99),
    ):
        answer = oai.chat.completions.create(
            model="tiny", messages=HELLO, extra_body={"structured_outputs": extra}, max_tokens=200
        )
        assert check(answer.choices[0].message.content)


def test_openai_errors_have_their_classes(oai, server):
    ask = oai.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model"):
        ask(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        ask(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="messages"):
        ask(model="tiny", messages=[{"role": "robot", "content": "x"}])
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        ask(model="tiny", messages=HELLO, temperature=9)
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        ask(model="tiny", messages=HELLO, response_format=bad)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        oai.embeddings.create(model="tiny", input="x")
    assert caught.value.status_code == 501


def test_openai_completions_and_models(oai):
    ask = oai.completions.create
    whole = ask(model="tiny", prompt=["abc", "de"], max_tokens=6, seed=3, echo=True, logprobs=1)
    assert [c.index for c in whole.choices] == [0, 1] and whole.choices[0].text.startswith("abc")
    logprobs = whole.choices[1].logprobs
    assert logprobs.tokens[:3] == ["<s>", "d", "e"] and logprobs.token_logprobs[0] is None
    scored = ask(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == "abc" and len(scored.choices[0].logprobs.tokens) == 4
    parts = ask(model="tiny", prompt="abc", max_tokens=6, seed=3, echo=True, stream=True)
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert [m.id for m in oai.models.list()] == ["tiny"] == [oai.models.retrieve("tiny").id]


def test_openai_responses(oai):
    settings = {"model": "tiny", "input": "Hello", "max_output_tokens": 12}
    events = list(oai.responses.create(**settings, stream=True))
    final = events[-1].response
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        final.output_text
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    tool = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}
    whole = oai.responses.create(
        model="tiny", input="2 + 2?", tools=[tool], tool_choice="required",
        parallel_tool_calls=False, max_output_tokens=500,
    )  # fmt: skip
    (call,) = whole.output
    assert call.type == "function_call" and 0 <= json.loads(call.arguments)["n"] <= 99
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    again = oai.responses.create(
        model="tiny", input=[{"role": "user", "content": "2 + 2?"}, call.model_dump(), output],
        max_output_tokens=5,
    )  # fmt: skip
    assert again.output[0].type == "message"
    with oai.responses.stream(
        model="tiny", input="x", tools=[tool], tool_choice="required",
        parallel_tool_calls=False, max_output_tokens=2000,
    ) as stream:  # fmt: skip
        assert stream.get_final_response().output[0].name == "add"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        oai.responses.create(**settings, previous_response_id="resp_1")


def test_mistral_whole_stream_prefix_and_models(mistral):
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "random_seed": 7}
    whole = mistral.chat.complete(**settings, safe_prompt=True)
    assert whole.usage.prompt_tokens > 100  # the safety text is in it
    whole = mistral.chat.complete(**settings)
    chunks = [c.data for c in mistral.chat.stream(**settings)]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    prefix = [*HELLO, {"role": "assistant", "content": "Sure", "prefix": True}]
    answer = mistral.chat.complete(model="tiny", messages=prefix, max_tokens=5)
    assert answer.choices[0].message.content.startswith("Sure")
    (card,) = mistral.models.list().data
    assert card.capabilities.function_calling and card.max_context_length == 4096
    assert mistral.models.retrieve(model_id="tiny").id == "tiny"


def test_mistral_tools_and_errors(mistral):
    answer = mistral.chat.complete(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice="any", max_tokens=3000,
        parallel_tool_calls=False, random_seed=1,
    )  # fmt: skip
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and call.function.name in ("add", "now")
    result = {"role": "tool", "name": call.function.name, "content": "4", "tool_call_id": call.id}
    again = mistral.chat.complete(model="tiny", messages=[*HELLO, message, result], max_tokens=5)
    assert again.choices[0].message.content
    with pytest.raises(mistralai.errors.SDKError) as caught:
        mistral.chat.complete(model="codestral", messages=HELLO)
    assert caught.value.status_code == 404
    with pytest.raises(mistralai.errors.HTTPValidationError):
        mistral.chat.complete(model="tiny", messages=HELLO, temperature=99)
    with pytest.raises(mistralai.errors.SDKError, match="middle"):
        mistral.fim.complete(model="tiny", prompt="def f(")


@pytest.mark.parametrize("choice", ["any", "auto"])
def test_mistral_streams_whole_calls(running, tiny_llm, choice):
    """Mistral's clients treat every delta as a separate call, and require a name."""
    bias = {9: 100.0} if choice == "auto" else None
    with running(tiny_llm(logit_bias=bias)) as server:
        client = mistralai.Mistral(server_url=server.url, api_key="none")
        settings = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
        for seed in range(3):
            sampling = {"max_tokens": 300, "random_seed": seed}
            whole = client.chat.complete(**settings, **sampling).choices[0]
            chunks = [event.data.choices[0] for event in client.chat.stream(**settings, **sampling)]
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            assert [c.function for c in calls] == [c.function for c in whole.message.tool_calls]
            assert chunks[-1].finish_reason == whole.finish_reason and len({c.id for c in calls})


def test_deltas_of_calls_suit_clients_that_nobody_recognises(http):
    """OpenAI's add names up, Mistral's want one in each delta: an empty one suits both."""
    body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    first = [call for call in calls if call["index"] == 0]
    assert len(first) > 1 and "".join(c["function"]["name"] for c in first) in ("add", "now")


def test_anthropic_blocks_have_a_list_of_citations(http):
    """Vercel's client refuses null there, and Anthropic's specification asks for the field."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
    assert http.post("/v1/messages", json=body).json()["content"][0]["citations"] == []
    assert '"citations":null' not in http.post("/v1/messages", json={**body, "stream": True}).text


def test_anthropic(claude):
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 20}
    settings["extra_body"] = {"temperature": 0}
    whole = claude.messages.create(**settings, system="Be brief.")
    with claude.messages.stream(**settings, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == 20
    tool = {"name": "add", "description": "Add", "input_schema": SCHEMA}
    call = claude.messages.create(
        model="tiny", messages=HELLO, max_tokens=2000, tools=[tool],
        tool_choice={"type": "tool", "name": "add", "disable_parallel_tool_use": True},
    )  # fmt: skip
    assert call.stop_reason == "tool_use" and 0 <= call.content[0].input["n"] <= 99
    result = {"type": "tool_result", "tool_use_id": call.content[0].id, "content": "4"}
    dialogue = [*HELLO, {"role": "assistant", "content": call.content}]
    dialogue.append({"role": "user", "content": [result]})
    assert claude.messages.create(model="tiny", messages=dialogue, max_tokens=4).content
    count = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
    assert count.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    with pytest.raises(anthropic.NotFoundError, match="no model"):
        claude.messages.create(model="claude", messages=HELLO, max_tokens=2)
    letter = next(c for c in text if c.isascii() and c.isprintable())  # greedy: it comes again
    cut = claude.messages.create(**settings, system="Be brief.", stop_sequences=[letter])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == letter


def test_llm_comply(running, tiny_llm):
    """Every check of llm-comply that is about text, under its bundled specifications."""
    import subprocess
    import sys

    pytest.importorskip("llm_comply")
    # Byte by byte a random model would rarely end: it leans to the end, and to closing strings.
    llm = tiny_llm(logit_bias={2: 4.0, 64 + ord('"'): 4.0, 64 + ord("]"): 4.0})
    about_other_things = ("image", "reasoning", "thinking")
    with running(llm, api_key=["llm-comply-key"]) as server:
        for protocol in ("openai-chat", "open-responses", "anthropic"):
            command = [
                sys.executable,
                "-m",
                "llm_comply.cli",
                "--format",
                protocol,
                "-k",
                server.key,
            ]
            command += ["-u", f"{server.url}/v1", "-m", "tiny", "--json"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            results = json.loads(done.stdout)["results"]
            wrong = {
                r["id"]: r["errors"]
                for r in results
                if r["status"] == "failed" and not any(o in r["id"] for o in about_other_things)
            }
            assert not wrong and len(results) >= 9


def test_anthropics_tool_runner_sends_whole_conversations(claude):
    """Its client asks the server to keep a conversation, and must be refused."""
    seen = []

    @anthropic.beta_tool
    def add(n: int) -> str:
        """Add to a number."""
        seen.append(n)
        return "4"

    runner = claude.beta.messages.tool_runner(
        model="tiny", messages=HELLO, max_tokens=2000, tools=[add], max_iterations=2,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )  # fmt: skip
    assert len(list(runner)) == 2 and len(seen) == 2
    thread = {"type": "continue", "previous_message_id": "msg_1"}
    with pytest.raises(anthropic.BadRequestError, match="keeps no conversations"):
        claude.beta.messages.create(model="tiny", messages=HELLO, max_tokens=4, thread=thread)
