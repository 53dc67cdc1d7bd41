"""One loop for every objective: it learns, it resumes to the bit, and it says what is wrong."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.llm import answer_all
from opennemo.model import blocks
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import Form, load
from opennemo.model.hub import locate
from opennemo.model.lora import LowRank, load_adapter
from opennemo.model.quantization import QuantizedLinear
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.config import read_recipe
from opennemo.train.metrics import read_metrics
from opennemo.train.run import train
from opennemo.train.setup import Setup, make_model
from opennemo.train.trainer import Trainer
from tests.cli.conftest import needs_smollm2

CPU = torch.device("cpu")


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return dict(load(run / name).named_parameters())


@pytest.mark.parametrize("objective", ["text", "chat"])
def test_a_run_learns_and_leaves_a_model_that_loads(make_recipe, tmp_path, objective):
    recipe = make_recipe(objective, steps=40, evaluation={"every": 20})
    made = train(recipe, tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(40))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    held_out = [r["valid_loss"] for r in records if "valid_loss" in r]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    model = load(made["model"])
    tokens = torch.arange(10)
    assert model(tokens, Packed.of(10)).isfinite().all()
    card = (made["model"] / "README.md").read_text()
    assert "| steps | 40 of 2 rows of 128 tokens |" in card and f"{records[-1]['loss']:.4f}" in card


CASES = {
    "text": {},
    "chat": {},
    "preference": {},
    "muon": {"optim": {"name": "muon"}},
    "qat": {"qat": {"format": "fp8-static", "kv": True, "start": 0.3, "freeze": 0.7}},
}


@contextmanager
def dying_at(method: str, n: int) -> Iterator[None]:
    """Inside, a method of trainers raises KeyboardInterrupt at its n-th call, which has to come."""
    whole, calls = getattr(Trainer, method), itertools.count(1)

    def dies(self, *args):
        if next(calls) == n:
            raise KeyboardInterrupt
        return whole(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, method, dies)
        yield


def recipe_of(case: str, make_recipe):
    objective = case if case in ("text", "chat", "preference") else "text"
    return make_recipe(objective, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted_bit_for_bit(make_recipe, tmp_path, case):
    recipe = recipe_of(case, make_recipe)
    train(recipe, tmp_path / "whole", quiet=True)
    with dying_at("update", 4):
        train(recipe, tmp_path / "resumed", quiet=True)
    train(recipe, tmp_path / "resumed", quiet=True)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    times = ("tokens_per_second", "mfu", "waited_for_data")
    records = [
        [{k: v for k, v in r.items() if k not in times} for r in read_metrics(tmp_path / run)]
        for run in ("whole", "resumed")
    ]
    assert records[0] == records[1] and len(records[0]) == recipe.steps


def test_what_was_learned_in_fp8_is_what_is_stored(make_recipe, tmp_path):
    """Logits of the training model equal those of the folder, read back, in float32."""
    recipe = recipe_of("qat", make_recipe)
    made = train(recipe, tmp_path / "run", quiet=True)
    setup = Setup.make(recipe, CPU)
    trainer = Trainer(recipe, tmp_path / "run", setup, CPU, quiet=True)
    assert trainer.step == recipe.steps
    tokens = torch.arange(64) * 5 % 320
    trained = setup.model.eval()(tokens, Packed.of(40, 24))
    stored = load(made["fp8-static"])
    assert torch.equal(stored(tokens, Packed.of(40, 24)), trained)
    plain = load(made["model"])
    assert not torch.equal(plain(tokens, Packed.of(40, 24)), trained)


@pytest.mark.parametrize(("format", "held"), [("q4_1", "q4_1"), ("q4_k", "q5_0")])
def test_what_was_learned_in_blocks_is_what_the_gguf_file_holds(
    format, held, make_recipe, tmp_path
):
    """Rows of 64 weights are too short for q4_k's blocks, whose place q5_0 takes."""
    Tekken(PATTERNS["tekken"], SINGLE_BYTES, n_special=64).save(tmp_path / "tekken.json")
    shape = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32}
    model = {"shape": shape | {"hidden_dim": 96, "vocab_size": 320}, "tokenizer": str(tmp_path)}
    recipe = make_recipe("chat", steps=3, model=model, qat={"format": format})
    made = train(recipe, tmp_path / "run", quiet=True)
    setup = Setup.make(recipe, CPU)
    Trainer(recipe, tmp_path / "run", setup, CPU, quiet=True)
    stored = load(made[format], form=Form(blocks=True))
    for path, module in stored.get_submodule("layers").named_modules(prefix="layers"):
        if isinstance(module, QuantizedLinear):
            weight = setup.model.get_parameter(f"{path}.weight").detach()
            assert torch.equal(module.tensors["weight"], blocks.quantize(held, weight))
    tokens, stored.tok_embeddings = torch.arange(64) * 5 % 320, setup.model.tok_embeddings
    trained = setup.model.eval()(tokens, Packed.of(40, 24))
    torch.testing.assert_close(stored(tokens, Packed.of(40, 24)), trained, rtol=1e-4, atol=1e-5)
    model["shape"]["dim"] = 48
    with pytest.raises(InvalidRequest, match=f"{held} needs widths in multiples of 32"):
        Setup.make(make_recipe("chat", model=model, qat={"format": format}), CPU)
    with pytest.raises(InvalidRequest, match=rf"qat.kv: a GGUF file in {format} has no scales"):
        model["shape"]["dim"] = 64
        Setup.make(make_recipe("chat", model=model, qat={"format": format, "kv": True}), CPU)


def test_micro_batches_add_up_to_the_whole(make_recipe, tmp_path):
    losses = []
    for size in (1, 4):
        recipe = make_recipe(steps=3, data={"rows": 4, "micro_rows": size}, optim={"clip": 0.0})
        train(recipe, tmp_path / str(size), quiet=True)
        losses.append([(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / str(size))])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_preferences_are_learned(make_recipe, tmp_path):
    recipe = make_recipe("preference", steps=30, preference={"beta": 0.5, "sft": 0.1})
    train(recipe, tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run")
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert records[0]["loss"] > np.log(2) > records[-1]["loss"]
    assert records[-1]["accuracy"] == 1 and records[-1]["margin"] > 1


def start(folder: Path, recipe_file: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "opennemo.cli",
        "train",
        str(recipe_file),
        "--out",
        str(folder),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int) -> None:
    for _ in range(6000):
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get going")


def test_signals_and_kills_cost_nothing(recipe_file, tmp_path):
    train(read_recipe(recipe_file), tmp_path / "whole", quiet=True)
    for number, step, code, word in (
        (signal.SIGTERM, 7, 143, "is saved; the same command resumes"),
        (signal.SIGINT, 12, 130, "is saved; the same command resumes"),
        (signal.SIGKILL, 17, -9, "goes on after step 1"),
    ):
        process = start(tmp_path / "run", recipe_file)
        wait_for_step(tmp_path / "run", step)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert word in err and "Traceback" not in err
    process = start(tmp_path / "run", recipe_file)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"Wrote the model to {tmp_path / 'run' / 'model'}" in out
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 29


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(steps=5)
    step = Trainer.update

    def poisoned(self, number, batches):
        weight = self.model.layers[0].feed_forward.w2.weight
        kept = weight.detach().clone()
        if number == 2:
            weight.data.fill_(float("nan"))
        values = step(self, number, batches)
        if number == 2:
            weight.data.copy_(kept)
        return values

    monkeypatch.setattr(Trainer, "update", poisoned)
    train(recipe, tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run")
    assert [r["skipped"] for r in records] == [0, 0, 1, 0, 0]
    assert records[2]["loss"] is None and records[3]["loss"] is not None


def test_a_run_keeps_to_its_recipe_and_its_data(make_recipe, tmp_path):
    train(make_recipe(steps=2), tmp_path / "run", quiet=True)
    with pytest.raises(InvalidRequest, match=r"optim\.lr was 0\.003 and is 0\.1"):
        train(make_recipe(steps=2, optim={"lr": 0.1}), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "data.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="data changed"):
        train(make_recipe(steps=2), tmp_path / "run", quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(InvalidRequest, match="holds no run"):
        train(make_recipe(steps=2), tmp_path / "other", quiet=True)


def test_ids_that_never_occur_are_told(make_recipe, tmp_path, capsys):
    recipe = make_recipe(steps=2)
    setup = Setup.make(recipe, CPU)
    (tmp_path / "run").mkdir()
    trainer = Trainer(recipe, tmp_path / "run", setup, CPU)
    trainer.train()
    unseen = trainer.unseen()
    assert unseen and 64 + ord("e") not in unseen
    assert f"{len(unseen):,} of 320 ids never occurred" in capsys.readouterr().err


def test_a_run_that_only_diverges_ends_with_a_reason(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(steps=40)
    setup = Setup.make(recipe, CPU)
    setup.model.get_parameter("norm.weight").data.fill_(float("nan"))
    (tmp_path / "run").mkdir()
    with pytest.raises(OpenNemoError, match="in a row"):
        Trainer(recipe, tmp_path / "run", setup, CPU, quiet=True).train()


def test_samples_are_drawn_at_evaluations_by_who_passes_the_function(make_recipe, tmp_path):
    asked = [([{"role": "user", "content": "Say red 1"}], [])]
    recipe = make_recipe("chat", steps=6, evaluation={"every": 3}, qat={"format": "int8"})
    train(
        recipe, tmp_path / "run", quiet=True,
        sample=lambda model, tokenizer: answer_all(model, tokenizer, asked, max_tokens=4),
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert [line["step"] for line in lines] == [2, 5]
    assert all(line["role"] == "assistant" for line in lines)
    alone = make_recipe("chat", steps=6, evaluation={"every": 3}, qat={"format": "int8"})
    train(alone, tmp_path / "alone", quiet=True)
    expected, found = weights(tmp_path / "alone"), weights(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_widths_that_a_format_cannot_hold_are_refused_before_the_first_step(make_recipe, tmp_path):
    recipe = make_recipe("chat", steps=6, qat={"format": "int4"})
    with pytest.raises(InvalidRequest, match=r"qat\.format: int4 needs widths in multiples of 32"):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_adapter_is_learned_and_read_back(make_recipe, tmp_path):
    base = train(make_recipe("chat", steps=1), tmp_path / "base", quiet=True)["model"]
    recipe = make_recipe(
        "chat", steps=6, model={"path": str(base), "shape": None, "tokenizer": None},
        lora={"rank": 4, "alpha": 8.0},
    )  # fmt: skip
    made = train(recipe, tmp_path / "run", quiet=True)
    model = load(base)
    adapter = load_adapter(made["adapter"], model)
    assert len(adapter.weights) == 7 * model.config.n_layers
    assert any(b.any() for _, b in adapter.weights.values())
    assert "LoRA of rank 4" in (made["adapter"] / "README.md").read_text()


def test_an_adapter_goes_on_from_another_in_16_bits(make_recipe, tmp_path):
    """Its first step finds the loss that the other came to; other ranks and layers are refused."""
    base = train(make_recipe("chat", steps=1), tmp_path / "base", quiet=True)["model"]
    model = {"path": str(base), "shape": None, "tokenizer": None}
    changes = {"steps": 6, "model": model, "optim": {"lr": 5e-2, "warmup": 0.0}}
    lora = {"rank": 4, "alpha": 8.0, "layers": ["wq", "wk", "w2"], "dtype": "bfloat16"}
    first = make_recipe("chat", lora=lora, **changes)
    started = train(first, tmp_path / "first", quiet=True)["adapter"]
    lora |= {"start": str(started), "alpha": 4.0}
    train(make_recipe("chat", lora=lora, **changes), tmp_path / "second", quiet=True)
    before, after = (read_metrics(tmp_path / name) for name in ("first", "second"))
    assert after[0]["loss"] < before[0]["loss"] - 0.1
    assert load(base).norm.weight.dtype == torch.float32
    again = make_recipe("chat", lora=lora, **changes)
    learning = Setup.make(again, torch.device("cpu")).model
    assert learning.output.weight.dtype == torch.bfloat16
    read = load_adapter(started, load(base)).weights
    for path, (a, b) in read.items():
        part = learning.get_submodule(path).get_submodule("low_rank")
        assert isinstance(part, LowRank)
        torch.testing.assert_close(part.a, a, rtol=0, atol=0)
        torch.testing.assert_close(part.scale * part.b, b)
    for change, message in (
        ({"rank": 2}, "lora.start: its rank is 4, and lora.rank 2"),
        ({"layers": ["wq", "wk"]}, "only one of the two adapters adapts layers.0.feed_forward.w2"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            Setup.make(make_recipe("chat", lora=lora | change, **changes), torch.device("cpu"))


@needs_smollm2
def test_an_adapter_is_learned_over_the_blocks_of_a_gguf_file(make_recipe, tmp_path):
    recipe = make_recipe(
        "chat", steps=4, lora={"rank": 4, "alpha": 8.0}, saving={"every": 4},
        model={"path": "smollm2-135m-instruct", "shape": None, "tokenizer": None},
    )  # fmt: skip
    file = locate("smollm2-135m-instruct")
    learning = make_model(recipe, file)
    formats = {m.format.name for m in learning.modules() if isinstance(m, QuantizedLinear)}
    assert formats == {"q4_1"} and isinstance(learning.output, torch.nn.Linear)
    made = train(recipe, tmp_path / "run", quiet=True)
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    adapter = load_adapter(made["adapter"], learning)
    assert any(b.any() for _, b in adapter.weights.values())


def losses(recipe, folder: Path) -> list[float]:
    train(recipe, folder, quiet=True)
    return [r["loss"] for r in read_metrics(folder)]


@pytest.mark.parametrize(
    "how", ["activation_checkpointing", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_recomputed_or_compiled_it_learns_the_same_under_rounding(make_recipe, tmp_path, how):
    changes = {"steps": 4, "qat": {"format": "fp8-static", "kv": True, "start": 0.3}}
    plain = losses(make_recipe(**changes), tmp_path / "plain")
    changed = losses(make_recipe(parallel={how: True}, **changes), tmp_path / how)
    np.testing.assert_allclose(changed, plain, rtol=1e-4 if how == "compile" else 1e-6)
