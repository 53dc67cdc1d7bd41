"""Fields of vLLM's that shape an answer: tokens that may come or may not, prompts cut short."""

import json
import re
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
BODY = {
    "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40,
    "return_token_ids": True, "ignore_eos": True, "logit_bias": {2: -100},
}  # fmt: skip
LETTERS = {64 + ord(c) for c in "abcd"}  # a byte's id is 64 + its value


def ask(http, path=CHAT, **fields) -> list[int]:
    answer = http.post(path, json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    assert "x-ignored-params" not in answer.headers
    return answer.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 3, "seed": 1}])
def test_nothing_but_allowed_tokens_comes(http, fields):
    ids = ask(http, allowed_token_ids=sorted(LETTERS), **fields)
    assert set(ids) <= LETTERS and len(ids) == 40
    both = {"allowed_token_ids": sorted(LETTERS), "bad_words": ["a", "b", "c"], **fields}
    assert set(ask(http, **both)) == {64 + ord("d")}


def test_a_grammar_goes_before_allowed_tokens_and_bad_words(http):
    shape = {"structured_outputs": {"regex": "x[ab]{6}y"}, "temperature": 0}
    text = bytes(id - 64 for id in ask(http, **shape, bad_words=["x", "a"]) if id >= 64).decode()
    assert text == "xbbbbbby"  # a had to give way, x could not
    text = bytes(id - 64 for id in ask(http, **shape, allowed_token_ids=[64 + ord("a")])[:8])
    assert text == b"xaaaaaay"


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1, "seed": 1}])
def test_a_bad_word_does_not_come_but_its_parts_may(http, fields):
    few = {"allowed_token_ids": sorted(LETTERS), **fields}
    if fields["temperature"] == 0:  # a greedy answer of a random model repeats itself
        few["presence_penalty"], few["max_tokens"] = 0.01, 12
    free = bytes(id - 64 for id in ask(http, **few)).decode()
    word = free[1:4]
    assert len(word) == 3
    bound = bytes(id - 64 for id in ask(http, **few, bad_words=[word])).decode()
    assert bound[:3] == free[:3] and word not in bound


def test_guessing_ahead_changes_no_answer(running, tiny_llm):
    fields = {"temperature": 0, "max_tokens": 30}
    few = {"allowed_token_ids": sorted(LETTERS)}
    for shaped in ({"logit_bias": {"2": -100, "165": 100}}, few, few | {"bad_words": ["aa", "b"]}):
        found = []
        for n_draft_tokens in (0, 4):
            llm = tiny_llm(n_draft_tokens=n_draft_tokens)
            with running(llm) as server, server.client() as http:
                found.append(ask(http, CHAT, **fields, **shaped))
        assert found[0] == found[1]


def test_an_allowed_token_outside_the_vocabulary_is_refused(http):
    for ids in ([10**6], []):
        answer = http.post(CHAT, json={**BODY, "allowed_token_ids": ids})
        assert answer.status_code in (400, 422) and "allowed_token_ids" in answer.json()["message"]
    assert http.post(CHAT, json={**BODY, "bad_words": [""]}).status_code == 422


def test_a_prompt_is_cut_to_its_last_tokens_where_that_is_asked_for(http):
    body = {"prompt": "x" * 6000 + "abc", "truncate_prompt_tokens": 3, "messages": None}
    body |= {"max_tokens": 2, "model": "tiny"}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 3
    whole = http.post("/v1/completions", json={**body, "truncate_prompt_tokens": None})
    assert whole.json()["code"] == "context_length_exceeded"
    ids = {**body, "prompt": [64 + ord("a")] * 9, "return_token_ids": True, "stream": False}
    answer = http.post("/v1/completions", json=ids).json()["choices"][0]
    assert answer["prompt_token_ids"] == [64 + ord("a")] * 3
    # The layout of a conversation would be cut in the middle, so there it has no effect.
    answer = http.post(CHAT, json={**BODY, "truncate_prompt_tokens": 3})
    assert answer.headers["x-ignored-params"] == "truncate_prompt_tokens"


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
JSON = '{"n": [0-9]}'
GBNF = 'root ::= "yes" | digit{3}\ndigit ::= [0-9] # one'


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": json.dumps(SCHEMA)}, JSON),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_grammar": GBNF}, "yes|[0-9]{3}"),
        ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"structured_outputs": {"grammar": GBNF}}, "yes|[0-9]{3}"),
        ({"nvext": {"guided_json": SCHEMA}}, JSON),
        ({"nvext": {"guided_choice": ["red", "blue"]}}, "red|blue"),
        ({"guided_json": SCHEMA, "nvext": {"guided_json": SCHEMA}}, JSON),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"ebnf": GBNF}, "yes|[0-9]{3}"),
        ({"json_schema": SCHEMA}, JSON),
        ({"json_schema": json.dumps(SCHEMA)}, JSON),
        ({"grammar": GBNF}, "yes|[0-9]{3}"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON),
        ({"response_format": {"type": "json", "value": SCHEMA}}, JSON),
        ({"response_format": {"type": "regex", "value": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"response_format": {"type": "grammar", "grammar": GBNF}}, "yes|[0-9]{3}"),
    ],
)
def test_whatever_asks_for_a_form_gets_it(http, fields, pattern):
    """vLLM's older fields, NIM's, SGLang's, llama.cpp's and TGI's were dropped silently."""
    for path, prompt in ((CHAT, {}), ("/v1/completions", {"prompt": "Hi", "messages": None})):
        answer = http.post(path, json={**BODY, **prompt, **fields})
        assert answer.status_code == 200 and "x-ignored-params" not in answer.headers, answer.text
        choice = answer.json()["choices"][0]
        text = choice["text"] if prompt else choice["message"]["content"]
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "fields",
    [
        {"nvext": {"top_k": 5}}, {"add_generation_prompt": False},
        {"guided_json": 5}, {"guided_choice": "red"}, {"guided_regex": "("}, {"nvext": 3},
        {"nvext": {"guided_what": "x"}}, {"grammar": 'root ::= "a'}, {"grammar": "[" * 3000},
        {"grammar": 'other ::= "a"'}, {"structural_tag": "{}"}, {"guided_whitespace_pattern": " "},
        {"guided_regex": "a", "regex": "b"}, {"json_schema": {"uniqueItems": True}},
        {"response_format": {"type": "text"}, "guided_json": {"uniqueItems": True}},
        {"response_format": {"type": "regex"}}, {"response_format": {"type": "structural_tag"}},
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_had_is_refused(http, fields):
    answer = http.post(CHAT, json={**BODY, **fields})
    assert answer.status_code == 400, answer.text


def test_the_forms_of_other_protocols_hold_too(http):
    body = {"model": "tiny", "messages": BODY["messages"], "max_tokens": 40}
    form = {"type": "json_schema", "schema": SCHEMA}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        answer = http.post("/v1/messages", json={**body, **fields})
        assert re.fullmatch(JSON, answer.json()["content"][0]["text"])
    wrong = {"type": "json_schema", "schema": {"uniqueItems": True}}
    assert http.post("/v1/messages", json={**body, "output_format": wrong}).status_code == 400
    tags = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    schema = {"type": "object", "properties": {"tags": tags}}
    tool = {"name": "f", "strict": True, "input_schema": schema}
    refused = http.post("/v1/messages", json={**body, "tools": [tool]})
    assert (
        refused.status_code == 400
        and "'f': parameters.properties.tags.uniqueItems" in refused.json()["error"]["message"]
    )
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 40, "guided_json": SCHEMA}
    answer = http.post("/v1/responses", json=body).json()
    assert re.fullmatch(JSON, answer["output"][0]["content"][0]["text"])


def test_stop_token_ids_end_no_required_call(http):
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    body = {**BODY, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    answer = http.post(CHAT, json={**body, "max_tokens": 200, "stop_token_ids": [*range(3, 67)]})
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert re.fullmatch(JSON, call["function"]["arguments"])


@pytest.mark.parametrize(
    "fields",
    [
        {"typical_p": 1e-6}, {"typical": 1e-6}, {"top_n_sigma": 1e-6}, {"nsigma": 1e-6},
        {"xtc_probability": 1.0, "xtc_threshold": 1e-6},
    ],
)  # fmt: skip
def test_filters_as_llama_cpp_and_koboldcpp_spell_them(http, fields):
    few: dict[str, Any] = {"allowed_token_ids": sorted(LETTERS), "temperature": 2}
    few["max_tokens"] = 12
    free = [ask(http, **few, seed=seed) for seed in (1, 2)]
    narrow = [ask(http, **few, **fields, seed=seed) for seed in (1, 2)]
    assert free[0] != free[1] and narrow[0] == narrow[1]  # one token is left of each row
    greedy = ask(http, **dict(few, temperature=0))
    if "sigma" in str(fields):
        assert narrow[0] == greedy
    assert ask(http, **dict(few, temperature=0), **fields) == greedy


def test_dry_ends_a_repetition(http):
    few = {"allowed_token_ids": sorted(LETTERS), "temperature": 0, "max_tokens": 40}
    few |= {"logit_bias": {2: -100, 64 + ord("a"): 5}}
    assert set(ask(http, **few)) == {64 + ord("a")}
    dry = {"dry_multiplier": 5.0, "dry_base": 2.0, "dry_allowed_length": 2}
    assert len(set(ask(http, **few, **dry))) > 1
    assert set(ask(http, **few, **dry, dry_penalty_last_n=0)) == {64 + ord("a")}
    assert set(ask(http, **few, **dry, dry_sequence_breakers=["a"])) == {64 + ord("a")}
    assert http.post(CHAT, json={**BODY, "dry_base": 0}).status_code == 422


def test_an_answer_that_repeats_itself_ends_by_vllm_s_field(http):
    few = {"allowed_token_ids": sorted(LETTERS), "temperature": 0, "max_tokens": 40}
    few |= {"logit_bias": {2: -100, 64 + ord("a"): 5}}
    detection = {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 5}
    body = {**BODY, **few, "repetition_detection": detection}
    (choice,) = http.post(CHAT, json=body).json()["choices"]
    assert choice["message"]["content"] == "a" * 10
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition_detected")
    with http.stream("POST", CHAT, json={**body, "stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    last = [c for line in lines for c in json.loads(line)["choices"] if c["finish_reason"]]
    assert [(c["finish_reason"], c["stop_reason"]) for c in last] == [
        ("length", "repetition_detected")
    ]
    text = {"model": BODY["model"], "prompt": "Hi", **few, "repetition_detection": detection}
    (choice,) = http.post("/v1/completions", json=text).json()["choices"]
    assert choice["text"] == "a" * 10 and choice["stop_reason"] == "repetition_detected"
    assert 'finished_reason="repetition",model_name=' in http.get("/metrics").text  # no failure
    off = {**body, "repetition_detection": {"max_pattern_size": 0}}
    (choice,) = http.post(CHAT, json=off).json()["choices"]
    assert len(choice["message"]["content"]) == 40 and choice["stop_reason"] is None


@pytest.mark.parametrize(
    ("detection", "status"),
    [
        ({"max_pattern_size": 4, "min_count": 1}, 400),
        ({"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2}, 400),
        ({"max_pattern_size": 1e9}, 422),
        ({"pattern": 4}, 422),
        (True, 422),
    ],
)
def test_repetitions_that_make_no_sense(http, detection, status):
    answer = http.post(CHAT, json={**BODY, "repetition_detection": detection})
    assert answer.status_code == status and "repetition_detection" in answer.text
