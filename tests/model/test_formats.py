"""The arithmetic of number formats; and a toy format added to the table works everywhere."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from opennemo.cli import app
from opennemo.errors import CheckpointError
from opennemo.llm import LLM
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load, open_checkpoint
from opennemo.model.export import quantize
from opennemo.model.formats import FORMATS, Format, Rounding, names, plain
from opennemo.model.memory import Needs, forms, kv_bytes
from opennemo.model.quantization import QuantizedLinear, quantize_
from opennemo.model.transformer import Transformer
from opennemo.serve.loading import load_model
from opennemo.serve.settings import read_settings
from opennemo.train.config import parse_recipe
from opennemo.train.setup import change_weights_
from tests.serve.conftest import make_tiny_folder, run_server

TOKENS = torch.arange(40) * 7 % 256
# Bytes with a scale for each 16 columns, and keys and values in seven bits: nothing has kernels.
TOY = Format(
    name="toy",
    weights=Rounding(dtype=torch.int8, limit=127, share=16),
    kv=Rounding(dtype=torch.int8, limit=63, share="row"),
    uses=("load", "train", "store", "cache"),
)


@dataclass(frozen=True, kw_only=True)
class Affine(Format):
    """A storage of its own, as GGUF's Q4_1 has: codes without sign, a scale and a minimum a row."""

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        scale = (high - low) / 255
        codes = ((weight - low) / scale).round().to(torch.uint8)
        return {"blocks": codes, "steps": scale, "lows": low}

    def dequantize(self, tensors: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        return (tensors["blocks"] * tensors["steps"] + tensors["lows"]).to(dtype)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Format:
    monkeypatch.setitem(FORMATS, TOY.name, TOY)
    return TOY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_folder(tmp_path / "model")


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    return model.output(model(TOKENS, Packed.of(40)))


def run(*arguments: object) -> str:
    """A command of ours, in this process, since the table is changed here only."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_model_learns_it_and_is_stored_in_it(toy: Format, folder: Path):
    data = {"train": [{"path": "somewhere"}], "window": 64, "rows": 1, "micro_rows": 1}
    recipe = {"steps": 1, "model": {"path": str(folder)}, "data": data, "qat": {"format": "toy"}}
    model = load(folder, dtype=torch.float32)
    change_weights_(model, parse_recipe(recipe, "a test"))
    trained = logits(model)
    assert not torch.equal(trained, logits(load(folder, dtype=torch.float32)))
    quantize_(model, toy)
    assert torch.equal(logits(model), trained)


def test_a_folder_is_written_and_read_in_it(toy: Format, folder: Path, tmp_path: Path):
    run("quantize", folder, tmp_path / "small", "--format", "toy")
    small = open_checkpoint(tmp_path / "small")
    assert small.format == "toy"
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 16 and group["input_activations"] is None
    in_memory = load(folder)
    quantize_(in_memory, toy)
    assert torch.equal(logits(load(small)), logits(in_memory))
    with pytest.raises(CheckpointError, match="fp8-static only, not toy"):
        quantize(folder, tmp_path / "native", format="toy", to="mistral")


def test_it_is_evaluated_beside_others(toy: Format, folder: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("in the winter rivers run under ice")
    options = ("--suite", "ppl", "--texts", tmp_path / "a.txt", "--kv-cache-dtype", "toy")
    both = ("--format", "fp32", "--format", "toy")
    assert "toy" in run("eval", folder, *options, *both, "-o", tmp_path / "run")
    assert (tmp_path / "run" / "toy").is_dir()
    pair = ([1, 2, 3], [4, 5])
    with LLM.load(str(folder)) as exact, LLM.load(str(folder), format="toy") as rounded:
        (a,), (b,) = exact.score([pair]), rounded.score([pair])
    assert a != b and a.logprob == pytest.approx(b.logprob, abs=0.1)


def test_it_is_served(toy: Format, folder: Path):
    settings = read_settings([str(folder), "--quantization", "toy", "--kv-cache-dtype", "toy"])
    with load_model(settings) as llm, run_server(llm) as server, server.client() as client:
        assert llm.engine.runner.pages.format == "toy"  # pyright: ignore[reportAttributeAccessIssue]
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        answer = client.post("/v1/chat/completions", json=body | {"model": llm.name})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0


def test_its_memory_is_counted(toy: Format, folder: Path):
    checkpoint = open_checkpoint(folder)
    needs = Needs.of(checkpoint, forms(checkpoint, "cuda")["toy"], "cuda")
    model = load(folder)
    quantize_(model, toy)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    in_codes = sum(t.nbytes for layer in layers for t in layer.tensors.values())
    n_rest = sum(map(math.prod, checkpoint.shapes.values()))
    n_rest -= sum(m.out_features * m.in_features for m in layers)
    assert needs.weights == in_codes + 2 * n_rest
    assert kv_bytes(checkpoint.config, "toy") == kv_bytes(checkpoint.config, "int8")


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_what_is_stored(name: str):
    format = FORMATS[name]
    tensors = format.quantize(torch.randn(6, 64))
    per_matrix = 4 if not format.weights.scales_in_row(64) else 0  # not counted with the rows
    assert sum(t.nbytes for t in tensors.values()) == format.nbytes(6, 64) + per_matrix


def test_a_format_may_store_in_a_way_of_its_own(folder: Path):
    affine = Affine(name="affine", weights=Rounding(dtype=torch.uint8, limit=255))
    model = load(folder, dtype=torch.float32)
    exact = logits(model)
    quantize_(model, affine)
    assert set(model.get_submodule("layers.0.attention.wq").state_dict()) == {
        "blocks", "steps", "lows",
    }  # fmt: skip
    assert 0 < (logits(model) - exact).norm() < 0.05 * exact.norm()


def test_names_follow_the_table(toy: Format):
    assert all("toy" in names(use) for use in toy.uses)
    assert "fp16" not in {*names("load"), *names("cache")}
    assert plain(torch.bfloat16) is FORMATS["bf16"] and plain(torch.int8) is None


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_pass_straight_through(name: str):
    format = FORMATS[name]
    x, w = torch.randn(8, 64), torch.randn(6, 64)
    x_scale = format.inputs.scale(x) if format.inputs and format.static else None
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = format.fake_linear(leaves[0], leaves[1], None, x_scale)
    # Tiny gradients are where codes that carry them lose nearly everything.
    grad = torch.randn_like(out) * 1e-4
    out.backward(grad)
    rounded_x = x if format.inputs is None else format.inputs.fake_quantize(x, x_scale)
    rounded_w = format.weights.fake_quantize(w)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    torch.testing.assert_close(leaves[0].grad, grad @ rounded_w)
    torch.testing.assert_close(leaves[1].grad, grad.T @ rounded_x)


def test_numbers_beyond_a_static_scale_are_clipped_and_do_not_learn():
    rounding = FORMATS["fp8-static"].inputs
    assert rounding is not None
    scale = rounding.scale(torch.tensor([[1.0]]))
    x = torch.tensor([[0.5, 100.0, -100.0]], requires_grad=True)
    rounded = rounding.fake_quantize(x, scale)
    rounded.sum().backward()
    limit = float(scale) * 448
    assert rounded.tolist() == [[0.5, limit, -limit]]
    assert x.grad is not None and x.grad.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("name", "largest"), [("fp32", 0), ("bf16", 2**-8), ("fp8", 2**-4), ("int8", 1 / 254)]
)
def test_rounding_errs_no_more_than_its_step(name: str, largest: float):
    rounding = FORMATS[name].weights
    x = torch.randn(16, 100) * torch.logspace(-6, 6, 16)[:, None]
    error = (rounding.fake_quantize(x) - x).abs()
    # Floats err in proportion to the number, integers to the largest one of the row.
    reference = x.abs().amax(-1, keepdim=True) if name == "int8" else x.abs() + x.abs().amax() * 0
    slack = x.abs().amax(-1, keepdim=True) * 2**-17  # below the smallest normal number
    assert (error <= reference * largest * 1.0001 + slack).all()


def test_int4_keeps_what_a_q4_0_block_holds():
    codes = torch.randint(-8, 8, (5, 96))
    codes[:, ::32] = -8
    x = codes * torch.rand(5, 3).add(0.5).repeat_interleave(32, -1)
    packed, scale = FORMATS["int4"].weights.quantize(x)
    assert packed.shape == (5, 48) and packed.dtype == torch.uint8 and scale.shape == (5, 3)
    torch.testing.assert_close(FORMATS["int4"].weights.fake_quantize(x), x)


def test_zeros_stay_zeros():
    for format in FORMATS.values():
        assert torch.equal(format.weights.fake_quantize(torch.zeros(3, 40)), torch.zeros(3, 40))


@pytest.mark.parametrize("name", ["fp8", "fp8-static"])
def test_fp8_scales_are_powers_of_two_and_use_the_range(name: str):
    rounding = FORMATS[name].weights
    w = torch.randn(50, 64)
    codes, scale = rounding.quantize(w)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    largest = codes.float().abs().amax(-1)
    assert (largest.max() if name == "fp8-static" else largest.min()) >= 224
