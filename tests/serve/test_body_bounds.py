"""The values of a JSON body are counted as they come in, however it is cut."""

import json

from hypothesis import given
from hypothesis import strategies as st

from opennemo.serve.body_bounds import MAX_VALUES, ValueCounter

VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a,[{"\\\n}]é')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('b"\\,[')), inner),
)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def count(value) -> int:
    """Lists and objects, and commas between what is in them."""
    if not isinstance(value, list | dict):
        return 0
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(0, len(inner) - 1) + sum(map(count, inner))


@given(VALUES, st.booleans(), st.lists(st.integers(1, 9), min_size=1))
def test_values_are_counted_and_what_strings_hold_is_not(value, ascii, cuts):
    data, counter, i = json.dumps(value, ensure_ascii=ascii).encode(), ValueCounter(), 0
    while data:
        n = cuts[i % len(cuts)]
        counter.feed(data[:n])
        data, i = data[n:], i + 1
    assert counter.n_values == count(value)


def test_other_encodings_of_unicode_hide_no_values(http):
    """JSON may be UTF-16, where a byte of a letter may look like a quotation mark."""
    body = {"model": "tiny", "messages": HELLO, "x": ["\u2230", *[[]] * (MAX_VALUES + 1)]}
    data, headers = json.dumps(body, ensure_ascii=False), {"content-type": "application/JSON"}
    answer = http.post(CHAT, content=data.encode("utf-16"), headers=headers)
    assert answer.status_code == 400 and "read in UTF-8" in answer.json()["error"]["message"]


def test_bodies_of_very_many_values_are_refused_before_they_are_built(http):
    for body in (
        '{"model": "tiny", "prompt": [' + "-1, " * MAX_VALUES + "-1]}",
        '{"model": "tiny", "x": ' + "[" + "[], " * MAX_VALUES + "[]]}",
    ):
        answer = http.post(
            COMPLETIONS, content=body.encode(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413 and "values" in answer.json()["error"]["message"]


def test_errors_stop_at_the_first_of_a_long_list(http):
    n = 40_000
    for path, fields in (
        (COMPLETIONS, {"prompt": [-1] * n}),
        (COMPLETIONS, {"prompt": [[1, -1]] * n}),
        (CHAT, {"messages": [1] * n}),
        (CHAT, {"logit_bias": {str(i): 101 for i in range(n)}}),
        (CHAT, {"allowed_token_ids": [-1] * n}),
        (CHAT, {"bad_words": [""] * n}),
        (CHAT, {"stop": [1] * n}),
        (CHAT, {"tools": [1] * n}),
        ("/detokenize", {"tokens": [-1] * n}),
    ):
        answer = http.post(path, json={"model": "tiny", "messages": HELLO, **fields})
        assert answer.status_code == 422 and len(answer.json()["detail"]) <= 8, answer.text[:300]


def test_a_text_far_beyond_the_context_is_not_encoded_to_its_end(http):
    for text in ("a" * 15_000_000, "word, " * 10_000, " " * 100_000):
        for path, fields in (
            (COMPLETIONS, {"prompt": text}),
            (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ):
            answer = http.post(path, json={"model": "tiny", **fields})
            assert answer.status_code == 400
            assert answer.json()["code"] == "context_length_exceeded"


def test_a_body_that_is_too_large_gets_the_usual_error(http):
    chunks = (b" " * 2**20 for _ in range(17))
    for content in (b" " * 2**24 + b" ", chunks):
        headers = {"content-type": "application/json"}
        answer = http.post(CHAT, content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "request_too_large"
