"""Compile the GPU kernels as Mistral NeMo needs them for a compute capability, without a card.

    python tests/kernels/compile_kernels.py 90

Also checks that attention loads ahead and uses tensor cores, on which its speed depends, and that
every kernel fits the memory that a multiprocessor shares.
"""

import sys
from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from opennemo.kernels import gpu, packed_weights, paged_attention, paged_prefill

CAPABILITY = int(sys.argv[1])
# Bytes that one program may share: the CUDA programming guide's table of compute capabilities.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
CACHES = {"*bf16": 0, "*fp8e4nv": 1, "*i8": 2}  # as the kernels count them


def build(kernel: Any, warps: int, constants: dict, stages: Any = 3, **kinds: str) -> Any:
    """`kinds` are those of the arguments that are not constants, in Triton's words."""
    signature = {
        name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", CAPABILITY, 32)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=target, options=options)
    assert built.metadata.shared <= 1024 * SHARED[CAPABILITY], kernel
    return built


def attention(kv: str, scales: int, window: int) -> None:
    constants: dict = {
        "WINDOW": window, "PAGE_SIZE": 256, "KV_HEADS": 8, "GROUP": 4, "ROWS": 16,
        "BLOCK": paged_attention.BLOCK, "SCALES": scales, "HEAD_DIM": 128, "WIDTH": 128,
        "SPLITS": paged_attention.SPLITS,
    }  # fmt: skip
    if not scales:
        constants |= {"k_scale": None, "v_scale": None}
    built = build(
        paged_attention._attend, 4, constants, q="*bf16", k_pages=kv, v_pages=kv, k_scale="*fp32",
        v_scale="*fp32", page_table="*i32", context_lens="*i32", parts="*fp32", weights="*fp32",
        table_stride="i32", log2_scale="fp32",
    )  # fmt: skip
    assert "cp.async" in built.asm["ptx"], "keys and values are not loaded ahead"
    assert "mma" in built.asm["ptx"], "the tensor cores are not used"


def prefill(kv: str, scales: int, window: int, dtype: str = "*bf16") -> None:
    constants: dict = {
        "WINDOW": window, "PAGE_SIZE": 16, "KV_HEADS": 8, "GROUP": 4, "ROWS": paged_prefill.ROWS,
        "BLOCK": paged_prefill.BLOCK // (2 if dtype == "*fp32" else 1), "SCALES": scales,
        "HEAD_DIM": 128, "WIDTH": 128,
    }  # fmt: skip
    if not scales:
        constants |= {"k_scale": None, "v_scale": None}
    built = build(
        paged_prefill._prefill, 4, constants, 2, q=dtype, k_pages=kv, v_pages=kv, k_scale="*fp32",
        v_scale="*fp32", page_table="*i32", context_lens="*i32", cu_seqlens="*i32", out=dtype,
        table_stride="i32", log2_scale="fp32",
    )  # fmt: skip
    if dtype == "*bf16":
        assert "cp.async" in built.asm["ptx"], "keys and values are not loaded ahead"
        assert "mma" in built.asm["ptx"], "the tensor cores are not used"


def packed(type: str) -> None:
    kind = packed_weights.PACKINGS[type]
    constants: dict = {
        "TYPE": type, "BYTES": kind.n_bytes, "SIZE": kind.size, "OUT": packed_weights.ROWS_OUT,
    }  # fmt: skip
    if not type.startswith("int"):
        constants["scales"] = None
    sizes = dict.fromkeys(("row_bytes", "D", "n_scales", "O", "n_tokens", "n_rows"), "i32")
    common = {"data": "*u8", "scales": "*fp32", "out": "*bf16", **sizes}
    for tokens in (16, packed_weights.FEW) if type == "q4_k" else (16,):
        built = build(
            packed_weights._multiply, 4,
            constants | {"ROUNDS": type != "int4", "TOKENS": tokens}, 2, x="*bf16", **common,
        )  # fmt: skip
        assert "mma" in built.asm["ptx"], "the tensor cores are not used"
    for indices in ({}, {"indices": None}) if type == "q4_k" else ({"indices": None},):
        build(packed_weights._unpack, 4, constants | indices, indices="*i32", **common)


def rows(out: str, own_scale: bool, power: bool = True) -> None:
    constants: dict = {"DTYPE": tl.bfloat16, "POWER": power}
    if out == "*bf16":
        constants["scales"] = None
    if own_scale:
        constants["given"] = None
    common = {"out": out, "scales": "*fp32", "given": "*fp32"}
    for update in ({}, {"update": None}):
        build(
            gpu._norm, 16, constants | {"D": 5120, "SIZE": 8192} | update,
            x="*bf16", update="*bf16", gains="*bf16", eps="fp32", **common,
        )  # fmt: skip
    build(gpu._swiglu, 16, constants | {"D": 14336, "SIZE": 16384}, gate_up="*bf16", **common)
    build(gpu._round, 8, constants | {"D": 4096, "SIZE": 4096}, x="*bf16", **common)


def main() -> None:
    fp8 = CAPABILITY >= 89  # below, Triton has no E4M3; model/gpu.py takes the definition there
    for kv, scales in CACHES.items():
        if kv == "*fp8e4nv" and not fp8:
            continue
        attention(kv, scales, 0)
        prefill(kv, scales, 4096)
        constants: dict = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "WIDTH": 64, "CACHE": scales}
        build(
            gpu._rotate_and_write, 1, constants | ({} if scales else {"scale": None}),
            qkv="*bf16", rope="*fp32", q="*bf16", codes=kv, scale="*fp32", slots="*i64",
            slots_in_pool="i32",
        )  # fmt: skip
    attention("*bf16", 0, 4096)
    prefill("*bf16", 0, 0)
    prefill("*fp32", 0, 0, "*fp32")
    # Types differ in how bits are laid out, not in what a card must be able to do.
    for type in packed_weights.PACKINGS if CAPABILITY == 90 else ("q4_k", "q6_k", "int4"):
        packed(type)
    build(packed_weights._round_groups, 4, {}, x="*bf16", out="*bf16", D="i32")
    build(
        paged_attention._combine, 4,
        {"WINDOW": 0, "HEADS": 32, "HEAD_DIM": 128, "WIDTH": 128, "SPLITS": paged_attention.SPLITS},
        parts="*fp32", weights="*fp32", context_lens="*i32", out="*bf16",
    )  # fmt: skip
    rows("*bf16", own_scale=True)
    if fp8:
        rows("*fp8e4nv", own_scale=True)
        rows("*fp8e4nv", own_scale=True, power=False)
        rows("*fp8e4nv", own_scale=False)
    print(f"compiled for {CAPABILITY}")


if __name__ == "__main__":
    main()
