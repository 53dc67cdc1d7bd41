"""Learning from rewards: what is drawn, what it is worth, what is learned, and what goes wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opennemo.errors import OpenNemoError
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load, save
from opennemo.model.companions import copy_companions
from opennemo.model.export import quantize
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.rollouts import Rollouts
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.config import Reinforcement, Reward, to_json
from opennemo.train.conversations import Example, Task
from opennemo.train.metrics import read_metrics
from opennemo.train.objectives import reinforce
from opennemo.train.packing import collate, pack
from opennemo.train.rewards import CHECKS, Attempt, Judge
from opennemo.train.run import train
from opennemo.train.setup import initialise_
from tests.ranks import run_ranks
from tests.train.test_trainer import dying_at, start, wait_for_step

REWARDS = '''
def wanted(attempt):
    """How much of an answer is the letter z."""
    return attempt.text.count("z") / 6

def small(attempt):
    """How much of it is small letters."""
    return sum(c in "abcdefghijklmnopqrstuvwxyz" for c in attempt.text) / 6

def raises(attempt):
    raise KeyError("of ours")

def hangs(attempt):
    import time
    time.sleep(60)

def is_nan(attempt):
    return float("nan")

def is_a_list(attempt):
    return [1.0, 2.0]

def is_an_array(attempt):
    import numpy
    return numpy.ones((3, 2))

no_function = 3
'''


@pytest.fixture(scope="session")
def rewards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "ours.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def make_rl(make_recipe, chats, rewards):
    """A recipe that rewards small letters: `make_rl(steps=3, rl={"updates": 2})`."""

    def make(objective="rl", reward="small", rl=None, **changes):
        changes.setdefault("data", {})
        changes["data"] = {
            "train": [{"path": str(chats)}], "valid": [{"path": str(chats)}], "window": 64,
            "rows": 4, "micro_rows": 2, **changes["data"],
        }  # fmt: skip
        more = {"rewards": [{"name": f"{rewards}:{reward}"}], **(rl or {})}
        changes = {
            "drawing": {"answers": 8, "max_tokens": 6},
            "optim": {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.0},
            **({"rl": more} if objective == "rl" else {}), **changes,
        }  # fmt: skip
        return make_recipe(objective, **changes)

    return make


def run(recipe, folder: Path) -> list[dict]:
    train(recipe, folder, rollout=Rollouts, quiet=True)
    return read_metrics(folder)


def test_a_tiny_model_learns_to_emit_the_letter_that_is_rewarded(make_rl, rewards, tmp_path):
    records = run(make_rl(steps=30, reward="wanted", evaluation={"every": 15}), tmp_path / "run")
    assert records[0]["reward"] < 0.1 and records[-1]["reward"] > 0.9
    assert records[-1]["valid_reward"] == 1
    assert records[-1][f"reward_{rewards}:wanted"] == records[-1]["reward"]
    # What each part gave, of two groups a time.
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert [line["step"] for line in lines[::16]] == [14, 29]
    assert lines[-1]["answer"].count("z") / 6 == lines[-1]["reward"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| rewards | 1 " in card and "44 prompts of" in card


QAT = {"qat": {"format": "int8"}}
CASES = {
    "plain": {"rl": {"updates": 2, "epochs": 2}},
    "held back": {"rl": {"kl": 0.1}},
    "int8": QAT,
    "fp8-static": {"qat": {"format": "fp8-static", "kv": True}},
}


def changed_in(case: str) -> dict:
    return {"steps": 4, "evaluation": {"every": 2}, "saving": {"every": 2}, **CASES[case]}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted_bit_for_bit(make_rl, base, tmp_path, case):
    changes = changed_in(case)
    if case == "held back":  # from what it was at first
        changes["model"] = {"path": str(base), "shape": None, "tokenizer": None}
    recipe = make_rl(**changes)
    whole = run(recipe, tmp_path / "whole")
    with dying_at("practise", 4):
        run(recipe, tmp_path / "resumed")
    assert without_times(run(recipe, tmp_path / "resumed")) == without_times(whole)
    assert_equal(tmp_path / "whole" / "model", tmp_path / "resumed" / "model")
    # Of one update the answers are the model's own; of four they are what it was before.
    assert whole[0]["spread"] > 0 and (whole[0]["change"] > 1e-2) == (case == "plain")
    assert (whole[-1].get("kl", 0) > 0) == (case == "held back")


def without_times(records: list[dict]) -> list[dict]:
    times = ("tokens_per_second", "mfu", "waited_for_data", "seconds_drawing")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def sure(seed: int) -> Transformer:
    model = initialise_(Transformer(PRESETS["tiny"]), seed)
    with torch.no_grad():
        model.output.weight *= 10
    return model


@pytest.fixture(scope="session")
def base(tokenizer_folder, tmp_path_factory) -> Path:
    """A model that is there, with a tokenizer; its head is large enough to say something."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save(sure(1), folder)
    copy_companions(tokenizer_folder, folder, layout="hf")
    return folder


@pytest.mark.parametrize("stored", [None, "int8"])
def test_an_adapter_learns_over_weights_or_codes(make_rl, base, stored, tmp_path):
    """Codes stay as they are, and the engine gets what was learned as an adapter beside them."""
    if stored:
        quantize(base, tmp_path / "codes", format=stored)
    path = str(tmp_path / "codes" if stored else base)
    asked = {
        "model": {"path": path, "shape": None, "tokenizer": None}, "rl": {"kl": 1e-3},
        "optim": {"lr": 0.02, "weight_decay": 0.0},
    }  # fmt: skip
    lora = {"rank": 8, "alpha": 16.0}
    records = run(make_rl(steps=7, lora=lora, **asked), tmp_path / "run")
    # A step is one update of its answers. An input on the border of two codes may fall to either
    # side by its last bit (docs/alignment.md, One arithmetic); other codes would change far more.
    most = 1e-2 if stored else 1e-4
    assert all(r.get("change", 0) < most for r in records)
    assert records[-1]["reward"] > 2 * records[0]["reward"] > 0
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[-1]["kl"] > 0.1
    assert (tmp_path / "run" / "adapter" / "README.md").exists()
    # A run that goes on from it stays close to where it began, also where it is resumed.
    lora["start"] = str(tmp_path / "run" / "adapter")
    again = make_rl(steps=2, lora=lora, saving={"every": 1}, **asked)
    with dying_at("practise", 2):
        run(again, tmp_path / "again")
    records = run(again, tmp_path / "again")
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[1]["kl"] > 0.1


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ("raises", "raised KeyError: 'of ours'; for "),
        ("hangs", "did not return within 0.2 seconds; for "),
        ("is_nan", "returned nan, which is not finite; for "),
        ("is_a_list", "returned a list, not a number; for "),
        ("is_an_array", "returned a ndarray of shape (3, 2), not a number; for "),
    ],
)
def test_a_reward_that_fails_names_the_answer_and_nothing_is_lost(
    make_rl, rewards, chats, tmp_path, reward, complaint
):
    recipe = make_rl(steps=3, reward=reward, rl={"timeout": 0.2})
    with pytest.raises(OpenNemoError) as raised:
        run(recipe, tmp_path / "run")
    said = str(raised.value)
    assert (
        f"reward {rewards}:{reward} {complaint}{chats}, line " in said and ', the answer "' in said
    )
    assert "saved after 0 steps" in said and "\n" not in said
    # The function is fixed, and the same command resumes.
    good = rewards.read_text()
    rewards.write_text(
        good.replace(f"def {reward}(attempt):", f"def {reward}(attempt):\n    return 0.5")
    )
    try:
        assert len(run(recipe, tmp_path / "run")) == 3
    finally:
        rewards.write_text(good)


def test_where_all_answers_are_worth_the_same_nothing_is_learned(make_rl, base, tmp_path):
    model = {"path": str(base), "shape": None, "tokenizer": None}
    rl = {"rewards": [{"name": "format", "pattern": "cannot be"}]}
    records = run(make_rl(steps=2, model=model, rl=rl), tmp_path / "run")
    for key in ("spread", "loss", "grad_norm", "skipped"):
        assert [r[key] for r in records] == [0, 0]
    assert_equal(base, tmp_path / "run" / "model")


def assert_equal(one: Path, other: Path) -> None:
    """Of the weights of two folders."""
    pairs = zip(load(one).named_parameters(), load(other).parameters(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl": {"rewards": []}}, "rl.rewards: name at least one"),
        (
            {"rl": {"rewards": [{"name": "exact"}]}},
            "there is no reward 'exact'; allowed are exact_call",
        ),
        (
            {"rl": {"rewards": [{"name": "nowhere.at_all:f"}]}},
            "nowhere.at_all:f: ModuleNotFoundError",
        ),
        ({"reward": "missing"}, "AttributeError"),
        ({"reward": "no_function"}, "is a int, not a function"),
        ({"rl": {"rewards": [{"name": "number", "pattern": "x"}]}}, "number takes no pattern"),
        ({"rl": {"rewards": [{"name": "format", "pattern": "("}]}}, r"pattern '\('"),
        (
            {"rl": {"rewards": [{"name": "instructions"}]}},
            "44 bad lines: .*, line 1: there is no instr",
        ),
        ({"rl": {"updates": 3}}, "rl.updates: must divide data.rows, 4"),
        ({"drawing": {"answers": 1, "max_tokens": 6}}, "rl compares answers"),
        ({"drawing": {"answers": 8, "max_tokens": 64}}, "data.window has no room"),
        ({"data": {"window": 10}}, "bad lines: .* tokens, more than the 4 allowed"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_name(make_rl, tmp_path, changes, message):
    with pytest.raises(OpenNemoError, match=message):
        run(make_rl(**changes), tmp_path / "run")


def test_a_run_without_anyone_to_draw_answers_is_refused(make_rl, tmp_path):
    with pytest.raises(OpenNemoError, match="objective rl: nothing draws answers"):
        train(make_rl(), tmp_path / "run", quiet=True)


def test_the_loss_is_the_papers():
    """Of two groups, packed with their prompts once, against the formula over whole logits."""
    net, rng = Transformer(PRESETS["tiny"]), np.random.default_rng(0)
    settings = Reinforcement(clip_low=0.1, clip_high=0.4)
    units, drawn, gains, expected, n = [], [], [], [], 0
    for n_prompt in (9, 4):
        prompt = rng.integers(0, 320, n_prompt)
        units.append([])
        for gain in (0.5, -0.25, -0.25):
            ids = np.concatenate((prompt, rng.integers(0, 320, rng.integers(1, 6))))
            units[-1].append(Example(ids.astype(np.uint32), np.arange(len(ids)) >= n_prompt))
            tokens = torch.from_numpy(ids)
            logits = net.output(net(tokens, Packed.of(len(ids)))).log_softmax(-1)
            own = logits[:-1].gather(1, tokens[1:, None])[n_prompt - 1 :, 0]
            old = own.detach() + torch.from_numpy(rng.normal(0, 0.3, len(own))).float()
            ratio = (own - old).exp()
            expected.append(-torch.minimum(ratio * gain, ratio.clamp(0.9, 1.4) * gain).sum())
            drawn += old.tolist()
            gains += [gain] * len(own)
            n += len(own)
    batch = replace(
        collate([pack(units)], None), drawn=torch.tensor(drawn), gains=torch.tensor(gains)
    )
    assert batch.n_units == n and len(batch.parents) == 8
    loss, metrics = reinforce(net, batch, settings)
    found = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(loss, torch.stack(expected).sum(), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(torch.stack(expected).sum(), list(net.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert 0 < int(metrics["clipped"]) < n


def test_a_student_comes_to_answer_as_its_teacher(make_rl, base, tokenizer_folder, tmp_path):
    """On its own answers; the teacher is a model with habits, and a folder."""
    teacher = sure(2)
    save(teacher, tmp_path / "teacher")
    copy_companions(tokenizer_folder, tmp_path / "teacher", layout="hf")
    recipe = make_rl(
        "distil", steps=20, distil={"on_policy": True, "teacher": str(tmp_path / "teacher")},
        model={"path": str(base), "shape": None, "tokenizer": None},
    )  # fmt: skip
    records = run(recipe, tmp_path / "run")
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    other = tmp_path / "other"
    Tekken("(?s:.)", [*SINGLE_BYTES, b"ab"], n_special=64).save(tmp_path / "tekken.json")
    save(teacher, other)
    copy_companions(tmp_path, other, layout="hf")
    recipe = make_rl("distil", distil={"on_policy": True, "teacher": str(other)})
    with pytest.raises(OpenNemoError, match="another vocabulary than the model"):
        run(recipe, tmp_path / "another")


def attempt(text="", calls=(), reference=None, tools=(), whole=True, broken=False, **row):
    made = [{"id": "x", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    reply = {"role": "assistant", "content": text or None, **({"tool_calls": made} if made else {})}
    task = Task([1], [], list(tools), reference, row, "file, line 1")
    return Attempt(task=task, reply=reply, text=text, whole=whole, broken=broken)


ARGUMENTS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": ARGUMENTS}}
CALL = {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
IFEVAL = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "less than"}],
}


@pytest.mark.parametrize(
    ("name", "made", "worth"),
    [
        ("exact_call", attempt(calls=[("weather", {"city": "Rome"})], reference=CALL), 1),
        ("exact_call", attempt(calls=[("weather", {"city": "Oslo"})], reference=CALL), 0),
        ("exact_call", attempt("Rome", reference=CALL), 0),
        ("schema", attempt(calls=[("weather", {"city": "Oslo"})], tools=[WEATHER]), 1),
        ("schema", attempt(calls=[("weather", {"city": 3})], tools=[WEATHER]), 0),
        ("schema", attempt(calls=[("weather", {"city": "a", "b": 1})], tools=[WEATHER]), 0),
        ("schema", attempt(calls=[("other", {})], tools=[WEATHER]), 0),
        ("schema", attempt("words", tools=[WEATHER]), 1),
        ("schema", attempt("", tools=[WEATHER]), 0),
        ("schema", attempt("<tool_call>{", tools=[WEATHER], broken=True), 0),
        ("schema", attempt('{"a": 1}', schema={"required": ["a"]}), 1),
        ("schema", attempt('{"b": 1}', schema='{"required": ["a"]}'), 0),
        ("schema", attempt("a: 1", schema={}), 0),
        ("number", attempt("So 1,234.0 it is.", reference={"content": "2 + 2 #### 1234"}), 1),
        ("number", attempt("12", reference={"content": "#### 1234"}), 0),
        ("number", attempt("none", reference={"content": "-3"}), 0),
        ("instructions", attempt("two words", **IFEVAL), 1),
        ("instructions", attempt("two, and more words", **IFEVAL), 0),
        ("instructions", attempt("now three words", **IFEVAL), 0.5),
        ("format", attempt("words"), 1),
        ("format", attempt("words", whole=False), 0),
        ("format", attempt(" "), 0),
        ("format", attempt("", calls=[("f", {})]), 1),
    ],
)
def test_what_an_answer_is_worth(name, made, worth):
    assert Judge([Reward(name=name)], 10)([made]).tolist() == [[worth]]


def test_a_pattern_holds_for_the_whole_answer():
    judge = Judge([Reward(name="format", pattern="<a>.*</a>")], 10)
    texts = ("<a>one\ntwo</a>", "so <a>one</a>", "<a>")
    assert judge([attempt(text) for text in texts]).ravel().tolist() == [1, 0, 0]


FOLLOWED = {
    "keywords:existence": ({"keywords": ["sun"]}, "The Sun.", "Sunny."),
    "keywords:forbidden_words": ({"forbidden_words": ["sun"]}, "Sunny.", "The sun."),
    "keywords:frequency": ({"keyword": "a", "frequency": 2, "relation": "at least"}, "a a", "a b"),
    "keywords:letter_frequency": (
        {"letter": "b", "let_frequency": 2, "let_relation": "less than"}, "b", "Bb",
    ),
    "length_constraints:number_words": ({"num_words": 2, "relation": "at least"}, "a b", "a"),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"}, "One. ", "One. Two.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "[name]", "name"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "x P.S. y", "x"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "*a*", "a"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, "Part 1 a Part 2 b", "Part 1",
    ),
    "detectable_format:title": ({}, "<<joy>> x", "<< >> x"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a}"),
    "combination:two_responses": ({}, "a ****** b", "a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it"}, "Say it. No.", "No."),
    "startend:end_checker": ({"end_phrase": "Done."}, "It is. Done.", "Done. It is."),
    "startend:quotation": ({}, '"so"', 'so"'),
    "change_case:english_capital": ({}, "A B", "A b"),
    "change_case:english_lowercase": ({}, "a b", "A b"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 1, "capital_relation": "at least"}, "a BIG", "a big",
    ),
    "punctuation:no_comma": ({}, "a b", "a, b"),
}  # fmt: skip


def test_every_instruction_is_checked():
    assert FOLLOWED.keys() == CHECKS.keys()
    for id, (values, good, bad) in FOLLOWED.items():
        rows = {"instruction_id_list": [id], "kwargs": [values]}
        judge = Judge([Reward(name="instructions")], 10)
        assert judge([attempt(good, **rows), attempt(bad, **rows)]).ravel().tolist() == [1, 0], id
    assert "cannot be checked" in (judge.check(attempt(instruction_id_list=["x:y"]).task) or "")
    for values in ([{}, {}], [1], 1):
        row = {"instruction_id_list": [id], "kwargs": values}
        assert "one of objects" in (judge.check(attempt(**row).task) or ""), values


def test_kills_cost_nothing(make_rl, rewards, tmp_path):
    """`opennemo train`, killed with -9 between two checkpoints."""
    recipe = make_rl(steps=12, saving={"every": 3})
    run(recipe, tmp_path / "whole")
    file = tmp_path / "recipe.json"
    file.write_text(to_json(recipe))
    toml = tmp_path / "recipe.toml"
    toml.write_text(as_toml(json.loads(file.read_text())))
    process = start(tmp_path / "run", toml)
    wait_for_step(tmp_path / "run", 5)
    process.kill()
    process.communicate(timeout=60)
    process = start(tmp_path / "run", toml)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert without_times(read_metrics(tmp_path / "run")) == without_times(
        read_metrics(tmp_path / "whole")
    )
    assert_equal(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def as_toml(tree: dict) -> str:
    """Tables in one line each; what is null is left out."""

    def value(node) -> str:
        if isinstance(node, dict):
            return (
                "{" + ", ".join(f"{k} = {value(v)}" for k, v in node.items() if v is not None) + "}"
            )
        return (
            "[" + ", ".join(map(value, node)) + "]" if isinstance(node, list) else json.dumps(node)
        )

    return "".join(f"{key} = {value(node)}\n" for key, node in tree.items() if node is not None)


def test_ranks_divide_the_prompts(make_rl, tmp_path):
    """Two ranks draw and learn what one does, except for the order of additions."""
    recipe = make_rl(steps=3, rl={"updates": 1}, saving={"every": 0})
    alone = run(recipe, tmp_path / "one")
    run_ranks(2, run, recipe, tmp_path / "two")
    together = read_metrics(tmp_path / "two")
    for key in ("reward", "answer_tokens", "loss", "grad_norm", "spread"):
        np.testing.assert_allclose(
            [r[key] for r in together], [r[key] for r in alone], rtol=1e-4, atol=1e-6
        )
