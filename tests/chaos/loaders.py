"""Good files of every kind that the package reads, and what opens each."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch

from opennemo.batch.lines import LineError, parse
from opennemo.data.vocabulary import make_settings
from opennemo.model import layouts
from opennemo.model.checkpoint import load, save
from opennemo.model.companions import read_generation_config
from opennemo.model.export import quantize
from opennemo.model.lora import add_lora_, load_adapter, save_adapter
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.serve.auth import KeyLimits, read_clients
from opennemo.serve.settings import read_settings
from opennemo.tokenizer.chat import encode_chat
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.checkpoints import Checkpoints
from opennemo.train.config import read_recipe
from opennemo.train.conversations import read_examples, read_pairs
from opennemo.train.corpus import Corpus, ShardWriter, describe_tokenizer

SHAPE = replace(PRESETS["tiny"], dim=64, vocab_size=328, max_position_embeddings=512)
MERGED = [b"th", b"in", b" t", b" th", b"ing", b" a", b"er", b"he"]
TOKENIZER = Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, *MERGED], n_special=64)
TEXT = "The thing, 12 times: naïve 🦙 [INST] </s> <s>\n\n  x"
F32 = gguf.GGMLQuantizationType.F32
MESSAGES = [{"role": "user", "content": TEXT}]


def open_model(path: Path) -> None:
    """Read every number, so that whatever lies outside a file would be touched."""
    model = load(path)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.float().sum()
    read_generation_config(path)


def open_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    assert not {*ids} & {*tokenizer.control.values()}, "text became control"
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    tokenizer.decode(ids, show_control=True)
    stream = tokenizer.stream()
    "".join(map(stream.push, ids))
    if tokenizer.instruct_version or tokenizer.chat_template:
        encode_chat(tokenizer, MESSAGES)


@cache
def tiny_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE).requires_grad_(False)


def open_adapter(path: Path) -> None:
    for a, b in load_adapter(path, tiny_model()).weights.values():
        (b @ a).sum()


def open_batch(path: Path) -> None:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            parse(line, "id", number)
        except LineError as error:
            assert error.code


def open_corpus(path: Path) -> None:
    corpus = Corpus([path], window=32, seed=0, verify=True)
    for i in range(3):
        ids, _ = corpus[i]
        ids.sum()


def open_state(path: Path) -> None:
    state = {"x": torch.zeros(300), "n": 0}
    Checkpoints(path, keep=1).load(state)


LOADERS: dict[str, Callable[[Path], object]] = {
    "model": open_model,
    "tokenizer": open_tokenizer,
    "adapter": open_adapter,
    "chats": lambda path: read_examples([path], TOKENIZER, max_tokens=500)[1].refuse_bad_lines(),
    "pairs": lambda path: read_pairs([path], TOKENIZER, max_tokens=500)[1].refuse_bad_lines(),
    "recipe": read_recipe,
    "vocabulary settings": make_settings,
    "server settings": lambda path: read_settings(["--config", str(path)]),
    "keys": lambda path: read_clients([], path, KeyLimits()),
    "batch": open_batch,
    "corpus": open_corpus,
    "state": open_state,
}


def write_models(folder: Path) -> None:
    """One model in every layout and kind of codes, with its tokenizer."""
    for layout in ("mistral", "hf"):
        save(tiny_model(), folder / layout, layout=layout)
        TOKENIZER.save(folder / layout / "tekken.json")
    save_huggingface(TOKENIZER, folder / "hf")
    (folder / "hf" / "tekken.json").unlink()
    for format in ("fp8", "int4"):
        quantize(folder / "hf", folder / format, format=format, to="hf", calibration=None)
    index = {"weight_map": {}}
    (folder / "indexed").mkdir()
    for file in (folder / "hf").iterdir():
        target = folder / "indexed" / file.name.replace("model.safe", "model-1.safe")
        target.write_bytes(file.read_bytes())
    index["weight_map"] = dict.fromkeys(
        (layouts.spell(name, "hf") for name, _ in tiny_model().named_parameters()),
        "model-1.safetensors",
    )
    (folder / "indexed" / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(path: Path, spec: dict) -> None:
    """The model as llama.cpp would have it, with the vocabulary of a tokenizer.json."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in vars(SHAPE).items():
        if value is not None and name != "tied_embeddings":
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(layouts.key(name, "gguf"), value, kind)
    model = spec["model"]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "tekken")
    writer.add_array("tokenizer.ggml.tokens", [*model["vocab"]])
    kinds = [3 if id < 64 else 1 for id in range(len(model["vocab"]))]
    writer.add_array("tokenizer.ggml.token_type", kinds)
    writer.add_array("tokenizer.ggml.merges", [" ".join(pair) for pair in model["merges"]])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    for i, (name, weight) in enumerate(tiny_model().named_parameters()):
        kind = gguf.GGMLQuantizationType.Q8_0 if i % 2 and weight.dim() == 2 else F32
        data = gguf.quantize(weight.numpy(), kind)
        writer.add_tensor(layouts.spell(name, "gguf"), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    writer = ShardWriter(folder, describe_tokenizer(TOKENIZER, "tiny"))
    ids = np.array(TOKENIZER.encode(TEXT * 20), np.uint32)
    writer.add(ids, np.array([len(ids)]), np.array([len(TEXT.encode()) * 20]))
    writer.finish()


def write_adapter(folder: Path) -> None:
    model = Transformer(SHAPE)
    add_lora_(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    save_adapter(model, folder, base_model_name="tiny")


def write_state(folder: Path) -> None:
    folder.mkdir()
    Checkpoints(folder, keep=1).save(3, {"x": torch.ones(300), "n": 7}, wait=True)
