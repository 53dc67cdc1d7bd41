"""A 12B model on one NVIDIA GPU: steps of Mistral NeMo's exact shape, with random weights.

    python benchmarks/gpu.py [--formats bf16 fp8] [--rounds N] [--no-peer] [--json FILE]

Real weights would take no other time than random ones, so they are made on the card. A case is a
step that decodes 1, 8, 32 or 128 sequences with 1,024 tokens behind each, one over a prompt of
2,048, and one that decodes behind 131,071 tokens in an FP8 cache. It is measured against what the
card allows, and against transformers (bf16, SDPA, its default cache) on the very same weights in
the same run. No program can be faster than the roofline: the bytes that a step must read over the
bandwidth, or its products over the tensor cores' rate, whichever is more, both measured here.
What does not fit the card is left out and named. Without a GPU there is nothing to do.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from opennemo.model.attention import FUSED_PAGE_SIZE, Paged
from opennemo.model.checkpoint import empty_model
from opennemo.model.formats import FORMATS
from opennemo.model.layouts import spell
from opennemo.model.pages import Pages
from opennemo.model.quantization import quantize_
from opennemo.model.step import Step, compile_step
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer


class Case(NamedTuple):
    name: str
    sequences: int
    context: int  # tokens each sequence has behind it
    tokens: int = 1  # new ones of each, in one step
    kv: str = "bf16"
    formats: tuple[str, ...] = ("bf16", "fp8")


CASES = [
    *(Case(f"decode {n}", n, 1024) for n in (1, 8, 32, 128)),
    Case("prefill 2048", 1, 0, 2048),
    Case("decode 1 at 128k, fp8 KV", 1, 131_071, kv="fp8", formats=("fp8",)),
]
GOALS = {"decode 1": 0.85}  # of the roofline
FP8_GOAL = 1.7  # times bf16, decoding one sequence


class Card(NamedTuple):
    """What a device was measured to do."""

    bandwidth: float  # bytes a second, read
    products: dict[str, float]  # floating point operations a second, by format


# ---- ours ---------------------------------------------------------------------------------------


def random_model(config: ModelConfig, device: str) -> Transformer:
    """In bf16; activations keep a sane size through all layers."""
    net = empty_model(config)
    for name, shape in {n: p.shape for n, p in net.named_parameters()}.items():
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        weight.fill_(1) if len(shape) == 1 else weight.normal_(std=shape[1] ** -0.5)
        path, _, kind = name.rpartition(".")
        parameter = nn.Parameter(weight, requires_grad=False)
        net.get_submodule(path).register_parameter(kind, parameter)
    return net


def inputs_of(case: Case, config: ModelConfig, device: str) -> tuple[Tensor, Paged, Tensor]:
    """Random tokens, in shuffled pages of a cache that is full of numbers; the last is nobody's."""
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
    """Of a step and the wait for its end, the median; what runs only once is done before."""
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measure_card(device: str, size: int = 8192, n_bytes: int = 1 << 32) -> Card:
    """What large reads (or copies, if they are better) and square products reach."""
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
        t.numel()
        for name, t in state.items()
        if name.startswith("layers") and name.endswith("weight")
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
    rows, step = [], compile_step(net)
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
    """What `run` gives, or None if the card's memory is too small for it."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        print(f"  {name}: left out, it does not fit this card", file=sys.stderr)
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def fp8_to_bf16(rows: list[Row]) -> list[Row]:
    """How much faster FP8 decodes one sequence than bf16."""
    ours = {row.name: row.ours for row in rows}
    fast, slow = (ours.get(f"{format}, decode 1, to roofline") for format in ("fp8", "bf16"))
    if not fast or not slow:
        return []
    return [
        Row(
            name="fp8, decode 1, to bf16", ours=fast, peer=slow, peer_name="bf16 here",
            ratio=fast / slow, goal=FP8_GOAL,
        )
    ]  # fmt: skip


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
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--rounds", type=int, default=20, help="steps that a median is taken of")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU, and there is none here")
        return
    device, config = "cuda", PRESETS["mistral-nemo-12b"]
    card = measure_card(device)
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {f}" for f, rate in card.products.items())
    title = f"{torch.cuda.get_device_name()}, {datetime.now(UTC):%Y-%m-%d}: "
    title += f"{card.bandwidth / 1e9:.0f} GB/s, {rates}"
    print(title, file=sys.stderr)
    net, rows = random_model(config, device), []
    peers = {} if options.no_peer else peer_speeds(net, CASES, options.rounds)
    for format in sorted(options.formats):  # bf16 before FP8, which is made of it
        if format == "fp8":
            quantize_(net, FORMATS["fp8"])
        rows += measure(net, format, CASES, card, peers, options.rounds, device)
    rows += fp8_to_bf16(rows)
    show(title, rows)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
