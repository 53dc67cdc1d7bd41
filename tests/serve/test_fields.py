"""Fields of vLLM's that shape an answer: tokens that may come or may not, prompts cut short."""

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
