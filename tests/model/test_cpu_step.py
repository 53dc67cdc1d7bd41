"""The native step equals the model's definition, and a row's bits do not depend on the batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from opennemo.kernels import cpu
from opennemo.model.attention import Paged
from opennemo.model.cpu_step import NativeStep
from opennemo.model.formats import BLOCKS, FORMATS
from opennemo.model.pages import Pages
from opennemo.model.positions import QueryScaling, RopeScaling, Window
from opennemo.model.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    quantize_,
    replace_module,
)
from opennemo.model.step import compile_step
from opennemo.model.torch_step import TorchStep
from opennemo.model.transformer import ModelConfig, Transformer
from tests.blocks import random_blocks

PAGE = 16
NATIVE = [name for name, format in FORMATS.items() if format.kernel is not None]
SHAPES = {
    # Query heads share a key head three to one; the widths fill no panel of 32 and no group of 32.
    "odd": ModelConfig(
        dim=76, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=48, hidden_dim=150, vocab_size=101,
        max_position_embeddings=512,
    ),
    "even": ModelConfig(
        dim=128, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=64, hidden_dim=256, vocab_size=320,
        max_position_embeddings=512, tied_embeddings=True,
    ),
    # As in Mistral NeMo, head_dim is 128 and n_heads * head_dim is not dim.
    "nemo": ModelConfig(
        dim=160, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=128, hidden_dim=224, vocab_size=64,
        max_position_embeddings=512,
    ),
}  # fmt: skip


def model(shape: str, format: str = "fp32") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SHAPES[shape]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    if format != "fp32":
        largest = {path: 4.0 for path, _ in model.named_modules()}
        head = None if FORMATS[format].static else FORMATS[format]
        quantize_(model, FORMATS[format], largest, head)
    return model


class Requests:
    """Sequences of random tokens in shuffled pages, computed in whatever portions a test likes."""

    def __init__(
        self, config: ModelConfig, lengths: list[int], window: Window = None, kv: str = "fp32"
    ):
        random = torch.Generator().manual_seed(1)
        self.lengths, self.window, n_pages = lengths, window, -(-max(lengths) // PAGE)
        self.tokens = [torch.randint(0, config.vocab_size, (n,), generator=random) for n in lengths]
        pages = torch.randperm(n_pages * len(lengths) + 3, generator=random)
        self.table = pages[: n_pages * len(lengths)].view(len(lengths), n_pages).int()
        scale = torch.rand(config.n_layers, 2, generator=random) / 100 + 0.005
        self.pages = Pages.empty(config, len(pages), PAGE, kv, scale=scale)
        # Whatever was in a page before must not matter, not even a NaN.
        if self.pages.codes.is_floating_point():
            self.pages.codes.fill_(float("nan"))

    def step(self, step, portions: list[tuple[int, int, int]]) -> list[Tensor]:
        """Feed tokens [start, end) of sequence i, all in one step -> logits of every token."""
        places = [torch.arange(start, end) for _, start, end in portions]
        tables = [self.table[i] for i, _, _ in portions]
        sizes = [len(p) for p in places]
        slots = [t[p // PAGE] * PAGE + p % PAGE for t, p in zip(tables, places, strict=True)]
        attend = Paged(
            pages=self.pages,
            positions=torch.cat(places),
            slots=torch.cat(slots),
            cu_seqlens=torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32),
            max_seqlen=max(sizes),
            context_lens=torch.tensor([end for _, _, end in portions], dtype=torch.int32),
            page_table=torch.stack(tables),
            window=self.window,
        )
        tokens = torch.cat([self.tokens[i][start:end] for i, start, end in portions])
        return list(step(tokens, attend, torch.arange(len(tokens))).split(sizes))

    def whole(self, step) -> list[Tensor]:
        return self.step(step, [(i, 0, n) for i, n in enumerate(self.lengths)])


@pytest.mark.parametrize("format", NATIVE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, format: str, instructions: str):
    net = model(shape, format)
    native, torch_step = NativeStep(net, 2, instructions), TorchStep(net)
    found, expected = (Requests(net.config, [70, 1, 33, 16]) for _ in range(2))
    ours, theirs = found.whole(native), expected.whole(torch_step)
    more = [(0, 69, 70), (2, 20, 33), (1, 0, 1)]  # later tokens of some, once more
    ours += found.step(native, more)
    theirs += expected.step(torch_step, more)
    scale = torch.cat(theirs).abs().max()
    # Where inputs are rounded, sums in another order may round to the neighbouring code.
    tolerance = 5e-6 if FORMATS[format].inputs is None else 3e-2
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < tolerance * scale
    close = torch.cat([(a - b).abs().max(-1).values for a, b in zip(ours, theirs, strict=True)])
    assert close.median() < tolerance * scale / 4


def in_blocks(*types: str) -> Transformer:
    """A model whose matrices are in these types of blocks in turn, with random codes."""
    config = ModelConfig(
        dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=96,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    net, turn = Transformer(config).eval().requires_grad_(False), itertools.cycle(types)
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            type, shape = next(turn), tuple(module.weight.shape)
            tensors = {"weight": random_blocks(type, *shape, deviation=0.08)}
            stored = QuantizedLinear(BLOCKS[type], shape, tensors)
            if isinstance(module, nn.Embedding):
                stored = QuantizedEmbedding(BLOCKS[type], shape, tensors, torch.float32)
            replace_module(net, path, stored)
    return net


@pytest.mark.parametrize(
    "types", [("q4_k", "q6_k"), ("q4_0", "q8_0", "iq4_xs"), ("q5_k", "q3_k", "q2_k")]
)
def test_matrices_in_blocks_of_different_types_equal_the_definition(types, instructions: str):
    net = in_blocks(*types)
    native, torch_step = NativeStep(net, 2, instructions), TorchStep(net)
    found, expected = (Requests(net.config, [70, 1, 33]) for _ in range(2))
    ours, theirs = (torch.cat(r.whole(s)) for r, s in ((found, native), (expected, torch_step)))
    # A sum in another order may round an input to the neighbouring code.
    assert (ours - theirs).abs().max() < 3e-2 * theirs.abs().max()
    assert (ours - theirs).abs().median() < 5e-3 * theirs.abs().max()
    alone = Requests(net.config, [70, 1, 33])
    parts = [alone.step(native, [(0, i, i + 7)])[0] for i in range(0, 70, 7)]
    assert torch.equal(torch.cat(parts), ours[:70])


@pytest.mark.parametrize("window", [1, 20, 40])
def test_a_sliding_window_equals_the_definition(window: int, instructions: str):
    net = model("odd")
    native, torch_step = NativeStep(net, 2, instructions), TorchStep(net)
    found, expected = (Requests(net.config, [90, 7], window) for _ in range(2))
    for a, b in zip(found.whole(native), expected.whole(torch_step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SCALINGS = {
    "llama 3": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original=32)},
    "yarn": {"rope_scaling": RopeScaling(
        kind="yarn", factor=16.0, original=32, low=1.0, high=32.0, gain=1.3,
    )},
    "far queries": {"query_scaling": QueryScaling(beta=0.7, original=16)},
    "windows by layer": {"sliding_window": (None, 20)},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions_and_windows_by_layer_equal_the_definition(name: str, instructions: str):
    plain = model("odd")
    net = Transformer(replace(plain.config, **SCALINGS[name])).requires_grad_(False)
    net.load_state_dict(plain.state_dict())
    native, torch_step = NativeStep(net, 2, instructions), TorchStep(net)
    window = net.config.sliding_window
    found, expected = (Requests(net.config, [90, 7], window) for _ in range(2))
    other = Requests(plain.config, [90, 7])
    pairs = zip(
        found.whole(native), expected.whole(torch_step), other.whole(TorchStep(plain)), strict=True
    )
    for i, (a, b, unscaled) in enumerate(pairs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert i == 1 or not torch.allclose(a, unscaled, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kv", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_in_codes_equals_the_definition(shape: str, kv: str, instructions: str):
    net = model(shape)
    native, torch_step = NativeStep(net, 2, instructions), TorchStep(net)
    ours, theirs = (Requests(net.config, [70, 1, 33], kv=kv) for _ in range(2))
    logits = ours.whole(native), theirs.whole(torch_step)
    # What the first layer writes does not depend on the cache: but for a rare neighbour, where the
    # order of additions decided, it is the same codes.
    a, b = ours.pages.codes[0].view(torch.uint8), theirs.pages.codes[0].view(torch.uint8)
    assert (a == b).float().mean() > 0.998
    if kv == "int8":
        torch.testing.assert_close(ours.pages.scale, theirs.pages.scale, rtol=1e-2, atol=1e-3)
    for found, expected in zip(*logits, strict=True):
        assert (found - expected).abs().max() < 3e-2 * expected.abs().max()
        assert (found - expected).abs().median() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("format", ["fp32", "int8", "fp8"])
def test_a_row_has_the_same_bits_however_work_is_batched(
    format: str, window: int | None, kv: str, instructions: str
):
    net = model("nemo", format)
    lengths = [100, 37, 5, 64, 1, 48, 33, 96]
    alone = []
    one = NativeStep(net, 1, instructions)
    two = NativeStep(net, 2, instructions)
    for i, n in enumerate(lengths):  # each prompt alone, on one thread
        requests = Requests(net.config, lengths, window, kv)
        alone += requests.step(one, [(i, 0, n)])
    together = Requests(net.config, lengths, window, kv).whole(two)
    chunked = Requests(net.config, lengths, window, kv)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    cursor = [0] * len(lengths)
    for size in itertools.cycle([1, 7, 32, 13]):  # several prompts a step, in ragged portions
        portions = [
            (i, cursor[i], min(cursor[i] + size + i, n)) for i, n in enumerate(lengths)
            if cursor[i] < n
        ]  # fmt: skip
        if not portions:
            break
        for (i, _, end), logits in zip(portions, chunked.step(two, portions), strict=True):
            parts[i].append(logits)
            cursor[i] = end
    for a, b, c in zip(alone, together, map(torch.cat, parts), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_only_the_wanted_rows_are_computed_to_the_end(instructions: str):
    net = model("odd", "int8")
    step = NativeStep(net, 2, instructions)
    requests = Requests(net.config, [50])
    every = requests.whole(step)[0]
    positions = torch.arange(50)
    slots = requests.table[0][positions // PAGE] * PAGE + positions % PAGE
    cu_seqlens = torch.tensor([0, 50])
    for rows in ([49], [3, 40, 17], []):
        logits = step.kernel.step(
            requests.tokens[0], positions, slots, cu_seqlens, requests.table, torch.tensor(rows),
            requests.pages.codes, cpu.CpuFormat.FP32,
        )  # fmt: skip
        assert torch.equal(logits, every[rows])


def test_a_cache_in_bf16_rounds_keys_and_values_alone(instructions: str):
    net = model("even")
    rounded, exact = (Requests(net.config, [60, 20], kv=kv) for kv in ("bf16", "fp32"))
    step = NativeStep(net, 2, instructions)
    exact.whole(step)
    rounded.whole(step)
    a, b = rounded.pages.codes, exact.pages.codes
    used = ~b.isnan()
    # The first layer's keys do not depend on the cache: they are the exact ones, rounded.
    assert torch.equal(a[0][used[0]], b[0][used[0]].bfloat16())
    torch.testing.assert_close(a[used].float(), b[used], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": torch.tensor([0, 101])},
        {"tokens": torch.tensor([0, -1])},
        {"positions": torch.tensor([0, 2])},
        {"positions": torch.tensor([PAGE * 9, PAGE * 9 + 1])},
        {"slots": torch.tensor([0, 10_000])},
        {"cu_seqlens": torch.tensor([0, 3])},
        {"page_table": torch.tensor([[99]], dtype=torch.int32)},
        {"rows": torch.tensor([2])},
    ],
    ids=lambda change: "-".join(f"{k}{v.flatten().tolist()}" for k, v in change.items()),
)
def test_refuses_what_lies_outside(change: dict[str, Tensor]):
    net = model("odd")
    step = compile_step(net)
    if not isinstance(step, NativeStep):
        pytest.skip("no C++ compiler")
    arguments = {
        "tokens": torch.tensor([1, 2]),
        "positions": torch.tensor([0, 1]),
        "slots": torch.tensor([0, 1]),
        "cu_seqlens": torch.tensor([0, 2]),
        "page_table": torch.tensor([[0]], dtype=torch.int32),
        "rows": torch.tensor([1]),
        "kv_cache": torch.zeros(2, 2, 4, PAGE, 2, 48),
    }
    assert step.kernel.step(**arguments, kv_format=cpu.CpuFormat.FP32, windows=()).isfinite().all()
    with pytest.raises(ValueError, match="out of range"):
        step.kernel.step(**(arguments | change), kv_format=cpu.CpuFormat.FP32, windows=())


def test_packing_can_let_go_of_the_weights():
    net = model("even", "int8")
    before = Requests(net.config, [20]).whole(compile_step(net))[0]
    step = compile_step(net, release=True)
    if not isinstance(step, NativeStep):
        pytest.skip("no C++ compiler")
    kept = {name for name, tensor in net.state_dict().items() if tensor.numel()}
    assert {name for name in kept if "norm" not in name} == {"tok_embeddings.weight"}
    after = Requests(net.config, [20]).whole(step)[0]
    assert torch.equal(after, before)
