"""Model folders: what is written is read back, in little memory, and what is bad is refused."""

import json
import math
import multiprocessing
import os
import random
import shutil
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opennemo.errors import CheckpointError
from opennemo.model import layouts
from opennemo.model.checkpoint import convert, load, read_config, save, weight_shapes
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer
from tests import processes

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TINY).requires_grad_(False)


@pytest.fixture(scope="module", params=["mistral", "hf"])
def saved(request, model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    save(model, folder, layout=request.param)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def edit(path: Path, **changes) -> None:
    """Change settings in a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def settings(folder: Path) -> Path:
    return folder / {"mistral": "params.json", "hf": "config.json"}[folder.name]


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


# -- what is written is read back


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_load_gives_what_was_saved(saved, model, dtype):
    loaded = load(saved, dtype=dtype)
    assert loaded.config == model.config == read_config(saved)
    for (name, mine), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(dtype)), name
        assert mine.requires_grad


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_tied_embeddings_stay_one_tensor(layout, tmp_path):
    config = replace(TINY, tied_embeddings=True, sliding_window=7)
    save(Transformer(config), tmp_path / layout, layout=layout)
    tensors = load_file(weights(tmp_path / layout))
    # mistral-inference reads a head in any case.
    assert len(tensors) == 9 * TINY.n_layers + (3 if layout == "mistral" else 2)
    if layout == "mistral":
        assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    loaded = load(tmp_path / layout)
    assert loaded.config == config
    assert loaded.output.weight is loaded.tok_embeddings.weight


def test_a_head_left_out_is_a_tied_one_unless_the_settings_say_otherwise(folder):
    tensors = load_file(weights(folder))
    del tensors["output.weight" if folder.name == "mistral" else "lm_head.weight"]
    save_file(tensors, weights(folder))
    tied = "tied_embeddings" if folder.name == "mistral" else "tie_word_embeddings"
    edit(settings(folder), **{tied: None})
    assert read_config(folder).tied_embeddings
    edit(settings(folder), **{tied: False})
    with pytest.raises(CheckpointError, match=r"weights missing: (output|lm_head)\.weight"):
        load(folder)


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_convert_reports_progress_and_takes_the_tokenizer_along(saved, to, tmp_path):
    src = Path(shutil.copytree(saved, tmp_path / "src"))
    (src / "generation_config.json").write_text('{"temperature": 0.3}')
    (src / "LICENSE.txt").write_text("Apache")
    (src / "pytorch_model.bin").write_bytes(b"not to be copied")
    calls = []
    convert(src, tmp_path / "dst", to=to, progress=lambda *call: calls.append(call))
    n_bytes = sum(p.numel() for p in Transformer(TINY).parameters()) * 4
    assert calls[-1] == (n_bytes, n_bytes) and sorted(calls) == calls
    settings, weights = {
        "mistral": ("params.json", "consolidated.safetensors"),
        "hf": ("config.json", "model.safetensors"),
    }[to]
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert names == {settings, weights, "generation_config.json", "LICENSE.txt"}


def test_mistral_s_own_params_json(model, tmp_path):
    """The 204 bytes that came with Mistral NeMo, in small, and those of Mistral 7B v0.1."""
    save(model, tmp_path / "mistral", layout="mistral")
    not_said = ("rope_theta", "max_position_embeddings", "sliding_window", "tied_embeddings")
    params = {key: value for key, value in asdict(TINY).items() if key not in not_said}
    path = tmp_path / "mistral" / "params.json"
    path.write_text(json.dumps(params | {"rope_theta": 1000000.0}))
    assert read_config(path.parent) == replace(TINY, max_position_embeddings=32768)
    path.write_text(json.dumps(params | {"sliding_window": 4096, "max_batch_size": 0}))
    assert read_config(path.parent).rope_theta == 1e4, "as mistral-inference has it"
    path.write_text(json.dumps(params | {"moe": None, "model_type": "transformer"}))
    assert read_config(path.parent).rope_theta == 1e6


def test_windows_as_a_pattern_of_layers(model, tmp_path):
    save(model, tmp_path / "mistral", layout="mistral")
    path = tmp_path / "mistral" / "params.json"
    for window, expected in (([32768, 40], (None, 40)), ([None, 40], (None, 40)), ([40, 40], 40)):
        edit(path, sliding_window=window, max_position_embeddings=32768)
        assert read_config(path.parent).sliding_window == expected


def test_the_first_release_of_nemo_promised_too_long_a_context(model, tmp_path):
    save(model, tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", max_position_embeddings=1_024_000)
    assert read_config(tmp_path / "hf").max_position_embeddings == 131_072


def test_saving_keeps_what_is_there(saved, model):
    with pytest.raises(CheckpointError, match="exists"):
        save(model, saved)
    assert load(saved)


def _save_and_die(model: Transformer, folder: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total / 2:
            os._exit(1)

    convert(folder / "hf", folder / "killed", to="mistral", progress=progress)


def test_a_killed_convert_leaves_nothing_that_looks_whole(model, tmp_path):
    save(model, tmp_path / "hf")
    process = multiprocessing.get_context("fork").Process(
        target=_save_and_die, args=(model, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == 1 and not (tmp_path / "killed").exists()
    convert(tmp_path / "hf", tmp_path / "killed", to="mistral")
    assert load(tmp_path / "killed")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "killed"}, "and the rest is gone"


# -- what is bad is refused, in one line

DAMAGE = {
    "no settings": (
        lambda f: settings(f).unlink(),
        r"neither params.json nor config.json",
    ),
    "no weights": (lambda f: weights(f).unlink(), r"(consolidated|model)\.safetensors is missing"),
    "weights cut short": (
        lambda f: os.truncate(weights(f), weights(f).stat().st_size - 1),
        r"damaged, truncated",
    ),
    "weights empty": (lambda f: weights(f).write_bytes(b""), r"damaged, truncated"),
    "weights are a folder": (
        lambda f: (weights(f).rename(f / "x"), (f / weights_name(f)).mkdir()),
        r"damaged, truncated",
    ),
    "settings not JSON": (lambda f: settings(f).write_text("{"), r"not JSON"),
    "settings not UTF-8": (lambda f: settings(f).write_bytes(b'{"a": "\xff"}'), r"not JSON"),
    "settings nested too deep": (lambda f: settings(f).write_text("[" * 10**5), r"not JSON"),
    "settings not an object": (lambda f: settings(f).write_text("[1]"), r"not a JSON object"),
    "settings empty": (lambda f: settings(f).write_text("{}"), r"(dim|hidden_size) is missing"),
    "vocab_size a string": (lambda f: edit(settings(f), vocab_size="many"), r"'many', not a whole"),
    "vocab_size beyond bounds": (lambda f: edit(settings(f), vocab_size=10**12), r"not a whole"),
    "vocab_size negative": (lambda f: edit(settings(f), vocab_size=-1), r"is -1, not a whole"),
    "rope_theta not finite": (
        lambda f: edit(settings(f), rope_theta=float("nan"), rope_parameters={}),
        r"rope_theta is nan",
    ),
    "head_dim odd": (lambda f: edit(settings(f), head_dim=15), r"must be even"),
    "another shape": (
        lambda f: edit(settings(f), vocab_size=99),
        r"tok.* is \(320, 48\), not \(99, 48\), (output|lm_head)\.weight is \(320, 48\)",
    ),
    "more layers than weights": (
        lambda f: edit(settings(f), **{LAYERS[f.name]: 9}),
        r"weights missing: (model\.)?layers\.2\.(.*, ){4}.* and 58 more$",
    ),
    "fewer layers than weights": (
        lambda f: edit(settings(f), **{LAYERS[f.name]: 1}),
        r"weights unexpected: (.*, ){4}.* and 4 more$",
    ),
}
LAYERS = {"mistral": "n_layers", "hf": "num_hidden_layers"}


def weights_name(folder: Path) -> str:
    return {"mistral": "consolidated.safetensors", "hf": "model.safetensors"}[folder.name]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(folder, damage):
    break_it, message = DAMAGE[damage]
    break_it(folder)
    assert_refused(folder, message)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("mistral", {"moe": {"num_experts": 8}}, "moe = "),
        ("mistral", {"causal": False}, "bidirectional = True"),
        ("mistral", {"yarn": {"factor": 16, "gamma": 2}}, "yarn.gamma = 2 .*: factor, "),
        ("mistral", {"yarn": {"factor": 16, "beta": 32}}, "yarn.apply_scale is missing"),
        ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "original_max_position_embeddings is mis"),
        ("mistral", {"rope_scaling": {"factor": 16}}, "rope_scaling = "),
        ("mistral", {"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization .* only"),
        ("mistral", {"model_type": "mamba"}, "model_type = 'mamba' .*supported: transformer"),
        ("mistral", {"sliding_window": [4, 3, None]}, r"sliding_window is \[4, 3, None\]"),
        ("hf", {"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM.*MistralForCausalLM"),
        ("hf", {"architectures": None, "model_type": "gemma"}, "gemma.*: mistral or llama"),
        ("hf", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map = "),
        ("hf", {"attention_bias": True}, "attention_bias = True"),
        ("hf", {"mlp_bias": True}, "mlp_bias = True"),
        ("hf", {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*supported: silu"),
        ("hf", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("hf", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*: default or lin"),
        ("hf", {"rope_scaling": "longrope"}, "rope_type = 'longrope' .*or llama3 or yarn"),
        ("hf", {"rope_parameters": {"rope_type": "llama3"}}, "factor is missing"),
        ("hf", {"rope_parameters": {"type": "yarn", "factor": 2, "alpha": 3}}, "alpha = 3 .*"),
        ("hf", {"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "full_attention = "),
        ("hf", {"layer_types": ["full_attention"]}, "layer_types = .*: 2 of full_attention and"),
        ("hf", {"sliding_window": 0, "layer_types": ["sliding_attention"] * 2}, "_window is mis"),
        ("hf", {"num_local_experts": 8}, "num_local_experts = 8"),
        ("hf", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("hf", {"quantization_config": {"quant_method": "exl2"}}, "quant_method is 'exl2'"),
    ],
)  # fmt: skip
def test_models_that_compute_something_else(model, layout, change, message, tmp_path):
    folder = tmp_path / layout
    save(model, folder, layout=layout)
    edit(settings(folder), **change)
    assert_refused(folder, message)


def test_paths_that_are_no_model(tmp_path):
    assert_refused(tmp_path, "no model: it has neither")
    assert_refused(tmp_path / "nowhere", "does not exist")
    assert_refused(tmp_path / "nowhere.gguf", "No such file")
    (tmp_path / "README.md").write_text("hello")
    assert_refused(tmp_path / "README.md", "neither a folder nor a .gguf file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(folder, name):
    weights(folder).unlink()
    (folder / name).write_bytes(b"\x80\x04whatever")
    with pytest.raises(CheckpointError, match=f"{name}: pickle files are never read.*convert"):
        load(folder)
    assert_refused(folder / name, "pickle files are never read")


def test_an_index_that_does_not_fit_its_files(model, tmp_path, monkeypatch):
    monkeypatch.setattr("opennemo.model.checkpoint.MAX_SHARD", 20_000)
    folder = tmp_path / "hf"
    save(model, folder)
    parts = sorted(folder.glob("*.safetensors"))
    parts[3].rename(tmp_path / "elsewhere.safetensors")
    assert_refused(folder, f"files missing: {parts[3].name}")
    index = folder / "model.safetensors.index.json"
    edit(index, weight_map={"lm_head.weight": "../elsewhere.safetensors"})
    assert_refused(folder, "does not name files of this folder")
    edit(index, weight_map=[1])
    assert_refused(folder, "does not name files of this folder")


KEY = "model.layers.0.mlp.gate_proj.weight"
W1 = "layers.0.feed_forward.w1.weight"


@pytest.mark.parametrize("overlay", ["a.safetensors", "model-overlay-00001.safetensors"])
def test_an_index_decides_which_file_a_tensor_is_read_from(model, tmp_path, overlay):
    save(model, tmp_path / "m")
    folder = tmp_path / "m"
    tensors, stale = load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"
    new = tensors[KEY] + 1
    (folder / "model.safetensors").rename(folder / stale)
    save_file({KEY: new, "of.nothing": new + 1}, folder / overlay)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, stale) | {KEY: overlay}}))
    assert torch.equal(load(folder).get_parameter(W1), new)
    # A file that the index does not name is not read, with a warning.
    save_file({KEY: new - 2}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="model.safetensors is not read, since .*index.json"):
        assert torch.equal(load(folder).get_parameter(W1), new)
    (folder / stale).unlink()
    with pytest.raises(CheckpointError, match=f"missing: {stale}.*remove model.safetensors.index"):
        load(folder)
    save_file({"x": new}, folder / stale)
    with pytest.raises(CheckpointError, match=f"{stale}: the index names tensors that are not in"):
        load(folder)


def test_weights_in_other_types(folder):
    tensors = load_file(weights(folder))
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, weights(folder))
    assert_refused(folder, f"codes that the settings do not explain: {name} in float8_e4m3fn")


def test_no_forged_setting_escapes(folder):
    path = settings(folder)
    original = json.loads(path.read_text())
    strange = [
        None,
        True,
        -1,
        0,
        1e400,
        10**30,
        "x",
        [],
        [1],
        ["x", {}],
        {"rope_type": []},
        {"a": 1},
    ]
    for key in [*original, "rope_scaling", "moe", "max_seq_len", "quantization_config"]:
        for value in strange:
            path.write_text(json.dumps(original | {key: value}))
            try:
                load(folder)
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_no_forged_header_escapes(saved, tmp_path):
    """Bytes, lengths and numbers changed at random: the file is read or refused, no more."""
    folder = Path(shutil.copytree(saved, tmp_path / saved.name))
    original = weights(folder).read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    rng = random.Random(0)
    n_refused = 0
    for _ in range(600):
        data = bytearray(original)
        match rng.randrange(4):
            case 0:
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(end)] = rng.randrange(256)
            case 1:
                data[:8] = rng.choice([0, 1, end, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
            case 2:
                del data[rng.randrange(len(data)) :]
            case 3:
                text = original[8:end].decode()
                number = rng.choice(["0", "-1", "1e9", "18446744073709551615", "[]", '"x"', "null"])
                digits = [i for i, c in enumerate(text) if c.isdigit()]
                at = rng.choice(digits)
                data[8 : 8 + end] = (text[:at] + number + text[at + 1 :]).encode()
        weights(folder).write_bytes(data)
        try:
            load(folder)
        except CheckpointError as error:
            n_refused += 1
            assert "\n" not in str(error)
    assert n_refused > 500


# -- memory

WIDE = ModelConfig(
    dim=1024, n_layers=6, n_heads=16, n_kv_heads=8, head_dim=64, hidden_dim=3072,
    vocab_size=16384, max_position_embeddings=64,
)  # fmt: skip
MEASURE = """
    import sys, threading, time
    from pathlib import Path
    import torch
    import opennemo.model.gguf
    from opennemo.model.checkpoint import convert, load, read_config

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10

    def watch():
        global peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    source, action = Path(sys.argv[1]), sys.argv[2]
    read_config(source)  # imports
    start = peak = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    if action == "convert":
        convert(source, source.with_name(f"converted {source.name}"), to="hf")
    else:
        model = load(source, dtype=getattr(torch, action))
    peak = max(peak, anonymous())
    print(peak - start)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """One model in folders of bfloat16, and as large a file of 8-bit blocks."""
    folder = tmp_path_factory.mktemp("wide")
    model = Transformer(WIDE).to(torch.bfloat16)
    save(model, folder / "mistral", layout="mistral")
    save(model, folder / "hf")
    writer = gguf.GGUFWriter(folder / "gguf", "llama")
    for name, value in asdict(WIDE).items():
        if value is not None and name != "tied_embeddings":
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(layouts.key(name, "gguf"), value, kind)
    for name, shape in weight_shapes(WIDE).items():
        codes = np.zeros((*shape[:-1], shape[-1] // 32 * 34), np.uint8)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(layouts.spell(name, "gguf"), codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "gguf").rename(folder / "model.gguf")
    return folder


N_WEIGHTS = sum(map(math.prod, weight_shapes(WIDE).values()))
REORDERED = WIDE.n_layers * (WIDE.n_heads + WIDE.n_kv_heads) * WIDE.head_dim * WIDE.dim
LARGEST = WIDE.vocab_size * WIDE.dim
ALLOCATOR = 48e6  # what malloc keeps of freed memory; less than one weight more would be


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("source", "action", "most"),
    [
        ("mistral", "bfloat16", 0),  # all of it is mapped
        ("hf", "bfloat16", 2 * REORDERED),  # all but wq and wk
        ("mistral", "float32", 4 * (N_WEIGHTS + LARGEST)),
        ("hf", "float32", 4 * (N_WEIGHTS + LARGEST)),
        ("model.gguf", "float32", 4 * (N_WEIGHTS + LARGEST)),
        ("model.gguf", "bfloat16", 2 * N_WEIGHTS + 4 * LARGEST),
        ("hf", "convert", 4 * LARGEST),
        ("model.gguf", "convert", 4 * LARGEST),
    ],
)
def test_peak_memory_is_the_result_and_one_weight(wide, source, action, most):
    done = processes.run("-c", textwrap.dedent(MEASURE), wide / source, action)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"{source} {action}: {peak / 1e6:.0f} MB, allowed {most / 1e6:.0f} MB")
    assert peak < most + ALLOCATOR
