"""GGUF files of our own: from every layout there and back, mixtures, and no half files."""

import importlib.resources
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opennemo.errors import CheckpointError
from opennemo.model import blocks, layouts
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import Form, convert, load, open_checkpoint, save, weight_shapes
from opennemo.model.companions import read_generation_config
from opennemo.model.export import importance, merge, to_gguf
from opennemo.model.formats import BLOCKS
from opennemo.model.gguf import GGUF
from opennemo.model.gguf_writer import MIXTURES, write_adapter
from opennemo.model.lora import add_lora_, save_adapter
from opennemo.model.positions import QueryScaling, RopeScaling
from opennemo.model.quantization import QuantizedLinear, quantize_
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.gguf_head import read_metadata
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import V3_SPECIAL_TOKENS, Tekken

# Rows of 256, the largest block; head_dim apart from dim / n_heads, as in Mistral NeMo.
CONFIG = ModelConfig(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128, hidden_dim=512,
    vocab_size=1032, rope_theta=5e5, max_position_embeddings=1024, sliding_window=512,
)  # fmt: skip
YARN = RopeScaling(kind="yarn", factor=16.0, original=128, low=1.0, high=32.0, gain=1.0)
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=2.5)},
    "llama 3": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original=8192)},
    "yarn": {"rope_scaling": replace(YARN, gain=0.1 * math.log(16.0) + 1.0)},
    "yarn with a factor of its own": {"rope_scaling": replace(YARN, gain=1.3)},
    "ministral-8b": {"sliding_window": (None, 20, 20, 20)},
    "ministral-3": {
        "rope_scaling": YARN, "query_scaling": QueryScaling(beta=0.1, original=128),
    },
}  # fmt: skip
DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
TEXTS = ["The quick brown fox jumps over 12 lazy dogs. " * 9, "Où êtes-vous né ? L'été 1998."]


def make(
    folder: Path, config: ModelConfig = CONFIG, *, layout: layouts.FolderLayout = "hf"
) -> Path:
    """A random model in a folder, with the beginning of NeMo's vocabulary and its own sampling."""
    torch.manual_seed(0)
    save(Transformer(config), folder, layout=layout)
    return add_vocabulary(folder)


def add_vocabulary(folder: Path) -> Path:
    tokens = Tekken.load(DATA / "tekken_240718.json").tokens[:1000]
    names = V3_SPECIAL_TOKENS[:17]
    vocabulary = Tekken(PATTERNS["tekken"], tokens, special_tokens=names, n_special=32)
    vocabulary.save(folder / "tekken.json")
    content = {"temperature": 0.3, "top_k": 40, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_from_layout_to_layout_and_back(layout: layouts.FolderLayout, tied: bool, tmp_path: Path):
    config = replace(CONFIG, tied_embeddings=tied)
    folder, file = make(tmp_path / "model", config, layout=layout), tmp_path / "model.gguf"
    to_gguf(folder, file)
    for other in ("hf", "mistral"):
        convert(file, tmp_path / other, to=other)
    to_gguf(tmp_path / "mistral", tmp_path / "again.gguf")
    original, tokenizer = load(folder), load_tokenizer(folder)
    paths = [file, tmp_path / "hf", tmp_path / "mistral", tmp_path / "again.gguf"]
    for path in paths:
        model, vocabulary = load(path), load_tokenizer(path)
        assert model.config == config
        for (name, mine), theirs in zip(
            model.named_parameters(), original.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), f"{path}: {name}"
        for text in TEXTS:
            assert vocabulary.encode(text) == tokenizer.encode(text)
        ours, theirs = vars(vocabulary), vars(tokenizer)
        for key in ("control", "bos_id", "eos_id", "add_bos", "dummy_prefix", "instruct_version"):
            assert getattr(vocabulary, key) == getattr(tokenizer, key), f"{path}: {key}"
        assert ours["vocab_size"] == theirs["vocab_size"]
        sampling = {"temperature": 0.3, "top_k": 40, "eos_token_ids": [2, 7]}
        assert read_generation_config(path).items() >= ({"eos_token_ids": [2, 7]}).items()
        if path in paths[:1]:
            assert read_generation_config(path) == sampling


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rope_and_windows_by_layer(name: str, tmp_path: Path):
    config = replace(CONFIG, n_layers=4, **SCALINGS[name])
    to_gguf(make(tmp_path / "model", config), tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "again", to="hf")
    fields = read_metadata(tmp_path / "model.gguf")
    architecture = "mistral3" if "yarn" in name or "ministral-3" in name else "llama"
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.block_count"] == 4
    original, tokens = load(tmp_path / "model"), torch.arange(50) * 7 % CONFIG.vocab_size
    assert original.config == config
    attend = Packed.of(50, window=config.sliding_window)
    attend.positions += 5000
    for path in (tmp_path / "model.gguf", tmp_path / "again"):
        model = load(path)
        found, wanted = model.config, config
        if name == "yarn with a factor of its own":  # a float32 in the file
            assert found.rope_scaling and found.rope_scaling.gain == pytest.approx(1.3)
            found, wanted = (replace(c, rope_scaling=None) for c in (found, wanted))
        assert found == wanted
        with torch.inference_mode():
            torch.testing.assert_close(model(tokens, attend), original(tokens, attend))


def test_what_a_file_has_no_name_for_is_said_before_it_is_written(tmp_path: Path):
    scaling = replace(SCALINGS["yarn"]["rope_scaling"], truncate=False)
    folder = make(tmp_path / "model", replace(CONFIG, rope_scaling=scaling))
    with pytest.raises(CheckpointError, match="a GGUF file has no name for RopeScaling"):
        to_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_transformers_computes_the_same_logits(folder: Path, tmp_path: Path):
    to_gguf(folder, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    model, tokens = load(folder), torch.arange(50) * 7 % CONFIG.vocab_size
    with torch.no_grad():
        logits = model.output(model(tokens, Packed.of(50)))
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_in_sixteen_bits(dtype: torch.dtype, folder: Path, tmp_path: Path):
    to_gguf(folder, tmp_path / "model.gguf", dtype=dtype)
    file, original = GGUF(tmp_path / "model.gguf"), load(folder)
    for name, weight in original.named_parameters():
        own = layouts.spell(name, "gguf")
        is_norm = weight.dim() == 1
        assert file.dtypes[own] == (torch.float32 if is_norm else dtype)
        found = file.read(own, torch.float32)
        assert torch.equal(found, weight if is_norm else weight.to(dtype).float())


def test_the_mixture_of_a_nemo_in_q4_k_m_is_llama_cpp_s():
    config = PRESETS["mistral-nemo-12b"]
    types = MIXTURES["q4_k_m"].types(weight_shapes(config), config)
    six = {*range(5), *range(35, 40), *range(7, 35, 3)}
    for i in range(40):
        of = lambda module, i=i: types[f"layers.{i}.{module}.weight"]  # noqa: E731
        assert of("attention.wv") == of("feed_forward.w2") == ("q6_k" if i in six else "q4_k")
        assert of("attention.wq") == of("attention.wo") == of("feed_forward.w1") == "q4_k"
        assert of("attention_norm") == "f32"
    assert types["output.weight"] == "q6_k" and types["tok_embeddings.weight"] == "q4_k"
    tied = replace(config, tied_embeddings=True)
    assert MIXTURES["q4_k_m"].types(weight_shapes(tied), tied)["tok_embeddings.weight"] == "q6_k"
    narrow = replace(config, dim=576)
    types = MIXTURES["q4_k_m"].types(weight_shapes(narrow), narrow)
    assert types["layers.0.attention.wq.weight"] == "q5_0" and types["output.weight"] == "q8_0"


@pytest.mark.parametrize("format", MIXTURES)
def test_every_mixture_holds_what_blocks_quantize_makes(format: str, folder: Path, tmp_path: Path):
    to_gguf(folder, tmp_path / "model.gguf", format=format)
    model, original = load(tmp_path / "model.gguf", form=Form(blocks=True)), load(folder)
    types = MIXTURES[format].types(weight_shapes(CONFIG), CONFIG)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            type, weight = types[f"{path}.weight"], original.get_parameter(f"{path}.weight")
            assert module.format.name == type
            assert torch.equal(module.tensors["weight"], blocks.quantize(type, weight))
    assert GGUF(tmp_path / "model.gguf").settings["general.file_type"] == MIXTURES[format].number
    names = {name.removeprefix("MOSTLY_").lower(): n for name, n in vars(gguf.LlamaFileType).items()
             if name.startswith("MOSTLY_")}  # fmt: skip
    assert names[format] == MIXTURES[format].number


def test_a_model_that_learnt_in_blocks_keeps_its_codes(folder: Path, tmp_path: Path):
    to_gguf(folder, tmp_path / "model.gguf", format="q4_k", pure=True)
    learnt, written = load(folder), load(tmp_path / "model.gguf", form=Form(blocks=True))
    quantize_(learnt, BLOCKS["q4_k"])
    for path, module in learnt.get_submodule("layers").named_modules(prefix="layers"):
        if isinstance(module, QuantizedLinear):
            other = written.get_submodule(path)
            assert isinstance(other, QuantizedLinear)
            assert torch.equal(other.tensors["weight"], module.tensors["weight"])
    file = GGUF(tmp_path / "model.gguf")
    assert file.type_of("token_embd.weight") == file.type_of("output.weight") == "Q8_0"


def test_blocks_are_copied_as_they_are(folder: Path, tmp_path: Path):
    first, second, third = (tmp_path / f"{i}.gguf" for i in range(3))
    to_gguf(folder, first, format="q4_k_m")
    to_gguf(first, second)
    assert read_metadata(second) == read_metadata(first)
    before, after = GGUF(first), GGUF(second)
    for name in before.shapes:
        assert after.type_of(name) == before.type_of(name)
        assert torch.equal(after.read_codes(name), before.read_codes(name))
    with pytest.warns(UserWarning, match="weights in q4_k, q6_k are rounded a second time"):
        to_gguf(first, third, format="q8_0")
    assert GGUF(third).type_of("blk.0.attn_q.weight") == "Q8_0"
    assert third.stat().st_size > first.stat().st_size


def test_importance_is_the_mean_square_of_each_input(folder: Path, tmp_path: Path):
    reports = []
    found = importance(folder, TEXTS, 100, lambda *at: reports.append(at))
    assert reports[-1] == (CONFIG.n_layers, CONFIG.n_layers)
    model, tokenizer = load(folder), load_tokenizer(folder)
    ids = [[1, *tokenizer.encode(text)] for text in TEXTS]
    ids = [ids[0][:100], ids[1][: 100 - len(ids[0])]] if len(ids[0]) < 100 else [ids[0][:100]]
    expected: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def record(_: torch.nn.Module, inputs: tuple[Tensor], path: str = path) -> None:
                expected[path] = inputs[0].square().mean(0)

            module.register_forward_pre_hook(record)
    with torch.no_grad():
        tokens = torch.tensor([id for window in ids for id in window])
        model.output(model(tokens, Packed.of(*map(len, ids), window=512)))
    assert found.keys() == expected.keys()
    for path, squares in expected.items():
        torch.testing.assert_close(found[path], squares)
    file = tmp_path / "model.gguf"
    to_gguf(folder, file, format="q4_k_m", importance=found)
    path = "layers.1.feed_forward.w1"
    rows = blocks.quantize("q4_k", model.get_parameter(f"{path}.weight"), found[path])
    assert torch.equal(GGUF(file).read_codes("blk.1.ffn_gate.weight"), rows)


def test_importance_lowers_what_rounding_changes(folder: Path, tmp_path: Path):
    """Inputs of very different sizes, as real models have: the outputs change less."""
    model = load(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            for norm in (layer.get_parameter("attention_norm.weight"),
                         layer.get_parameter("ffn_norm.weight")):  # fmt: skip
                norm.copy_(torch.logspace(-2, 1, len(norm))[torch.randperm(len(norm))])
    save(model, tmp_path / "uneven")
    add_vocabulary(tmp_path / "uneven")
    tokens = torch.tensor([1, *load_tokenizer(folder).encode(TEXTS[0])])
    hidden = lambda model: model(tokens, Packed.of(len(tokens)))  # noqa: E731
    errors = []
    for squares in (None, importance(tmp_path / "uneven", TEXTS, 200)):
        file = tmp_path / f"{len(errors)}.gguf"
        to_gguf(tmp_path / "uneven", file, format="q3_k_m", importance=squares)
        with torch.no_grad():
            errors.append((hidden(load(file)) - hidden(model)).square().mean())
    assert errors[1] < 0.9 * errors[0]


def test_an_adapter_is_merged_into_the_file(folder: Path, tmp_path: Path):
    model = load(folder, dtype=torch.float32)
    add_lora_(model, rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", base_model_name="tiny")
    write_adapter(tmp_path / "adapter.gguf", tmp_path / "adapter", CONFIG)
    file, factor = GGUF(tmp_path / "adapter.gguf"), 8.0 / 4
    assert file.settings["adapter.lora.alpha"] == 8.0 and len(file.shapes) == 2 * 14
    merge(folder, tmp_path / "adapter", tmp_path / "model.gguf")
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = load(tmp_path / "model.gguf"), load(tmp_path / "merged")
    changed = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name
        change = mine - load(folder).get_parameter(name)
        changed += bool(change.any())
        own = layouts.spell(name, "gguf")
        if f"{own}.lora_a" in file.shapes:
            a, b = (file.read(f"{own}.lora_{half}", torch.float32) for half in "ab")
            torch.testing.assert_close(factor * b @ a, change.detach(), atol=1e-5, rtol=1e-4)
    assert changed == 14


def test_a_killed_writer_leaves_no_file(folder: Path, tmp_path: Path):
    file = tmp_path / "model.gguf"
    code = f"""
        import os, signal
        from pathlib import Path
        from opennemo.model.export import to_gguf
        def kill(done, total):
            if done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        to_gguf(Path({str(folder)!r}), Path({str(file)!r}), progress=kill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not file.exists()
    to_gguf(folder, file)
    assert load(file).config == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path):
    file = tmp_path / "new" / "model.gguf"
    model = load(folder)
    with torch.no_grad():
        model.get_parameter("layers.1.attention.wo.weight")[3, 5] = float("nan")
    save(model, tmp_path / "nan")
    add_vocabulary(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wo.weight has numbers that are"):
        to_gguf(tmp_path / "nan", file, format="q4_0")
    assert list(file.parent.iterdir()) == []
    save(Transformer(PRESETS["tiny"]), tmp_path / "narrow")
    with pytest.raises(
        CheckpointError, match=r"q4_0 needs widths in multiples of 32, .*\(320, 48\)"
    ):
        to_gguf(tmp_path / "narrow", file, format="q4_0")
    file.write_text("precious")
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        to_gguf(folder, file)
    assert file.read_text() == "precious"
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File exists"):
        to_gguf(folder, file / "below.gguf")


def test_a_folder_in_codes_is_refused(folder: Path, tmp_path: Path):
    from opennemo.model.export import quantize

    quantize(folder, tmp_path / "int8", format="int8")
    with pytest.raises(CheckpointError, match="is stored as int8; write GGUF from what it was"):
        to_gguf(tmp_path / "int8", tmp_path / "model.gguf")


def test_large_matrices_are_written_some_rows_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("opennemo.model.gguf_writer.CHUNK", 2**14)
    reports: list[tuple[int, int]] = []
    to_gguf(folder, tmp_path / "model.gguf", progress=lambda *at: reports.append(at))
    assert reports[-1][0] == reports[-1][1] == sum(p.nbytes for p in load(folder).parameters())
    assert len(reports) > 5 * len(open_checkpoint(folder).shapes)
    assert np.all(np.diff([done for done, _ in reports]) > 0)
    model = load(tmp_path / "model.gguf")
    for mine, theirs in zip(model.parameters(), load(folder).parameters(), strict=True):
        assert torch.equal(mine, theirs)


LLAMA_CPP = """
    import json, sys
    import numpy as np
    from llama_cpp import Llama

    ids = json.loads(sys.argv[2])
    llama = Llama(sys.argv[1], n_ctx=512, n_batch=512, logits_all=True, n_threads=1, verbose=False,
                  type_k=0, type_v=0)  # float32
    llama.eval(ids)
    np.save(sys.argv[3], llama.scores[: len(ids)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "ministral-8b"])  # it has no windows
def test_llama_cpp_computes_the_same_of_scaled_positions(name: str, tmp_path: Path):
    """In an environment of its own, which OPENNEMO_LLAMA_PYTHON names."""
    python = os.environ.get("OPENNEMO_LLAMA_PYTHON")
    if not python:
        pytest.skip("OPENNEMO_LLAMA_PYTHON names no interpreter that has llama-cpp-python")
    config = replace(CONFIG, sliding_window=None, **SCALINGS[name])
    folder, file = make(tmp_path / "model", config), tmp_path / "model.gguf"
    to_gguf(folder, file, dtype=torch.float32)
    ids = torch.arange(400) * 7 % 1000 + 32
    command = [python, "-c", textwrap.dedent(LLAMA_CPP), file, json.dumps(ids.tolist())]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([*command, tmp_path / "out.npy"], check=True, env=env)
    theirs, model = torch.from_numpy(np.load(tmp_path / "out.npy")), load(file)
    with torch.no_grad():
        ours = model.output(model(ids, Packed.of(400)))
    torch.testing.assert_close(theirs, ours, atol=1e-4 * float(ours.abs().max()), rtol=0)
    plain = load(make(tmp_path / "plain", replace(config, rope_scaling=None, query_scaling=None)))
    with torch.no_grad():
        other = plain.output(plain(ids, Packed.of(400)))
    assert (other - ours).abs().max() > 20 * (theirs - ours).abs().max()
