"""Many adapters in one batch: each row answers as a model with that adapter merged would."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.kernels.cpu import CompilerMissing, available_instructions, load_library
from opennemo.model.attention import Packed
from opennemo.model.formats import FORMATS, by_name
from opennemo.model.lora import Adapter, adapted, load_adapter
from opennemo.model.quantization import quantize_
from opennemo.model.transformer import PRESETS, Transformer

PREFIX = "base_model.model.model.layers"


def write_adapter(folder, seed: int, *, rank: int = 4, modules=("q_proj", "k_proj"), **config):
    """A PEFT folder with random weights for the tiny model."""
    torch.manual_seed(seed)
    widths = {"q_proj": (64, 48), "k_proj": (32, 48), "down_proj": (48, 96)}
    tensors = {}
    for layer in range(2):
        for module in modules:
            out, width = widths[module]
            part = "mlp" if module == "down_proj" else "self_attn"
            name = f"{PREFIX}.{layer}.{part}.{module}.lora"
            tensors[f"{name}_A.weight"] = torch.randn(rank, width)
            tensors[f"{name}_B.weight"] = torch.randn(out, rank)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(model: Transformer, adapter: Adapter) -> Transformer:
    copy = Transformer(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    for path, (a, b) in adapter.weights.items():
        copy.get_parameter(f"{path}.weight").add_(b @ a)
    return copy


def run(engine: LocalEngine, requests: list) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in requests]
    for i, (prompt, adapter) in enumerate(requests):
        listen = lambda event, i=i: answers[i].append(event.id)  # noqa: E731
        engine.submit(prompt, SamplingParams(max_tokens=10), listen, adapter=adapter)
    while engine.step():
        pass
    return answers


def test_rows_follow_their_own_adapters(model, tmp_path):
    folders = {
        "first": write_adapter(tmp_path / "a", 1),
        "second": write_adapter(tmp_path / "b", 2, rank=2, modules=("down_proj",), use_rslora=True),
    }
    first, second = (merged(model, load_adapter(folder, model)) for folder in folders.values())
    prompt = list(range(40))  # the same for all: the prefix cache must keep them apart
    engine = LocalEngine(deepcopy(model), [], EngineConfig(adapters=True))
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    asked = [(prompt, None), (prompt, "first"), (prompt, "second"), ([9], "first")]
    together = run(engine, asked * 2)
    want = [
        run(LocalEngine(deepcopy(m), [], EngineConfig(adapters=True)), [(p, None)])[0]
        for m, p in (
            (model, prompt),
            (first, prompt),
            (second, prompt),
            (first, [9]),
        )
    ]
    assert together == want * 2
    assert len({tuple(answer) for answer in want}) == 4
    assert run(engine, [(prompt, "second"), (prompt, None)]) == [want[2], want[0]]
    assert engine.unload_adapter("second") and not engine.unload_adapter("second")
    with pytest.raises(InvalidRequest, match=r"no adapter 'second', only \['first'\]"):
        run(engine, [(prompt, "second")])


def test_adapters_that_do_not_fit_are_refused(model, tmp_path):
    cases = {
        "shapes": (write_adapter(tmp_path / "shapes", 1), "layers.0.attention.wq: A and B are"),
        "dora": (write_adapter(tmp_path / "dora", 1, use_dora=True), "use_dora"),
        "rank": (write_adapter(tmp_path / "rank", 1, r=0), "r is 0"),
    }
    save_file(
        {f"{PREFIX}.0.self_attn.q_proj.lora_{h}.weight": torch.zeros(3, 3) for h in "AB"},
        tmp_path / "shapes" / "adapter_model.safetensors",
    )
    for folder, message in cases.values():
        with pytest.raises(CheckpointError, match=message):
            load_adapter(folder, model)
    with pytest.raises(CheckpointError, match="adapter_config"):
        load_adapter(tmp_path / "nowhere", model)
    broken = write_adapter(tmp_path / "broken", 1)
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="adapter_model"):
        load_adapter(broken, model)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "int8", "int4", "q8_0"])
def test_weights_are_in_memory_once(name):
    """The kernel's matrices serve PyTorch's way, too, with the definition's answers."""
    try:
        load_library(available_instructions()[0])
    except CompilerMissing as error:
        pytest.skip(str(error))
    row, config = by_name(name), replace(PRESETS["tiny"], dim=64, hidden_dim=96)
    torch.manual_seed(0)
    plain = Transformer(config).eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.mul_(3 if parameter.dim() == 2 else 1)
    shapes = {path: module.weight.shape for path, module in plain.named_modules()
              if isinstance(module, torch.nn.Linear) and path != "output"}  # fmt: skip
    if row.in_codes:
        quantize_(plain, row, head=FORMATS["int8"])
    else:
        plain.to(row.weights.dtype)
    adapter = Adapter("x", {
        path: (torch.randn(4, width) / 4, torch.randn(out, 4) / 4)
        for path, (out, width) in shapes.items()
    })  # fmt: skip
    defined = deepcopy(plain).float()
    stored = {path: [*m.parameters(), *m.buffers()] for path, m in plain.named_modules()
              if path in (*shapes, "output")}  # fmt: skip
    engine = LocalEngine(plain, [], EngineConfig(adapters=True, kv_format="fp32"))
    assert not any(t.numel() for tensors in stored.values() for t in tensors)  # the kernel's alone
    tables = (*plain.parameters(), *plain.buffers())
    assert {tuple(t.shape) for t in tables} == {(320, 64), (64,)}
    engine.adapters["x"] = adapter
    requests = [(list(range(40)), "x"), (list(range(40)), None), ([9], "x")]
    answers = run(engine, requests)
    assert answers == [greedy(defined, ids, adapter if name else None) for ids, name in requests]
    assert answers[0] != answers[1]


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], adapter: Adapter | None) -> list[int]:
    """Ten tokens by the definition, without a cache."""
    ids = list(prompt)
    for _ in range(10):
        rows = [(adapter, torch.arange(len(ids)))] if adapter else []
        with adapted(model, rows):
            hidden = model(torch.tensor(ids), Packed.of(len(ids)))
        ids.append(int(model.output(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


def test_a_model_that_others_use_keeps_its_weights(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = LocalEngine(model, [], EngineConfig(keep_model=True))
    run(engine, [([1, 2, 3], None)])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_without_kernels_pytorch_computes_with_the_only_weights(model, monkeypatch):
    def packed(*_: object, **__: object) -> None:
        raise AssertionError("weights were packed")

    monkeypatch.setattr("opennemo.engine.runner.compile_step", packed)
    engine = LocalEngine(model, [], EngineConfig(kernels=False))
    (found,) = run(engine, [([1, 2, 3], None)])
    assert found == greedy(model, [1, 2, 3], None)
