"""What is wrong in chat files is found, and repaired where it can be."""

import json
import sys
from pathlib import Path

import pytest

from opennemo.cli import main
from opennemo.data.validation import epoch, fix, validate
from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import save
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.planning.machines import parse_machines
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.rank_files import OWN
from opennemo.train.conversations import read_pairs

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
OLD = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "content": "1"}
# What a line says, and what of its messages is good.
LINES: list[tuple[dict | str, list[dict] | None]] = [
    ({"messages": [ASK, SAY], "lang": "en"}, [ASK, SAY]),
    ({"messages": [ASK, SAY, ASK]}, [ASK, SAY]),
    ({"messages": [ASK, SAY, ASK, {**SAY, "content": ""}], "lang": "en"}, [ASK, SAY]),
    ({"messages": [ASK, SAY, RESULT, SAY]}, [ASK, SAY]),
    ({"messages": [{**ASK, "role": "human"}, {**SAY, "role": "GPT"}]}, [ASK, SAY]),
    (
        {"messages": [{**ASK, "role": "human"}, OLD, {**RESULT, "role": "function"}, SAY],
         "functions": [{"name": "f"}]},
        [ASK, {**CALL, "content": None}, RESULT, SAY],
    ),
    ({"messages": [ASK, SAY, ASK, CALL, RESULT, SAY]}, [ASK, SAY]),
    ({"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Hi"}]},
     [SAY]),
    ({"messages": [ASK, SAY, ASK, {**SAY, "content": "word " * 500}, ASK, SAY]}, [ASK, SAY]),
    ({"messages": [ASK, {**SAY, "content": "word " * 500}]}, None),
    ({"messages": [ASK]}, None),
    ({"messages": [ASK, {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}],
      "tools": [TOOL]}, None),
    ("{", None),
    ("[]", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(Path(OWN))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chat.jsonl"
    lines = (line if isinstance(line, str) else json.dumps(line) for line, _ in LINES)
    path.write_text("\n".join(lines))
    return path


def test_bad_lines_are_repaired_or_listed(tokenizer, file, tmp_path):
    report = validate([file], tokenizer, 128)
    assert [line.line for line in report.bad] == list(range(2, len(LINES) + 1))
    out = tmp_path / "fixed.jsonl"
    left_out = fix([file], out, report, tokenizer, 128)
    good = [messages for _, messages in LINES if messages is not None]
    assert [line.line for line in left_out] == [
        i for i, (_, messages) in enumerate(LINES, 1) if messages is None
    ]
    fixed = out.read_text().splitlines()
    assert fixed[0] == json.dumps(LINES[0][0])  # as it was, byte for byte
    rows = [json.loads(line) for line in fixed]
    assert [row["messages"] for row in rows] == good
    assert rows[2]["lang"] == "en" and rows[5]["tools"][0]["function"]["name"] == "f"
    again = validate([out], tokenizer, 128)
    assert not again.bad and again.n_conversations == len(good)
    with pytest.raises(InvalidRequest, match="exists"):
        fix([file], out, report, tokenizer, 128)


def test_preferences_are_known_by_themselves(tokenizer, tmp_path):
    rows = [
        {"messages": [ASK], "chosen": "A", "rejected": "B"},
        {"messages": [{**ASK, "role": "human"}], "chosen": "A", "rejected": "B"},
        {"messages": [ASK], "chosen": "A", "rejected": "A"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    report = validate([file], tokenizer, 128)
    assert [line.line for line in report.bad] == [2, 3] and len(report.lengths) == 2
    left_out = fix([file], tmp_path / "out.jsonl", report, tokenizer, 128)
    assert [line.line for line in left_out] == [3]
    pairs, report = read_pairs([tmp_path / "out.jsonl"], tokenizer, max_tokens=128)
    assert len(pairs) == 2 and not report.bad


def test_an_epoch_is_planned(tokenizer, file, tmp_path):
    save(Transformer(PRESETS["tiny"]), tmp_path / "model")
    report = validate([file], tokenizer, 128)
    machines = parse_machines("1x4090", 1)
    full, lora = (
        epoch([file], report, tmp_path / "model", machines, width=128, rank=rank) for rank in (0, 4)
    )
    for made in (full, lora):
        assert not made.problems and made.seconds > 0
        assert made.tokens_per_second == pytest.approx(128 / made.seconds)  # one row
    assert lora.total < full.total


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["opennemo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
    return int(exit.value.code or 0)


def test_prompts_are_read_as_what_is_to_be_answered(tmp_path, capsys):
    """A line may end with a question; one without is bad, and left out of a copy."""
    rows = [{"messages": [ASK]}, {"messages": [ASK, SAY]}, {"messages": [SAY]}, {"prompt": "Hi"}]
    file, fixed = tmp_path / "prompts.jsonl", tmp_path / "fixed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    command = ("validate-data", file, "--model", OWN, "--prompts")
    assert run(*command) == 1
    out, err = capsys.readouterr()
    assert "conversations 3\n" in out and "to be learned 0\n" in out and "line 3: " in err
    assert run(*command, "--fix", fixed) == 0
    assert "0 lines repaired, 1 left out" in capsys.readouterr().out
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == [*rows[:2], rows[3]]
    assert run("validate-data", fixed, "--model", OWN, "--prompts") == 0


def test_the_commands(file, tmp_path, capsys):
    assert run("validate-data", file, "--model", OWN, "--max-tokens", 128) == 1
    out, err = capsys.readouterr()
    assert "conversations 1\n" in out and "messages      2, with 0 tool calls" in out
    assert "line 13: not JSON" in err and "13 bad lines; --fix OUT" in err
    fixed = tmp_path / "fixed.jsonl"
    assert run("validate-data", file, "--model", OWN, "--max-tokens", 128, "--fix", fixed) == 0
    out, err = capsys.readouterr()
    assert "8 lines repaired, 5 left out" in out and err.count("\n") == 5
    assert run("validate-data", tmp_path / "nothing.jsonl", "--model", OWN) == 2
    assert "no such file" in capsys.readouterr().err
