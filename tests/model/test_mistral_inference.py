"""Folders in Mistral's layout, read by mistral-inference: the same ids and logits (slow)."""

import json
import os
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opennemo.model.attention import Packed
from opennemo.model.checkpoint import convert, load, save
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.chat import encode_chat
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "été 🦙"},
    {"role": "assistant", "content": "日本"}, {"role": "user", "content": "12345"},
]  # fmt: skip
VARIANTS = {"plain": {}, "tied": {"tied_embeddings": True}, "windows": {"sliding_window": 7}}

# A CPU has none of xformers' kernels, so the mask of that package is applied here.
MISTRAL = """
    import json, sys
    from pathlib import Path
    import torch
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_inference import transformer_layers
    from mistral_inference.cache import BufferCache
    from mistral_inference.transformer import Transformer
    from safetensors.torch import save_file

    def attention(q, k, v, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores + mask.materialize(scores.shape[-2:], dtype=scores.dtype)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()

    transformer_layers.memory_efficient_attention = attention
    folder, out, messages = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    tokenizer = MistralTokenizer.from_file(str(folder / "tekken.json"))
    request = ChatCompletionRequest(messages=messages)
    ids = torch.tensor(tokenizer.encode_chat_completion(request).tokens)
    model = Transformer.from_folder(folder, device="cpu", dtype=torch.float32)
    args = model.args
    cache = BufferCache(
        args.n_layers, 1, 64, args.n_kv_heads, args.head_dim, args.sliding_window
    )
    with torch.inference_mode():
        steps = [model(part, [len(part)], cache) for part in (ids[:-3], *ids[-3:].split(1))]
    save_file({"ids": ids, "logits": torch.cat(steps)}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_mistral_inference_computes_the_same(name: str, tmp_path: Path):
    """In the environment that OPENNEMO_MISTRAL_PYTHON names."""
    python = os.environ.get("OPENNEMO_MISTRAL_PYTHON")
    if not python:
        pytest.skip("OPENNEMO_MISTRAL_PYTHON names no interpreter that has mistral-inference")
    torch.manual_seed(3)
    model = Transformer(replace(PRESETS["tiny"], **VARIANTS[name])).requires_grad_(False)
    save(model, tmp_path / "hf", layout="hf")
    vocabulary = Tekken(PATTERNS["tekken"], SINGLE_BYTES, n_special=64)  # 320 tokens
    vocabulary.save(tmp_path / "hf" / "tekken.json")
    convert(tmp_path / "hf", tmp_path / "mistral", to="mistral")
    script, out = tmp_path / "read.py", tmp_path / "out.safetensors"
    script.write_text(textwrap.dedent(MISTRAL))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, script, tmp_path / "mistral", out, json.dumps(MESSAGES)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, model = load_file(out), load(tmp_path / "mistral")
    assert theirs["ids"].tolist() == encode_chat(load_tokenizer(tmp_path / "mistral"), MESSAGES)
    attend = Packed.of(len(theirs["ids"]), window=model.config.sliding_window)
    with torch.inference_mode():
        ours = model.output(model(theirs["ids"], attend))
    torch.testing.assert_close(theirs["logits"], ours, atol=1e-4, rtol=1e-4)
