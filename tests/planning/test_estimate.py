"""Memory and time of a run are estimated before it starts, and equal what PyTorch then uses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from opennemo.cli import app
from opennemo.errors import InvalidRequest
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import save, weight_shapes
from opennemo.model.export import to_gguf
from opennemo.model.formats import FORMATS
from opennemo.model.lora import add_lora_
from opennemo.model.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    prepare_qat_,
    quantize_,
)
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer, rotary
from opennemo.planning.estimate import BLOCKS, PLAIN, Work, activations, plan, resolve_shape
from opennemo.planning.machines import CARDS, GIB, Card, Machines, parse_machines
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.config import Recipe, parse_recipe, read_recipe
from opennemo.train.setup import make_model

ROOT = Path(__file__).parents[2]
NEMO = PRESETS["mistral-nemo-12b"]
CPU = Machines("cpu", Card(memory=16 * GIB, flops=1e11, overhead=0.7 * GIB, bytes=4), 1, 1)


def recipe_of(**tables: Any) -> Recipe:
    tree: dict[str, Any] = {"steps": 100, "model": {"path": "somewhere"}}
    data = {"train": [{"path": "somewhere"}], "window": 1024, "rows": 1, "micro_rows": 1}
    return parse_recipe(tree | {"data": data | tables.pop("data", {})} | tables, "test")


def on(card: str, gpus: int = 1, nodes: int = 1) -> Machines:
    return Machines(card, CARDS[card], gpus, nodes)


def sizes(made: Any) -> dict[str, float]:
    return {what: size for what, _, size in made.memory}


def kept_by_a_block(config: ModelConfig, change: Any, n_tokens: int) -> float:
    """Bytes that a block of a model keeps for its backward pass, weights aside."""
    torch.manual_seed(0)
    model = Transformer(config)
    change(model)
    attend = Packed.of(n_tokens)
    rope = rotary(attend.positions, config)
    known = [*model.parameters(), *model.buffers(), rope, attend.cu_seqlens]
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in ours and n_tokens in tensor.shape:  # not a rounded weight
            kept[place] = tensor
        return tensor

    x = torch.randn(n_tokens, config.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.layers[0](x, rope, attend)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def adapted(model: Transformer) -> None:
    add_lora_(model, rank=16, alpha=32, generator=torch.Generator().manual_seed(0))


def adapted_codes(model: Transformer) -> None:
    quantize_(model, FORMATS["fp8"])
    adapted(model)


@pytest.mark.parametrize(
    ("change", "tables"),
    [
        (lambda model: None, {}),
        (adapted, {"lora": {}}),
        (adapted_codes, {"lora": {}}),
        (lambda model: prepare_qat_(model, FORMATS["fp8"]), {"qat": {"format": "fp8"}}),
    ],
)
def test_activations_are_those_that_pytorch_keeps(change: Any, tables: dict):
    config = ModelConfig(
        dim=80, n_layers=1, n_heads=8, n_kv_heads=2, head_dim=16, hidden_dim=256, vocab_size=320
    )
    n_tokens = 37  # like no width of a weight
    planned = sum(activations(Work(recipe_of(**tables), config, CPU)).values())
    assert planned * 4 * n_tokens == kept_by_a_block(config, change, n_tokens)


def test_weights_and_adapters_are_counted_as_models_have_them():
    for config in (NEMO, PRESETS["nano-60m"]):
        work = Work(recipe_of(lora={"rank": 16, "layers": ["wq", "w2"]}), config, CPU)
        shapes = weight_shapes(config).values()
        assert work.n_weights == sum(torch.Size(shape).numel() for shape in shapes)
    assert Work(recipe_of(), NEMO, CPU).n_weights == 12_247_782_400
    tiny = PRESETS["tiny"]
    model = Transformer(tiny)
    add_lora_(model, rank=4, alpha=8, generator=torch.Generator())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Work(recipe_of(lora={"rank": 4}), tiny, CPU).n_adapters == learning


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("float32", 4), ("bfloat16", 2)])
def test_frozen_weights_are_counted_in_the_type_that_the_recipe_names(dtype: str, size: int):
    recipe, config = recipe_of(lora={"rank": 4, "dtype": dtype}), PRESETS["tiny"]
    assert (
        sizes(plan(recipe, config, CPU))["frozen weights"]
        == size * Work(recipe, config, CPU).n_weights
    )


def test_nemo_is_adapted_in_24_gb_over_codes_and_not_over_bf16():
    recipe = recipe_of(
        objective="chat", data={"window": 4096, "rows": 16}, lora={"rank": 64},
        parallel={"activation_checkpointing": True},
    )  # fmt: skip
    for stored, fits in (("int4", True), ("fp8", True), ("bf16", False)):
        made = plan(recipe, NEMO, on("4090"), stored=stored)
        assert (not made.problems) == fits, made.problems
    (problem,) = made.problems
    assert re.search(r"needs 3\d\.\d GiB and has 24.0; over weights stored as fp8 it is 2", problem)


def test_states_are_divided_and_what_does_not_fit_is_told_with_a_way_out():
    recipe = recipe_of(data={"window": 8192, "rows": 64, "micro_rows": 8})
    one, eight = (plan(recipe, NEMO, on("h100", gpus)) for gpus in (1, 8))
    assert sizes(one)["optimizer"] == 8 * NEMO_WEIGHTS
    assert sizes(eight)["optimizer"] == NEMO_WEIGHTS
    assert "take more or larger cards, or adapt: [lora]" in one.problems[0]
    (problem,) = eight.problems
    assert "and has 79.6; with parallel.activation_checkpointing = true it is 7" in problem
    (problem,) = plan(recipe, NEMO, on("l40s", 8)).problems
    assert "with parallel.activation_checkpointing = true, data.micro_rows = 1 it is" in problem
    better = recipe_of(
        data={"window": 8192, "rows": 64}, parallel={"activation_checkpointing": True}
    )
    assert not plan(better, NEMO, on("h100", 8)).problems
    # Copies cost what division saved.
    copied = replace(better, parallel=replace(better.parallel, data_parallel_replicate=2))
    assert sizes(plan(copied, NEMO, on("h100", 8)))["weights"] == NEMO_WEIGHTS
    for changes, message in (
        ({"tensor_parallel": 3}, "replicate 1 x shard 2 x context 1 x tensor 3 is 6 ranks"),
        ({"tensor_parallel": 16}, "is 0 ranks"),
        ({"data_parallel_shard": 2}, "is 2 ranks, and there are 8"),
    ):
        made = plan(recipe_of(data={"rows": 64}, parallel=changes), NEMO, on("h100", 8))
        assert any(message in problem for problem in made.problems), made.problems
    (problem,) = plan(
        recipe_of(data={"rows": 12, "window": 64}), PRESETS["tiny"], on("h100", 8)
    ).problems
    assert problem.endswith("does not divide by the 8 ranks that see different rows; 16 would")


NEMO_WEIGHTS = 12_247_782_400


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_over_a_gguf_file_is_planned_as_it_is_loaded(tied: bool, tmp_path: Path):
    """The file's own types are counted, and what learning needs as numbers beside them."""
    config = ModelConfig(
        dim=256, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=128, hidden_dim=512,
        vocab_size=320, tied_embeddings=tied,
    )  # fmt: skip
    save(Transformer(config), tmp_path / "model")
    Tekken(PATTERNS["tekken"], SINGLE_BYTES, n_special=64).save(tmp_path / "model" / "tekken.json")
    file = tmp_path / "model.gguf"
    to_gguf(tmp_path / "model", file, format="q4_k_m")
    recipe = recipe_of(model={"path": str(file)}, lora={"rank": 4})
    base = resolve_shape(recipe, None, None)
    made = plan(recipe, base.config, CPU, stored=base.stored, in_blocks=base.in_blocks)
    model = make_model(recipe, file)
    codes = {id(m): m.tensors["weight"] for m in model.modules()
             if isinstance(m, QuantizedLinear | QuantizedEmbedding)}  # fmt: skip
    assert len(codes) == 2 * 7 + (not tied)
    assert sizes(made)["frozen blocks"] == sum(t.nbytes for t in codes.values())
    assert sizes(made)["frozen tables"] == sum(t.nbytes for t in model.parameters())
    assert sizes(made)["one matrix unpacked"] == 4 * 256 * 512
    assert not made.problems
    # Rounding learns from plain weights: nothing stays in blocks.
    rounding = recipe_of(model={"path": str(file)}, lora={"rank": 4}, qat={"format": "q4_k"})
    assert resolve_shape(rounding, None, None).stored == PLAIN


def test_nemo_s_file_in_four_bits_is_adapted_on_a_laptop():
    recipe = recipe_of(lora={"rank": 16}, parallel={"activation_checkpointing": True})
    laptop = replace(CPU, card=replace(CPU.card, memory=14 * GIB))
    # As in Q4_K_M: the layers' matrices and the embedding.
    in_blocks = 6_930_000_000, NEMO_WEIGHTS - 131_072 * 5120 - 81 * 5120
    made = plan(recipe, NEMO, laptop, stored=BLOCKS, in_blocks=in_blocks)
    assert not made.problems, made.problems
    assert sizes(made)["frozen tables"] == 4 * (131_072 * 5120 + 81 * 5120)


def test_answers_to_prompts_are_counted_where_a_step_leaves_no_room_for_them():
    tables = {"evaluation": {"prompts": "some.jsonl"}, "data": {"window": 128}}
    small = {"parallel": {"activation_checkpointing": True}} | tables
    least = sizes(plan(recipe_of(**small), NEMO, CPU))
    of_a_step = least["inputs of blocks"] + least["the head's way back"]
    expected = 8 * 2048 * 2 * 40 * 1024 * 4 - of_a_step
    assert least["keys, values of samples"] == pytest.approx(expected, rel=0.01)
    large = tables | {"data": {"window": 4096}}
    assert "keys, values of samples" not in sizes(plan(recipe_of(**large), NEMO, CPU))


def test_speed_follows_from_operations():
    recipe = recipe_of(data={"window": 2048, "rows": 8})
    made = plan(recipe, NEMO, on("h100"), share_of_peak=0.5)
    matrices = NEMO_WEIGHTS - 131_072 * 5120 - 81 * 5120  # a look-up and norms multiply nothing
    attention = 2 * 40 * 4096 * 2048
    step = 8 * 2048 * 3 * (2 * matrices + attention) / (989e12 * 0.5)
    assert made.tokens_per_second == pytest.approx(8 * 2048 / step, rel=1e-9)
    assert made.seconds == pytest.approx(100 * step, rel=1e-9)
    again = replace(recipe, parallel=replace(recipe.parallel, activation_checkpointing=True))
    assert plan(again, NEMO, on("h100"), share_of_peak=0.5).seconds > 1.3 * made.seconds
    # Llama 3.1 8B on 8 H100s, not compiled: torchtitan reports 5,762 tokens a second and card.
    llama = replace(NEMO, dim=4096, n_layers=32, vocab_size=128_256)
    recipe = recipe_of(data={"window": 8192, "rows": 16, "micro_rows": 2})
    assert plan(recipe, llama, on("h100", 8)).tokens_per_second / 8 == pytest.approx(5762, rel=0.15)


def test_the_command_tells_all_and_fails_when_it_does_not_fit(tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'steps = 10\nmodel = {shape = "mistral-nemo-12b", tokenizer = "x"}\n'
        'data = {train = [{path = "x"}], window = 8192, rows = 3072, micro_rows = 1}\n'
        "parallel = {tensor_parallel = 2, activation_checkpointing = true}\n"
    )
    arguments = ["plan", str(recipe), "--gpus", "8xH100", "--nodes", "384"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "12,247,782,400 x 4 B (float32) / 3,072 ranks" in result.output
    assert re.search(r"a rank needs +\d+\.\d\d GiB  of 79.6; 3,072 x H100", result.output)
    assert re.search(r"the run +10 steps, 251,658,240 tokens: \d", result.output)
    result = CliRunner().invoke(app, [*arguments, "--set", "data.rows=1000"])
    assert result.exit_code == 1
    assert result.output.rstrip().endswith("1,536 would")


def test_what_is_not_known_is_refused_in_one_line(tmp_path: Path):
    for call, message in (
        (lambda: parse_machines("8xTPU", 1), "known: H100, H200"),
        (lambda: parse_machines("0xH100", 1), "--gpus is 0xH100"),
        (lambda: resolve_shape(recipe_of(), None, None), "somewhere is not there: name its shape"),
        (lambda: resolve_shape(recipe_of(), "nemo", None), "--shape is nemo, allowed are mistral"),
        (lambda: resolve_shape(recipe_of(), "tiny", "int3"), "--stored is int3"),
        (lambda: resolve_shape(recipe_of(), "tiny", "int4"), "cannot learn: add a [lora] table"),
    ):
        with pytest.raises(InvalidRequest) as error:
            call()
        assert message in str(error.value)
    assert parse_machines("1xcpu", 1).card.flops > 1e9


MEASURE = """
import json, sys, torch
from opennemo.model.checkpoint import empty_model
from opennemo.model.lora import add_lora_
from opennemo.model.parallel import shard_
from opennemo.model.transformer import ModelConfig
from opennemo.train.config import Optim
from opennemo.train.objectives import next_token
from opennemo.train.optim import optimizers
from opennemo.train.packing import Batch

n_tokens, checkpointing = json.loads(sys.argv[1])
model = empty_model(ModelConfig(n_layers=2)).to_empty(device="cpu")
for weight in model.parameters():
    weight.data.fill_(1.0 if weight.dim() == 1 else 0.001)
add_lora_(model, rank=16, alpha=32, generator=torch.Generator().manual_seed(0))
shard_(model, None, activation_checkpointing=checkpointing)
(optimizer,) = optimizers(model, Optim())
tokens = torch.randint(0, 131072, (n_tokens,))
batch = Batch(
    tokens=tokens, targets=tokens.roll(-1), cu_seqlens=torch.tensor([0, n_tokens]).int(),
    max_seqlen=n_tokens, window=None, n_units=n_tokens,
)
for _ in range(2):
    loss, _ = next_token(model, batch)
    (loss / n_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells of memory on Linux")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_two_layers_as_wide_as_nemo_takes_the_memory_that_is_planned(checkpointing: bool):
    """Some minutes, and 9 GB."""
    free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text("utf-8"))
    if free is None or int(free[1]) < 11e6:
        pytest.skip("11 GB of memory are not free")
    parallel = {"activation_checkpointing": checkpointing}
    recipe = recipe_of(lora={"rank": 16}, parallel=parallel)
    planned = plan(recipe, replace(NEMO, n_layers=2), CPU).total
    arguments = [sys.executable, "-c", MEASURE, json.dumps([1024, checkpointing])]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(planned, rel=0.1)


def test_a_recipe_that_draws_answers_counts_groups_and_their_cache():
    recipe = read_recipe(ROOT / "recipes" / "nemo-12b-rl.toml")
    made = plan(recipe, NEMO, on("h100"), stored="int8")
    assert not made.problems and plan(recipe, NEMO, on("4090"), stored="int8").problems
    # 64 answers side by side, 40 layers of 8 heads of 128, keys and values in bf16.
    assert sizes(made)["their keys and values"] == 64 * 2048 * 2 * 40 * 8 * 128 * 2
    assert "weights to draw with" not in sizes(made)  # the codes that it learns over
    assert any("32 rows x 5,632" in how for _, how in made.speed)  # 2,048 and 7 x 512 more
    small = read_recipe(ROOT / "recipes" / "smollm2-tools-rl.toml")
    shape = replace(NEMO, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64)
    shape = replace(shape, hidden_dim=1536, vocab_size=49152, tied_embeddings=True)
    assert "weights to draw with" in sizes(plan(small, shape, CPU))
