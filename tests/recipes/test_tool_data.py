"""Conversations with tools are consistent, varied, and their splits share nothing."""

import copy
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.messages import check_tools, normalize
from opennemo.tokenizer.rank_files import OWN
from opennemo.train.conversations import read_examples
from opennemo.train.rewards import exact_calls
from recipes.tool_data.__main__ import main
from recipes.tool_data.apis import execute, parts
from recipes.tool_data.conversations import check, conversations

pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
TRAIN = list(conversations("train", 400, 0))
TEST = list(conversations("test", 400, 0))


def functions(rows: list[dict]) -> list[dict]:
    return [tool["function"] for row in rows for tool in row["tools"]]


def calls(message: dict) -> list[dict]:
    return [call["function"] for call in message.get("tool_calls", [])]


def test_the_same_seed_makes_the_same_and_another_makes_others():
    assert list(conversations("train", 20, 0)) == TRAIN[:20]
    assert list(conversations("train", 20, 1)) != TRAIN[:20]


def test_prompts_of_the_training_split_end_with_what_is_compared():
    """They have the APIs of that split, and the endings of the other."""
    prompts = list(conversations("train", 400, 0, prompts=True))
    endings = [Counter(bool(row["messages"][-1].get("tool_calls")) for row in rows)
               for rows in (TRAIN, prompts, TEST)]  # fmt: skip
    assert endings[0][True] == 0
    assert endings[1][True] == pytest.approx(endings[2][True], rel=0.1) and endings[1][False] > 50
    trained, tested = ({f["name"] for f in functions(rows)} for rows in (TRAIN, TEST))
    assert {f["name"] for f in functions(prompts)} & trained
    assert not {f["name"] for f in functions(prompts)} & tested


def test_the_splits_share_no_name():
    train, test = parts()["train"], parts()["test"]
    for table in ("domains", "verbs", "arguments"):
        assert not train[table].keys() & test[table].keys()
    nouns = [
        {noun for domain in split["domains"].values() for noun in domain["nouns"]}
        for split in (train, test)
    ]
    assert not nouns[0] & nouns[1]
    for values in ("places", "first", "last", "qualities", "things", "words", "sentences"):
        assert not {*train["values"][values]} & {*test["values"][values]}
    names = [{function["name"] for function in functions(rows)} for rows in (TRAIN, TEST)]
    assert not names[0] & names[1] and min(map(len, names)) > 150
    arguments = [
        {name for function in functions(rows) for name in function["parameters"]["properties"]}
        for rows in (TRAIN, TEST)
    ]
    assert not arguments[0] & arguments[1]


def test_there_are_thousands_of_apis_of_all_types():
    found = {json.dumps(function) for function in functions(TRAIN)}
    assert len(found) > 0.95 * len(functions(TRAIN)) > 700
    types = Counter(
        "enum" if "enum" in schema else schema["type"]
        for function in functions(TRAIN)
        for schema in function["parameters"]["properties"].values()
    )
    assert {*types} == {"string", "integer", "number", "boolean", "array", "enum"}
    assert min(types.values()) > 50


@pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])
def test_every_kind_and_language_occurs(rows: list[dict]):
    kinds = Counter(row["kind"].split("_after")[0] for row in rows)
    assert {*kinds} == {"tool_single", "tool_parallel", "tool_none", "tool_missing"}
    assert min(kinds.values()) > 20
    languages = Counter(row["lang"] for row in rows)
    assert {*languages} == {"en", "fr", "de", "es"} and min(languages.values()) > 10
    assert sum("_after_" in row["kind"] for row in rows) > 80
    for row in rows:
        assert row["licence"] and row["source"]
        check_tools(row["tools"])
        normalize(row["messages"])


def test_values_are_in_the_words_of_the_user():
    n_values = n_said = 0
    for row in TRAIN + TEST:
        said = "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")
        for message in row["messages"]:
            for call in calls(message):
                for value in json.loads(call["arguments"]).values():
                    for item in value if isinstance(value, list) else [value]:
                        if not isinstance(item, bool):
                            n_values += 1
                            n_said += str(item) in said
    assert n_said > 0.95 * n_values


def test_what_is_missing_is_asked_for_and_then_used():
    asked = [row for row in TEST if row["kind"].startswith("tool_missing")]
    final = Counter("tool_calls" in row["messages"][-1] for row in asked)
    assert final[True] > 10 and final[False] > 10
    for row in asked:
        *before, last = row["messages"]
        if "tool_calls" in last:
            assert before[-1]["role"] == "user" and before[-2]["role"] == "assistant"
            assert "tool_calls" not in before[-2]


def test_test_conversations_end_with_what_is_compared():
    for row in TEST:
        assert row["messages"][-1]["role"] == "assistant"
        assert row["messages"][-2]["role"] == "user"
    assert 250 < sum("tool_calls" in row["messages"][-1] for row in TEST) < 350


def test_calls_that_are_wrong_are_noticed():
    row = next(row for row in TRAIN if row["kind"].startswith("tool_single"))
    check(row)
    i = next(i for i, m in enumerate(row["messages"]) if "tool_calls" in m)
    for change, message in (
        ({"arguments": "{}"}, "required property"),
        ({"name": "dance"}, "not among the tools"),
    ):
        broken = copy.deepcopy(row)
        broken["messages"][i]["tool_calls"][0]["function"] |= change
        with pytest.raises(InvalidRequest, match=message):
            check(broken)
    broken = copy.deepcopy(row)
    broken["messages"][i + 1]["content"] = '{"status": "burnt"}'
    with pytest.raises(InvalidRequest, match="not what its call is answered with"):
        check(broken)


def test_apis_answer_by_the_call_alone_and_validate():
    number = {"type": "integer"}
    choice = {"type": "string", "enum": ["a", "b"]}
    properties = {"n": number, "way": choice, "all": {"type": "array", "items": {"type": "string"}}}
    parameters = {"type": "object", "properties": properties, "required": ["n"]}
    function = {"name": "find_x", "description": "Find x.", "parameters": parameters}
    tool = {"type": "function", "function": function}
    good = {"n": 3, "way": "a", "all": ["x"]}
    assert execute(tool, good) == execute(tool, dict(reversed(good.items())))
    assert "results" in execute(tool, good)
    other = {"type": "function", "function": {**function, "description": "Book x."}}
    assert execute(other, good)["status"] == "ok"
    for bad in ({}, {"n": "3"}, {"n": True}, {"n": 3, "way": "c"}, {"n": 3, "m": 1}, [], "{}"):
        with pytest.raises(InvalidRequest, match="find_x: "):
            execute(tool, bad)
    with pytest.raises(InvalidRequest, match="find_x: "):
        execute(tool, {"n": 1, "all": [1]})


def reply(*calls: tuple[str, object]) -> dict:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"{i:09}", "type": "function", "function": {"name": n, "arguments": arguments}}
            for i, (n, arguments) in enumerate(calls)
        ],
    }


def test_exact_calls():
    one, two = ("f", '{"a": 1, "b": ["x", "y"]}'), ("g", "{}")
    reference = reply(one, two)
    assert exact_calls(reference, reply(two, ("f", {"b": ["x", "y"], "a": 1.0})))
    assert exact_calls({"role": "assistant", "content": "No."}, {"role": "assistant"})
    for wrong in (
        reply(one),
        reply(one, two, two),
        reply(("f", '{"a": 1, "b": ["y", "x"]}'), two),
        reply(("f", '{"a": "1", "b": ["x", "y"]}'), two),
        reply(("f", '{"a": true, "b": ["x", "y"]}'), two),
        reply(("f", '{"a": 1}'), two),
        reply(("f", "no JSON"), two),
        {"role": "assistant", "content": json.dumps(reference["tool_calls"])},
    ):
        assert not exact_calls(reference, wrong)
    assert not exact_calls({"role": "assistant", "content": "No."}, reply(two))


def test_the_program_writes_a_chat_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["tool_data", *map(str, args)])
        main()

    tools = tmp_path / "tools.jsonl"
    run(tools, "--n", 5, "--split", "test")
    assert len(tools.read_text("utf-8").splitlines()) == 5
    examples, report = read_examples([tools], open_tokenizer(Path(OWN)), max_tokens=8192)
    assert len(examples) >= 5 and not report.bad
    with pytest.raises(SystemExit, match="File exists"):
        run(tools)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "x", "--split", "both")


def test_a_missing_package_is_named_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("recipes.tool_data.__main__.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["tool_data", str(tmp_path / "chats.jsonl")])
    with pytest.raises(SystemExit, match=r"^jsonschema is missing: .*$"):
        main()
    assert not (tmp_path / "chats.jsonl").exists()
