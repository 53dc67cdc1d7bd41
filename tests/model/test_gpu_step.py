"""The fused step equals the model's definition: on a GPU, or all but its graphs in an interpreter.

What needs a card is marked `gpu`.
"""

import importlib.util
import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.model.attention import Paged
from opennemo.model.formats import BLOCKS, by_name
from opennemo.model.fused_attention import FUSED_PAGE_SIZE
from opennemo.model.pages import Pages
from opennemo.model.positions import QueryScaling, RopeScaling, Window
from opennemo.model.quantization import QuantizedEmbedding, quantize_
from opennemo.model.torch_step import TorchStep
from opennemo.model.transformer import ModelConfig, Transformer

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

from opennemo.kernels import paged_attention
from opennemo.model.gpu_step import BATCHES, GpuStep

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]
# n_heads * head_dim is not dim, as in Mistral NeMo.
CONFIG = ModelConfig(
    dim=96, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=160, vocab_size=112,
    max_position_embeddings=1024,
)  # fmt: skip
PORTIONS = [  # (sequence, from token, to token): a prompt each, one token more, both
    [(0, 0, 9), (1, 0, 1), (2, 0, 40)],
    [(0, 9, 10), (1, 1, 2), (2, 40, 41)],
    [(0, 10, 14), (1, 2, 3)],
]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the default would be empty here, and the interpreter runs those one by one."""
    if not HAS_GPU:
        monkeypatch.setattr(paged_attention, "SPLITS", 2)


def model(format: str = "fp32", dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(CONFIG).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    if format != "fp32":
        largest = {path: 4.0 for path, _ in net.named_modules()}
        head = None if by_name(format).static else by_name(format)
        quantize_(net, by_name(format), largest, head)
    for parameter in net.parameters():
        parameter.data = parameter.to(dtype)
    return net.to(DEVICE)


class Requests:
    """Sequences of random tokens in shuffled pages; the last page is nobody's."""

    def __init__(self, kv: str = "fp32", page_size: int = 16, n: int = 5, window: Window = None):
        random = torch.Generator().manual_seed(1)
        self.page_size, self.window = page_size, window
        self.tokens = torch.randint(0, CONFIG.vocab_size, (n, 128), generator=random)
        width = -(-128 // page_size)
        self.table = torch.randperm(n * width, generator=random).view(n, width).int()
        scale = torch.rand(CONFIG.n_layers, 2, generator=random) / 100 + 0.005
        self.pages = Pages.empty(CONFIG, n * width + 1, page_size, kv, DEVICE, scale)

    def inputs(self, portions: list[tuple[int, int, int]]) -> tuple[Tensor, Paged, Tensor]:
        places = [torch.arange(start, end) for _, start, end in portions]
        rows, sizes = [self.table[i] for i, _, _ in portions], [len(p) for p in places]
        size = self.page_size
        slots = [r[p // size] * size + p % size for r, p in zip(rows, places, strict=True)]
        bounds = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        attend = Paged(
            pages=self.pages,
            positions=torch.cat(places).int().to(DEVICE),
            slots=torch.cat(slots).long().to(DEVICE),
            cu_seqlens=bounds.to(DEVICE),
            max_seqlen=max(sizes),
            context_lens=torch.tensor([e for _, _, e in portions], dtype=torch.int32).to(DEVICE),
            page_table=torch.stack(rows).to(DEVICE),
            window=self.window,
        )
        tokens = torch.cat([self.tokens[i][start:end] for i, start, end in portions]).to(DEVICE)
        return tokens, attend, torch.arange(len(tokens), device=DEVICE)


@torch.inference_mode()
def eager(step: GpuStep, tokens: Tensor, attend: Paged, rows: Tensor) -> Tensor:
    return step.logits(step.hidden(tokens, attend)[rows])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("format", "kv"),
    [
        ("fp32", "fp32"), ("fp8", "fp32"), ("fp8-static", "int8"), ("int8", "fp32"),
        ("fp8-dynamic", "fp32"), ("w8a8", "fp32"), ("int4", "fp32"), ("fp32", "int8"),
        ("fp8", "fp8"),
    ],
)  # fmt: skip
def test_equals_the_definition(format: str, kv: str):
    net = model(format)
    ours, theirs = Requests(kv), Requests(kv)
    expected = [TorchStep(net)(*theirs.inputs(portions)) for portions in PORTIONS]
    step = GpuStep(net)
    for portions, logits in zip(PORTIONS, expected, strict=True):
        # Where codes are rounded, sums in another order may round to the neighbouring one.
        close(eager(step, *ours.inputs(portions)), logits, 1e-5 if format == kv else 3e-2)
    # Weights that were laid together are still the model's own.
    again = TorchStep(net)(*theirs.inputs(PORTIONS[0]))
    assert torch.equal(again, expected[0])


@pytest.mark.parametrize(("format", "kv"), [("q4_0", "fp32"), ("q5_1", "int8")])
def test_a_model_in_blocks_equals_the_definition_its_embedding_too(format: str, kv: str):
    net, table = model(format), BLOCKS["q8_0"]
    tensors = table.quantize(net.tok_embeddings.weight.cpu())
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    shape = net.tok_embeddings.weight.shape
    net.tok_embeddings = QuantizedEmbedding(table, shape, tensors, torch.float32)  # pyright: ignore
    ours, theirs, step = Requests(kv), Requests(kv), GpuStep(net)
    assert step.head.weight is None and step.head.each[0] is not net.output
    for portions in PORTIONS:
        expected = TorchStep(net)(*theirs.inputs(portions))
        close(eager(step, *ours.inputs(portions)), expected, 3e-2)


def test_pages_of_any_size_and_steps_that_mix_prompts_and_tokens():
    net = model()
    ours, theirs, step = Requests(page_size=7), Requests(page_size=7), GpuStep(net)
    for portions in [PORTIONS[0], [(0, 9, 10), (3, 0, 30), (1, 1, 2), (2, 40, 45)]]:
        expected = TorchStep(net)(*theirs.inputs(portions))
        close(step(*ours.inputs(portions)), expected, 1e-5)


def test_a_sliding_window_equals_the_definition():
    net = model()
    ours, theirs = Requests(window=6), Requests(window=6)
    step = GpuStep(net)
    for portions in PORTIONS:
        expected = TorchStep(net)(*theirs.inputs(portions))
        close(eager(step, *ours.inputs(portions)), expected, 1e-5)


def test_scaled_positions_and_windows_by_layer_equal_the_definition():
    plain = model()
    changes = {
        "rope_scaling": RopeScaling(kind="yarn", factor=16.0, original=32, high=32.0, gain=1.3),
        "query_scaling": QueryScaling(beta=0.7, original=4),
    }
    net = Transformer(replace(CONFIG, **changes)).eval().requires_grad_(False).to(DEVICE)
    net.load_state_dict(plain.state_dict())
    ours, theirs, other = (Requests(window=(None, 6)) for _ in range(3))
    step = GpuStep(net)
    for portions in PORTIONS:
        expected = TorchStep(net)(*theirs.inputs(portions))
        close(eager(step, *ours.inputs(portions)), expected, 1e-5)
        unscaled = TorchStep(plain)(*other.inputs(portions))
        assert (unscaled - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("n", [1, 3, 8, 11])
def test_a_step_is_filled_up_to_a_batch_beside_everybodys_pages(n: int):
    net, requests = model(), Requests(n=12)
    step, plain = GpuStep(net), TorchStep(net)
    plain(*requests.inputs([(i, 0, 20 + i) for i in range(12)]))
    decode = requests.inputs([(i, 20 + i, 21 + i) for i in range(n)])
    expected = plain(*decode)
    before = requests.pages.codes.clone()
    step.padded(*requests.inputs([(i, 0, 1) for i in range(12)])[:2])  # leaves its rows behind
    tokens, attend = step.padded(*decode[:2])
    assert len(tokens) == min(size for size in BATCHES if size >= n)
    hidden = step.hidden(tokens, attend)
    close(step.logits(hidden[:n]), expected, 1e-5)
    torch.testing.assert_close(requests.pages.codes[:, :, :-1], before[:, :, :-1])
    assert n in BATCHES or not torch.equal(requests.pages.codes[:, :, -1], before[:, :, -1])


def test_matrices_side_by_side_are_kept_once():
    net = model("fp8")
    step = GpuStep(net)
    attention = net.get_submodule("layers.0.attention")
    weights = [attention.get_buffer(f"{name}.weight") for name in ("wq", "wk", "wv")]
    assert step.layers[0].qkv.weight is not None
    start = step.layers[0].qkv.weight.data_ptr()
    offsets = itertools.accumulate([w.nbytes for w in weights[:-1]], initial=start)
    assert [w.data_ptr() for w in weights] == list(offsets)


# ---- on a card ----------------------------------------------------------------------------------


def on_gpu(*values: object) -> list:
    return [pytest.param(value, marks=needs_gpu) for value in values]


@pytest.mark.parametrize("format", on_gpu("fp32", "fp8", "fp8-static"))
@pytest.mark.parametrize("kv", ["bf16", "fp8", "int8"])
def test_a_graph_equals_its_kernels_and_both_the_definition_in_bf16(format: str, kv: str):
    net = model(format, torch.bfloat16)
    requests = [Requests(kv, FUSED_PAGE_SIZE) for _ in range(3)]
    exact, step = deepcopy(net), GpuStep(net)
    for portions in [*PORTIONS[:2], [(0, 10, 11), (2, 41, 42)], [(0, 11, 12), (2, 42, 43)]]:
        graph = step(*requests[0].inputs(portions))
        kernels = eager(step, *requests[1].inputs(portions))
        defined = TorchStep(exact)(*requests[2].inputs(portions))
        close(graph, kernels, 2e-2)
        close(kernels, defined, 5e-2)
    # The same inputs at the same batch size: the very same kernels.
    tokens, attend, rows = requests[0].inputs([(0, 11, 12), (2, 42, 43)])
    assert torch.equal(step(tokens, attend, rows), step(tokens, attend, rows))
    padded = step.padded(tokens, attend)
    with torch.inference_mode():
        hidden = step.hidden(*padded)[: len(tokens)]
        assert torch.equal(step.logits(hidden), step(tokens, attend, rows))


@pytest.mark.parametrize("format", on_gpu("fp32", "fp8"))
def test_fp8_and_bf16_on_a_card_equal_the_cpu(format: str):
    net = model(format, torch.bfloat16)
    on_card = Requests("bf16", FUSED_PAGE_SIZE)
    found = GpuStep(net)(*on_card.inputs(PORTIONS[0]))
    tokens, attend, rows = on_card.inputs(PORTIONS[0])
    attend = Paged(
        pages=Pages(torch.zeros_like(attend.pages.codes, device="cpu"), attend.pages.format),
        max_seqlen=attend.max_seqlen,
        **{
            name: getattr(attend, name).cpu()
            for name in ("positions", "slots", "cu_seqlens", "context_lens", "page_table")
        },
    )
    close(found.cpu(), TorchStep(net.cpu())(tokens.cpu(), attend, rows.cpu()), 5e-2)


@pytest.mark.parametrize("kv", on_gpu("fp32", "int8"))
def test_answers_do_not_depend_on_how_many_are_answered(kv: str):
    """In float32: sums that depend on the batch move no choice. 16 bits would have near ties."""
    prompts = [[(7 * i + 3 * j) % CONFIG.vocab_size for j in range(1 + 5 * i)] for i in range(20)]

    def answers(n: int, max_batched_tokens: int = 512) -> list[list[int]]:
        config = EngineConfig(
            max_sequences=n, kv_format=kv, n_pages=60, max_batched_tokens=max_batched_tokens
        )
        engine, found = LocalEngine(model(), [], config), [[] for _ in prompts]
        for prompt, tokens in zip(prompts, found, strict=True):

            def hear(event: Token, tokens: list[int] = tokens) -> None:
                assert event.error is None
                if event.id is not None:
                    tokens.append(event.id)

            engine.submit(prompt, SamplingParams(temperature=0, max_tokens=24), hear)
        while engine.step():
            pass
        return found

    alone = answers(1)
    assert all(len(tokens) == 24 for tokens in alone)
    assert answers(3) == answers(20) == answers(20, 30) == alone


@pytest.mark.parametrize("kv", on_gpu("fp8"))
def test_an_engine_sleeps_and_wakes(kv: str):
    engine = LocalEngine(model(), [], EngineConfig(kv_format=kv, kv_scale=0.05, n_pages=4))

    def answer() -> list[int | None]:
        tokens: list[int | None] = []
        params = SamplingParams(temperature=0, max_tokens=8)
        engine.submit([1, 2, 3], params, lambda e: tokens.append(e.id))
        while engine.step():
            pass
        return tokens

    before = answer()
    engine.cache.reset()
    engine.runner.sleep()
    engine.runner.wake()
    assert len(before) == 8 and answer() == before
