"""GGUF files: every quantisation dequantised, and no forged file that does harm."""

import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from opennemo.errors import CheckpointError
from opennemo.model import layouts, memory
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import Form, load, open_checkpoint
from opennemo.model.companions import read_generation_config
from opennemo.model.formats import BLOCKS
from opennemo.model.gguf import CHUNK, FORMATS, GGUF, PLAIN, RARE
from opennemo.model.memory import STORED, Needs, automatic, forms
from opennemo.model.quantization import QuantizedEmbedding, QuantizedLinear
from opennemo.model.transformer import ModelConfig, Transformer

# Rows of 256, the largest block; head_dim apart from dim / n_heads, as in Mistral NeMo.
CONFIG = ModelConfig(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128, hidden_dim=512,
    vocab_size=300, rope_theta=5e5, max_position_embeddings=1024,
)  # fmt: skip


def write(path: Path, config: ModelConfig, type: Type = Type.F32, **fields: Any) -> Transformer:
    """A random model as llama.cpp's converter would write it; returns what it holds."""
    torch.manual_seed(0)
    model = Transformer(config).requires_grad_(False)
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"é{i}" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    for key, value in fields.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    for name, weight in model.named_parameters():
        kind = type if weight.dim() == 2 else Type.F32  # llama.cpp keeps norms in float32
        if kind not in (*PLAIN, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0):
            data = random_blocks(weight.shape, kind)  # the package can read them, not write them
        else:
            data = gguf.quantize(weight.numpy(), kind)
        weight.copy_(torch.from_numpy(gguf.dequantize(data, kind)))
        writer.add_tensor(layouts.spell(name, "gguf"), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def random_blocks(shape: torch.Size, type: Type) -> np.ndarray:
    """Random codes, with scales (float16, first or last in a block) that are ordinary numbers."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[type]
    rng = np.random.default_rng(shape[0])
    blocks = rng.integers(256, size=(shape[0], shape[1] // block, n_bytes), dtype=np.uint8)
    scale = np.float16(0.01).view(np.uint16)
    at = {
        Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q6_K: [208], Type.TQ1_0: [52],
        Type.TQ2_0: [64], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.IQ1_M: [],
    }.get(type, [0])  # fmt: skip
    for i in at:
        blocks[..., i : i + 2] = np.array([scale & 255, scale >> 8], np.uint8)
    if type == Type.IQ1_M:  # the scale's four parts are the upper halves of four numbers
        for i in range(4):
            upper = blocks[..., 49 + 2 * i]
            upper[...] = upper & 15 | (int(scale) >> 4 * i & 15) << 4
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("type", [*PLAIN, *FORMATS, *RARE], ids=lambda type: type.name)
def test_every_kind_of_numbers(type, tmp_path):
    expected = write(tmp_path / "model.gguf", CONFIG, type)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tmp_path / "model.gguf", dtype=dtype)
        assert model.config == CONFIG
        for (name, mine), theirs in zip(
            model.named_parameters(), expected.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs.to(dtype)), name
    as_stored = load(tmp_path / "model.gguf").tok_embeddings.weight.dtype
    assert as_stored == PLAIN.get(type, torch.float32)


def test_more_weights_than_are_dequantised_at_a_time(tmp_path):
    weight = np.random.default_rng(0).normal(size=(CHUNK // 256 * 5 + 3, 256))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    codes = gguf.quantize(weight.astype(np.float32), Type.Q8_0)
    writer.add_tensor("weight", codes, raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUF(tmp_path / "model.gguf").read("weight", torch.float32)
    assert np.array_equal(read.numpy(), gguf.dequantize(codes, Type.Q8_0))


def test_tied_embeddings_and_generation(tmp_path):
    write(tmp_path / "model.gguf", replace(CONFIG, tied_embeddings=True))
    model = load(tmp_path / "model.gguf")
    assert model.config.tied_embeddings and model.output.weight is model.tok_embeddings.weight
    assert read_generation_config(tmp_path / "model.gguf") == {"eos_token_ids": [2]}


def test_channels_are_in_mistral_s_order(tmp_path):
    """transformers, which reorders the rows for a RoPE of its own, has the same logits."""
    expected = write(tmp_path / "model.gguf", CONFIG)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    tokens = torch.arange(50) * 7 % CONFIG.vocab_size
    with torch.no_grad():
        logits = expected.output(expected(tokens, Packed.of(50)))
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "gemma2", "general.architecture = 'gemma2'.*supported: llama"),
        ("llama.expert_count", 8, "llama.expert_count = 8"),
        ("llama.rope.scaling.type", "longrope", "type = 'longrope'.*: none or linear or yarn"),
        ("llama.rope.dimension_count", 64, "rope.dimension_count = 64.*: 128"),
        ("llama.rope.scaling.yarn_ext_factor", 2, "yarn_ext_factor = 2"),
        ("llama.attention.clamp_kqv", 8, "llama.attention.clamp_kqv = 8"),
        ("split.count", 4, "part None .* of 4: files of a split model are named"),
        ("llama.attention.sliding_window", 2**31, "sliding_window is 2147483648, not"),
        ("general.alignment", 3, "aligned to 3"),
    ],
)
def test_files_that_are_another_model(field, value, message, tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CONFIG, **{field: value})
    assert_refused(path, message)


def test_a_rope_of_somebody_s_own(tmp_path):
    path = tmp_path / "model.gguf"
    fields: dict[str, Any] = {"llama.vocab_size": 300}
    write(path, CONFIG, **fields)
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight", b"rope_freqs.weight"))
    assert_refused(path, "rope_freqs.weight = .*: those of Llama 3")


@pytest.mark.parametrize("number", [Type.Q8_K, Type.I32, 4242])
def test_a_type_that_is_not_supported_is_not_called_damage(number, tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CONFIG)
    at = path.read_bytes().index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    data = bytearray(path.read_bytes())
    data[at : at + 4] = struct.pack("<I", number)
    path.write_bytes(data)
    name = number.name if isinstance(number, Type) else "type 4242"
    with pytest.raises(CheckpointError, match=f"embd.weight' is in {name}; supported: F32") as e:
        load(path)
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize("type", FORMATS, ids=lambda type: type.name)
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_stay_as_they_are_in_the_file(type, tied, tmp_path):
    path = tmp_path / "model.gguf"
    expected = write(path, replace(CONFIG, tied_embeddings=tied), type)
    codes = load(path, form=Form(blocks=True))
    assert [name for name, p in codes.named_parameters() if p.dim() > 1] == []
    mapped = GGUF(path).read_codes("token_embd.weight")
    embedding, head = codes.get_submodule("tok_embeddings"), codes.get_submodule("output")
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert embedding.format is BLOCKS[FORMATS[type]]
    assert torch.equal(embedding.tensors["weight"], mapped)
    same = embedding.tensors["weight"].data_ptr() == head.tensors["weight"].data_ptr()
    assert same == tied
    for path, module in codes.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = expected.get_parameter(f"{path}.weight")
            assert torch.equal(module.dequantize(torch.float32), weight)
    tokens = torch.arange(50) * 7 % CONFIG.vocab_size
    assert torch.equal(embedding(tokens), expected.tok_embeddings(tokens))
    assert torch.isfinite(codes.output(codes(tokens, Packed.of(50)))).all()


@pytest.mark.parametrize("type", RARE, ids=lambda type: type.name)
def test_rarer_types_are_rounded_to_eight_bits_and_say_so(type, tmp_path):
    expected = write(tmp_path / "model.gguf", replace(CONFIG, n_layers=1), type)
    with pytest.warns(UserWarning, match=f"in {type.name} are rounded to q8_0"):
        codes = load(tmp_path / "model.gguf", form=Form(blocks=True))
    for path, module in codes.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.format is BLOCKS["q8_0"]
            weight = expected.get_parameter(f"{path}.weight")
            error = (module.dequantize(torch.float32) - weight).square().sum()
            groups = weight.unflatten(-1, (-1, 32))
            step = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
            nearest = (groups / step).round().clamp(-127, 127) * step
            assert error <= 1.001 * (groups - nearest).square().sum()


def test_a_gpu_keeps_the_blocks_that_its_kernels_unpack(tmp_path, monkeypatch):
    for type in (Type.Q4_K, Type.Q2_K):
        write(tmp_path / f"{type.name}.gguf", CONFIG, type)
    served, other = (open_checkpoint(tmp_path / f"{n}.gguf") for n in ("Q4_K", "Q2_K"))
    monkeypatch.setattr(memory, "find_spec", lambda name: None)  # without Triton nothing unpacks
    assert STORED not in forms(served, "cuda")
    monkeypatch.setattr(memory, "find_spec", lambda name: object())
    assert STORED not in forms(other, "cuda") and STORED in forms(other, "cpu")
    made = forms(served, "cuda")
    assert automatic(made, "cuda")[0] == STORED and made[STORED].dtype == torch.bfloat16
    n_weights = sum(w.numel() for w in Transformer(CONFIG).parameters() if w.dim() == 2)
    norms = 2 * (2 * CONFIG.n_layers + 1) * CONFIG.dim
    assert Needs.of(served, made[STORED], "cuda").weights == n_weights * 144 // 256 + norms


def split(path: Path, n: int) -> list[Path]:
    """The file in n parts, as llama.cpp's gguf-split makes them."""
    reader = gguf.GGUFReader(path)
    paths = [path.with_name(f"parted-{i + 1:05}-of-{n:05}.gguf") for i in range(n)]
    for i, part in enumerate(paths):
        writer = gguf.GGUFWriter(part, "llama")
        for field in reader.fields.values() if i == 0 else []:
            if not field.name.startswith(("GGUF.", "general.architecture")):
                value, kind = field.contents(), field.types[0]
                sub = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, value, kind, sub)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", n)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[i::n]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model_opens_by_any_of_its_names(tmp_path):
    expected = write(tmp_path / "model.gguf", CONFIG, Type.Q4_1)
    paths = split(tmp_path / "model.gguf", 3)
    for path in paths:
        model = load(path)
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert read_generation_config(path) == {"eos_token_ids": [2]}
    paths[1].rename(tmp_path / "elsewhere.gguf")
    assert_refused_at(paths[2], "parted-00002-of-00003.gguf is missing")
    assert_refused_at(tmp_path / "elsewhere.gguf", "says that it is part 1 .* of 3")
    paths[2].rename(paths[1])
    assert_refused_at(paths[0], "says that it is part 2")


def assert_refused_at(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        HEAD + struct.pack("<QQ", 0, 2**64 - 1),
        HEAD + struct.pack("<QQ", 2**64 - 1, 0),
        HEAD + struct.pack("<QQQ", 0, 1, 2**63),
        HEAD + struct.pack("<QQQcIIQ", 0, 1, 1, b"k", 9, 0, 2**63),
        HEAD + struct.pack("<QQQcIIQ", 0, 1, 1, b"k", 9, 99, 1) + bytes(100),
        HEAD + struct.pack("<QQQcI", 0, 1, 1, b"k", 99),
        HEAD + struct.pack("<QQQcI", 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 2) * 10**5,
    ],
)
def test_files_that_are_not_gguf(content, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_refused(path, "damaged, or not GGUF")


def test_a_truncated_file_names_the_tensor(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CONFIG)
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(path, r"'output.weight' would be at byte .*: truncated")


def test_no_forged_header_escapes(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, replace(CONFIG, n_layers=1), Type.Q4_0)
    original = path.read_bytes()
    end = original.index(b"output.weight") + 60
    rng = random.Random(0)
    n_refused = 0
    for _ in range(600):
        data = bytearray(original)
        at = rng.randrange(end)
        match rng.randrange(4):
            case 0:
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(end)] = rng.randrange(256)
            case 1:
                forged = rng.choice([0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
                data[at : at + 8] = forged.to_bytes(8, "little")
            case 2:
                del data[rng.randrange(len(data)) :]
            case 3:
                del data[at : at + rng.randint(1, 16)]
        path.write_bytes(data)
        try:
            load(path)
        except CheckpointError as error:
            n_refused += 1
            assert "\n" not in str(error)
    assert n_refused > 300
