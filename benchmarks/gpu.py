"""A 12B model on one NVIDIA GPU: steps of Mistral NeMo's exact shape, with random weights.

    python benchmarks/gpu.py [--formats bf16 fp8 q4_k] [--rounds N] [--no-peer] [--quick]
                             [--json FILE]

Real weights would take the same time as random ones, so random ones are made on the card. A case is
a step that decodes 1, 8, 32 or 128 sequences with 1,024 tokens behind each, one over a prompt of
2,048, and one that decodes behind 131,071 tokens in an FP8 cache. It is measured against what the
card allows, and against transformers (bf16, SDPA, its default cache) on the very same weights in
the same run. No program can be faster than the roofline: the bytes that a step must read over the
bandwidth, or its products over the tensor cores' rate, whichever is more, both measured here. Cases
that do not fit the card are left out and named. Without a GPU only `--toy` runs: a tiny model in
Triton's interpreter (TRITON_INTERPRET=1) shows that all of this works.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import torch
from measure import Row, gpu_options, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from opennemo.model.attention import Paged
from opennemo.model.checkpoint import empty_model
from opennemo.model.formats import BLOCKS, FORMATS
from opennemo.model.fused_attention import FUSED_PAGE_SIZE
from opennemo.model.layouts import spell
from opennemo.model.pages import Pages
from opennemo.model.quantization import QuantizedLinear, quantize_, replace_module
from opennemo.model.step import Step, compile_step
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer


class Case(NamedTuple):
    name: str
    sequences: int
    context: int  # tokens each sequence has behind it
    tokens: int = 1  # new ones of each, in one step
    kv: str = "bf16"
    formats: tuple[str, ...] = ("bf16", "fp8", "q4_k")


CASES = [
    *(Case(f"decode {n}", n, 1024) for n in (1, 8, 32, 128)),
    Case("prefill 2048", 1, 0, 2048),
    Case("decode 1 at 128k, fp8 KV", 1, 131_071, kv="fp8", formats=("fp8",)),
]
QUICK = ("decode 1", "decode 32", "prefill 2048", "decode 1 at 128k, fp8 KV")
TOY = ModelConfig(
    dim=256, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=256, vocab_size=320,
    max_position_embeddings=1024,
)  # fmt: skip
GOALS = {"decode 1": 0.85}  # of the roofline
TO_BF16 = {"fp8": 1.7, "q4_k": 2.5}  # times bf16, decoding one sequence
# Where float16 scales lie in a block, which random bytes must not make huge.
SCALES = {"q4_k": slice(0, 4), "q6_k": slice(208, 210)}


class Card(NamedTuple):
    """The measured speed of a device."""

    bandwidth: float  # bytes a second, read
    products: dict[str, float]  # floating point operations a second, by format


# ---- ours ---------------------------------------------------------------------------------------


def random_model(config: ModelConfig, device: str) -> Transformer:
    """In bf16; activations keep a reasonable size through all layers."""
    net = empty_model(config)
    for name, shape in {n: p.shape for n, p in net.named_parameters()}.items():
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        weight.fill_(1) if len(shape) == 1 else weight.normal_(std=shape[1] ** -0.5)
        path, _, kind = name.rpartition(".")
        parameter = nn.Parameter(weight, requires_grad=False)
        net.get_submodule(path).register_parameter(kind, parameter)
    return net


def put_in_blocks_(net: Transformer) -> None:
    """Random codes for weights: matrices in Q4_K and the head in Q6_K, as in files of Q4_K_M."""
    linears = [
        name for name, m in net.named_modules() if isinstance(m, (nn.Linear, QuantizedLinear))
    ]
    for name in linears:
        type, old = "q6_k" if name == "output" else "q4_k", net.get_submodule(name)
        assert isinstance(old, nn.Linear | QuantizedLinear)
        shape, device = (old.out_features, old.in_features), net.norm.weight.device
        size = BLOCKS[type].weights.row_bytes(old.in_features)
        rows = torch.randint(0, 256, (shape[0], int(size)), dtype=torch.uint8, device=device)
        n_bytes = int(BLOCKS[type].weights.row_bytes(256))
        scales = rows.view(shape[0], -1, n_bytes)[:, :, SCALES[type]].view(torch.float16)
        scales.fill_(shape[1] ** -0.5 / 256)
        replace_module(net, name, QuantizedLinear(BLOCKS[type], shape, {"weight": rows}))


def inputs_of(case: Case, config: ModelConfig, device: str) -> tuple[Tensor, Paged, Tensor]:
    """Random tokens, in shuffled pages of a cache full of numbers; the last page is unused."""
    length, page = case.context + case.tokens, FUSED_PAGE_SIZE
    n_pages = -(-length // page)
    table = torch.randperm(case.sequences * n_pages).view(case.sequences, n_pages)
    place = torch.arange(case.context, length)
    slots = table[:, place // page] * page + place % page
    scale = torch.full((config.n_layers, 2), 0.01)
    pages = Pages.empty(config, table.numel() + 1, page, case.kv, device, scale)
    if case.kv == "fp8":  # bytes below those of NaN
        pages.codes.view(torch.uint8).random_(0, 120)
    else:
        pages.codes.normal_()
    lengths = torch.full((case.sequences,), length, dtype=torch.int32)
    attend = Paged(
        pages=pages,
        positions=place.int().repeat(case.sequences).to(device),
        slots=slots.flatten().to(device),
        cu_seqlens=(torch.arange(case.sequences + 1) * case.tokens).int().to(device),
        max_seqlen=case.tokens,
        context_lens=lengths.to(device),
        page_table=table.int().to(device),
    )
    tokens = torch.randint(0, config.vocab_size, (case.sequences * case.tokens,))
    rows = torch.arange(1, case.sequences + 1) * case.tokens - 1
    return tokens.to(device), attend, rows.to(device)


# ---- the peer and the card ----------------------------------------------------------------------


def transformers(net: Transformer) -> nn.Module:
    """The model of transformers over the same weights; rotary halves would only permute them."""
    from transformers import MistralConfig, MistralForCausalLM

    config = net.config
    peer_config = MistralConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, head_dim=config.head_dim,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim, vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        peer = MistralForCausalLM(peer_config).eval()
    weights = {spell(name, "hf"): weight for name, weight in net.state_dict().items()}
    peer.load_state_dict(weights, strict=not config.tied_embeddings, assign=True)
    # Its angles are computed when it is made, which on the meta device they were not.
    rotary = type(peer.model.rotary_emb)(peer_config)
    peer.model.rotary_emb = rotary.to(net.norm.weight.device)
    return peer


def peer_step(peer: nn.Module, case: Case, config: ModelConfig) -> Callable[[], Tensor]:
    """One step of the peer's, behind a cache of random numbers in bf16."""
    from transformers import DynamicCache

    device = next(peer.parameters()).device
    cache = DynamicCache() if case.context else None
    for layer in range(config.n_layers if cache is not None else 0):
        shape = (case.sequences, config.n_kv_heads, case.context, config.head_dim)
        k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        assert cache is not None
        cache.update(k, v, layer)
    new = torch.randint(0, config.vocab_size, (case.sequences, case.tokens), device=device)

    @torch.inference_mode()
    def run() -> Tensor:
        logits = peer(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if cache is not None:
            cache.crop(-case.tokens)
        return logits

    return run


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median time of a step and the wait for its end, after a warm-up."""
    times, first = [], 3 if torch.cuda.is_available() else 0  # at toy size nothing is warmed up
    for _ in range(rounds + first):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[first:])


def measure_card(device: str, size: int = 8192, n_bytes: int = 1 << 32) -> Card:
    """The speed of large reads (or copies, if they are faster) and of square products."""
    from opennemo.kernels.gpu import multiplies_fp8

    block = torch.ones(n_bytes // 4, device=device)
    bandwidth = max(n_bytes / seconds(block.sum, 10), 2 * n_bytes / seconds(block.clone, 10))
    del block
    a = torch.randn(size, size, device=device).bfloat16()
    products = {"bf16": 2 * size**3 / seconds(lambda: a @ a.t(), 10)}
    if multiplies_fp8(torch.device(device)):
        codes, scale = a.to(torch.float8_e4m3fn), torch.ones(size, 1, device=device)
        by_row = ScalingType.RowWise
        product = lambda: scaled_mm(  # noqa: E731
            codes, codes.t(), scale, by_row, scale.t(), by_row, use_fast_accum=True
        )
        products["fp8"] = 2 * size**3 / seconds(product, 10)
    return Card(bandwidth, products)


def roofline(net: Transformer, case: Case, format: str, card: Card) -> float:
    """The least seconds that a step can take."""
    config, state = net.config, net.state_dict()
    read = sum(t.nbytes for name, t in state.items() if "tok_embeddings" not in name)
    kv_bytes = {"bf16": 2, "fp8": 1}[case.kv]
    width = config.n_kv_heads * config.head_dim
    read += 2 * config.n_layers * width * kv_bytes * case.sequences * case.context
    in_blocks = sum(
        linear.out_features * linear.in_features
        for linear in net.layers.modules()
        if isinstance(linear, (nn.Linear, QuantizedLinear))
    )
    n_new = case.sequences * case.tokens
    # A new token sees all before the step, and half of the step's own.
    seen = n_new * (case.context + (case.tokens + 1) / 2)
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * seen
    head = 2 * case.sequences * config.vocab_size * config.dim
    compute = 2 * in_blocks * n_new / card.products.get(format, card.products["bf16"])
    compute += (attention + head) / card.products["bf16"]
    return max(read / card.bandwidth, compute)


# ---- measurements -------------------------------------------------------------------------------


def measure(
    net: Transformer, format: str, cases: list[Case], card: Card, peers: dict[str, float],
    rounds: int, device: str,
) -> list[Row]:  # fmt: skip
    """Every case in one format; `peers` are the peer's tokens a second by case."""
    rows, step = [], compiled(net)
    for case in cases:
        if format not in case.formats:
            continue
        n = case.sequences * case.tokens
        ours = fitting(
            f"{format}, {case.name}", lambda c=case: our_seconds(step, net, c, rounds, device)
        )
        if ours is None:
            continue
        least = roofline(net, case, format, card)
        found = [("roofline", n / least, GOALS.get(case.name))]
        if case.name in peers:
            found.append(("transformers bf16", peers[case.name], None))
        for peer_name, peer, goal in found:
            name = f"{format}, {case.name}, to {peer_name}"
            rows.append(
                Row(
                    name=name, ours=n / ours, peer=peer, peer_name=peer_name,
                    ratio=n / ours / peer, goal=goal,
                )
            )  # fmt: skip
            print(f"  {name}: {rows[-1].ratio:.2f}", file=sys.stderr)
    return rows


def compiled(net: Transformer) -> Step:
    if net.norm.weight.is_cuda:
        return compile_step(net)
    from opennemo.model.gpu_step import GpuStep

    return GpuStep(net)


def our_seconds(step: Step, net: Transformer, case: Case, rounds: int, device: str) -> float:
    inputs = inputs_of(case, net.config, device)
    return seconds(lambda: step(*inputs), rounds)


def peer_speeds(net: Transformer, cases: list[Case], rounds: int) -> dict[str, float]:
    """Tokens a second of transformers, by case."""
    peer, speeds = transformers(net), {}
    for case in cases:
        run = lambda c=case: seconds(peer_step(peer, c, net.config), rounds)  # noqa: E731
        if (taken := fitting(f"transformers, {case.name}", run)) is not None:
            speeds[case.name] = case.sequences * case.tokens / taken
    return speeds


def fitting(name: str, run: Callable[[], float]) -> float | None:
    """The result of `run`, or None if the card's memory is too small for it."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        print(f"  {name}: left out, it does not fit this card", file=sys.stderr)
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def to_bf16(rows: list[Row]) -> list[Row]:
    """How much faster other formats decode one sequence than bf16."""
    ours = {row.name: row.ours for row in rows}
    slow, found = ours.get("bf16, decode 1, to roofline"), []
    for format, goal in TO_BF16.items():
        if (fast := ours.get(f"{format}, decode 1, to roofline")) and slow:
            name = f"{format}, decode 1, to bf16"
            found.append(
                Row(
                    name=name, ours=fast, peer=slow, peer_name="bf16 here", ratio=fast / slow,
                    goal=goal,
                )
            )  # fmt: skip
    return found


def show(title: str, rows: list[Row]) -> None:
    table = Table("case", "ours", "peer", "", "ratio", "goal", title=title)
    for row in rows:
        goal = f"{row.goal:.2f}" if row.goal else ""
        table.add_row(
            row.name, f"{row.ours:.1f}", f"{row.peer:.1f}", row.unit, f"{row.ratio:.2f}", goal
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    formats = ["bf16", "fp8", "q4_k"]  # the others are made of bf16, or of random codes
    parser.add_argument("--formats", nargs="+", default=formats, choices=formats)
    parser.add_argument("--rounds", type=int, default=20, help="steps that a median is taken of")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--quick", action="store_true", help="fewer cases, 5 rounds, no peer")
    if (options := gpu_options(parser)) is None:
        return
    device, config, cases = "cuda", PRESETS["mistral-nemo-12b"], CASES
    rounds, peer, room = options.rounds, not options.no_peer, {}
    if options.quick:
        cases, rounds, peer = [c for c in CASES if c.name in QUICK], 5, False
    if options.toy:
        device, config, rounds, peer = "cpu", TOY, 1, False
        cases = [
            c._replace(
                sequences=min(c.sequences, 2), context=min(c.context, 9), tokens=min(c.tokens, 9)
            )
            for c in cases
        ]
        room = {"size": 64, "n_bytes": 1 << 20}
    card = measure_card(device, **room)
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {f}" for f, rate in card.products.items())
    name = "a CPU, at toy size" if options.toy else torch.cuda.get_device_name()
    title = f"{name}, {datetime.now(UTC):%Y-%m-%d}: {card.bandwidth / 1e9:.0f} GB/s, {rates}"
    print(title, file=sys.stderr)
    net, rows = random_model(config, device), []
    if options.toy:  # the interpreter has no products in bf16
        net.float()
    peers = peer_speeds(net, cases, rounds) if peer else {}
    for format in (f for f in formats if f in options.formats):
        if format == "fp8":
            quantize_(net, FORMATS["fp8"])
        if format == "q4_k":
            put_in_blocks_(net)
        rows += measure(net, format, cases, card, peers, rounds, device)
        write_rows(rows, options.json)  # the rows so far are kept if the time is up
    rows += to_bf16(rows)
    show(title, rows)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
