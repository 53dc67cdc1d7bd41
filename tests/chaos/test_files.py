"""Files that may be anything: each is read, or refused in one line, and nothing else happens.

Good files of every kind are made strange (mutations.py) and opened in a process that is watched
(sandbox.py). Inputs that once failed are listed below.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.tokenizer.chat import encode_chat
from opennemo.tokenizer.chat_layouts import CONTROL_TOKENS
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.tekken import Tekken
from tests.chaos import loaders, mutations
from tests.chaos.sandbox import Sandbox

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc, to measure memory"
)

SHARD = "rank-00000.safetensors"  # of a checkpoint
CALL = {"name": "add", "arguments": '{"n": 1}'}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"},
            {"role": "assistant", "content": "2", "weight": 1},
        ],
        "tools": [TOOL],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"instruction": "Say so", "input": "x", "output": "so"},
]
PAIRS = [
    {
        "messages": [{"role": "user", "content": "Hi"}],
        "chosen": {"role": "assistant", "content": "Ho"},
        "rejected": [{"role": "assistant", "content": "No"}],
    }
]
BATCH = [
    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}},
    {"custom_id": "2", "body": {"prompt": "x"}},
]
RECIPE = """
objective = "chat"
steps = 30
seed = 3
device = "cpu"
licence = "Apache-2.0"
[model]
shape = "tiny"
tokenizer = "somewhere"
[data]
train = [{ path = "a", weight = 2 }]
valid = [{ path = "b" }]
window = 256
rows = 8
micro_rows = 1
[optim]
lr = 3e-4
warmup = 0.1
[saving]
every = 5
[parallel]
compile = false
"""
SERVER = """
model = "tiny"
port = 8123
served_model_name = ["a", "b"]
max_model_len = 4096
temperature = 1
override_generation_config = { temperature = 0.3 }
enable_prefix_caching = true
api_key = ["long-enough"]
"""
VOCABULARY = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """Good files and folders, by the names that the cases below use."""
    root = tmp_path_factory.mktemp("good")
    loaders.write_models(root)
    spec = json.loads((root / "hf" / "tokenizer.json").read_text())
    loaders.write_gguf(root / "model.gguf", spec)
    loaders.write_corpus(root / "corpus")
    loaders.write_adapter(root / "adapter")
    loaders.write_state(root / "state")
    for name, lines in (("chats", CHATS), ("pairs", PAIRS), ("batch", BATCH)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / f"{name}.jsonl").write_text(text)
    (root / "recipe.toml").write_text(RECIPE)
    (root / "server.toml").write_text(SERVER.replace("temperature = 1\n", ""))
    (root / "keys").write_text(f"alice {'0f' * 32} requests_per_minute=3\n# b\nbob {'a' * 64}\n")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def sandbox(good) -> Iterator[Sandbox]:
    ready = {
        "model": good["mistral"], "tokenizer": good["hf"], "adapter": good["adapter"],
        "chats": good["chats.jsonl"], "pairs": good["pairs.jsonl"], "batch": good["batch.jsonl"],
        "recipe": good["recipe.toml"], "server settings": good["server.toml"],
        "keys": good["keys"], "corpus": good["corpus"], "state": good["state"],
    }  # fmt: skip
    sandbox = Sandbox(ready)
    yield sandbox
    sandbox.close()


RAW, JSON, LINES, TOML, SAFETENSORS = (
    mutations.raw_files, mutations.json_files, mutations.line_files, mutations.toml_files,
    mutations.safetensors_files,
)  # fmt: skip
CASES: list[tuple[str, str, str, Callable]] = [
    ("model", "mistral", "consolidated.safetensors", SAFETENSORS),
    ("model", "mistral", "params.json", JSON),
    ("model", "hf", "model.safetensors", SAFETENSORS),
    ("model", "hf", "config.json", JSON),
    ("model", "hf", "generation_config.json", JSON),
    ("model", "fp8", "model.safetensors", SAFETENSORS),
    ("model", "fp8", "config.json", JSON),
    ("model", "int4", "model.safetensors", SAFETENSORS),
    ("model", "indexed", "model.safetensors.index.json", JSON),
    ("model", "model.gguf", "", RAW),
    ("tokenizer", "model.gguf", "", RAW),
    ("tokenizer", "mistral", "tekken.json", JSON),
    ("tokenizer", "hf", "tokenizer.json", JSON),
    ("tokenizer", "hf", "tokenizer_config.json", JSON),
    ("tokenizer", "hf", "config.json", JSON),
    ("adapter", "adapter", "adapter_config.json", JSON),
    ("adapter", "adapter", "adapter_model.safetensors", SAFETENSORS),
    ("chats", "chats.jsonl", "", LINES),
    ("pairs", "pairs.jsonl", "", LINES),
    ("batch", "batch.jsonl", "", LINES),
    ("recipe", "recipe.toml", "", TOML),
    ("server settings", "server.toml", "", TOML),
    ("keys", "keys", "", RAW),
    ("corpus", "corpus", "index.json", JSON),
    ("state", "state", "step-00000003/checkpoint.json", JSON),
    ("state", "state", f"step-00000003/{SHARD}", SAFETENSORS),
]


@pytest.mark.parametrize(
    ("kind", "name", "file", "strange"), CASES, ids=[f"{c[0]}-{c[1]}-{c[2]}" for c in CASES]
)
def test_strange_files_are_read_or_refused_in_a_line(
    fuzz, sandbox, good, tmp_path, kind, name, file, strange
):
    source, path = good[name], tmp_path / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    target = path / file if file else path
    if not target.exists():
        target.write_text('{"temperature": 0.3, "top_p": 0.9, "eos_token_id": [2]}')
    content, seen = target.read_bytes(), {"read": 0, "refused": 0}
    head = 6000 if name.endswith(".gguf") else None
    draw = strange(content, head) if head else strange(content)

    def check(data: bytes) -> None:
        target.unlink()  # not over it: the file before may still be mapped
        target.write_bytes(data)
        refusal = sandbox.open(kind, path, len(data))
        seen["read" if refusal is None else "refused"] += 1

    fuzz(check, draw)
    assert seen["refused"] > 0 or kind == "batch", seen


# Inputs that once failed


def change(path: Path, *keys, value) -> None:
    """Put a value into a JSON file, at the end of some keys."""
    tree = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("value", [None, "x", True, 0, -1, 1e300, 10**400, [1]])
def test_an_adapter_whose_alpha_is_no_number(good, tmp_path, value):
    path = shutil.copytree(good["adapter"], tmp_path / "adapter")
    change(path / "adapter_config.json", "lora_alpha", value=value)
    with pytest.raises(CheckpointError, match=r"lora_alpha is .*, allowed is a number up to"):
        loaders.open_adapter(path)
    (path / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        loaders.open_adapter(path)


@pytest.mark.parametrize("name", ["x" * 5000, "🦙" * 200, "a\nb", "\x00", "\ud800"])
def test_an_index_that_names_what_no_file_can_be_called(good, tmp_path, name):
    path = shutil.copytree(good["indexed"], tmp_path / "indexed")
    change(path / "model.safetensors.index.json", "weight_map", "lm_head.weight", value=name)
    with pytest.raises(CheckpointError, match="files missing") as error:
        loaders.open_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000], ids=["nested", "long"])
def test_toml_without_end(tmp_path, value):
    path = tmp_path / "deep.toml"
    path.write_text(f"steps = {value}")
    for kind in ("recipe", "server settings", "vocabulary settings"):
        with pytest.raises(InvalidRequest) as error:
            loaders.LOADERS[kind](path)
        assert "\n" not in str(error.value)


def test_a_tokenizer_whose_text_could_become_control(good, tmp_path):
    path = shutil.copytree(good["hf"], tmp_path / "hf")
    change(path / "tokenizer.json", "model", "vocab", "T", value=5)
    with pytest.raises(CheckpointError, match=r"'T' and '\[AVAILABLE_TOOLS\]' have the id 5"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", [None, 3])
def test_a_tokenizer_with_a_token_that_is_no_text(good, tmp_path, name):
    path = shutil.copytree(good["hf"], tmp_path / "hf")
    change(path / "tokenizer.json", "added_tokens", 9, "content", value=name)
    with pytest.raises(CheckpointError, match="is not text"):
        load_tokenizer(path)


def test_a_vocabulary_without_a_token_of_its_layout():
    names = ["<unk>", "<s>", "</s>", "[INST]", *sorted(CONTROL_TOKENS - {"[INST]", "[/INST]"})]
    known = loaders.TOKENIZER
    lacking = Tekken(known.pattern, known.tokens, special_tokens=names, n_special=64)
    with pytest.raises(InvalidRequest, match=r"has no \[/INST\]"):
        encode_chat(lacking, loaders.MESSAGES)


@pytest.mark.parametrize("pattern", ["", "x*", r"(?=\s)", r"\b"])
def test_a_pattern_that_matches_nothing(good, tmp_path, pattern):
    path = shutil.copytree(good["mistral"], tmp_path / "mistral")
    change(path / "tekken.json", "config", "pattern", value=pattern)
    with pytest.raises(CheckpointError, match="matches where there is nothing"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("tokens",), float("inf")), (("documents",), float("nan")),
        (("shards", 0, "ids"), {"bytes": 3760}), (("shards", 0, "ends", "sha256"), None),
        (("tokenizer", "hash"), 3), (("tokenizer", "vocab_size"), "x"),
    ],
)  # fmt: skip
def test_a_corpus_whose_index_is_no_index(good, tmp_path, keys, value):
    path = shutil.copytree(good["corpus"], tmp_path / "corpus")
    change(path / "index.json", *keys, value=value)
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        loaders.open_corpus(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("values",), True), (("values",), None), (("files",), None),
        (("files", SHARD), -1), (("files", SHARD), "x"), (("files", SHARD), {}),
        (("files", "../../../elsewhere.safetensors"), 3),
        (("files",), []), (("files", "x" * 5000), 3),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_index_is_no_index(good, tmp_path, keys, value):
    path = shutil.copytree(good["state"], tmp_path / "state")
    change(path / "step-00000003" / "checkpoint.json", *keys, value=value)
    with pytest.raises(CheckpointError) as error:
        loaders.open_state(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "offsets", [[-1], [1], [2**62], [2**70], [], [True], ["0"], [0.5], None, 3, {"0": 0}]
)
def test_a_checkpoint_whose_parts_lie_nowhere(good, tmp_path, offsets):
    path = shutil.copytree(good["state"], tmp_path / "state")
    file = path / "step-00000003" / SHARD
    sharding = json.dumps({"x": {"saved_offsets": offsets}})
    save_file(load_file(file), file, {"DCP_SHARDING_INFO": sharding})
    change(path / "step-00000003" / "checkpoint.json", "files", SHARD, value=file.stat().st_size)
    with pytest.raises(CheckpointError) as error:
        loaders.open_state(path)
    assert "\n" not in str(error.value)
