"""Servers that are real: uvicorn on a port of its own, over a tiny random model."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import pytest
import structlog
import torch

from opennemo.batch.api import mount
from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.llm import LLM
from opennemo.model.checkpoint import save
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.serve.app import create_app
from opennemo.serve.bounded_http import BoundedHeaders
from opennemo.serve.server import Server
from opennemo.serve.service import Service
from opennemo.serve.settings import Settings
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

KEY = "a-key-for-tests"
ADMIN = "the-admin-key-for-tests"
VOCABULARY = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte

# Coloured tracebacks with all local variables would take longer than the tests.
structlog.configure(
    processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
)


def make_tiny_llm(logit_bias: dict[int, float] | None = None, **config) -> LLM:
    """A random model whose words are bytes; at a temperature it says anything."""
    torch.manual_seed(0)
    shape = replace(PRESETS["tiny"], max_position_embeddings=4096)
    model = Transformer(shape).eval().requires_grad_(False)
    engine = LocalEngine(model, [VOCABULARY.eos_id], EngineConfig(**config))
    engine.start()
    # An answer without a word is right, but clients' own checks ask for at least one.
    defaults = SamplingParams(temperature=1.0, seed=2, min_tokens=1, logit_bias=logit_bias or {})
    return LLM("tiny", VOCABULARY, engine, defaults)


@dataclass
class Running:
    """A server that listens."""

    url: str
    service: Service
    llm: LLM
    key: str | None

    def client(self, key: str | None = None, **kwargs) -> httpx2.Client:
        key = key or self.key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, **kwargs)


@contextlib.contextmanager
def run_server(
    llm: LLM, *, keep_alive: int = 5, connections: int | None = None, **settings
) -> Iterator[Running]:
    """Serve a model on loopback, in a thread that ends with the context.

    `keep_alive` is how many seconds a connection may stand still; `connections` how many there may
    be.
    """
    import uvicorn

    own = contextlib.ExitStack()
    if "state_dir" not in settings:
        settings["state_dir"] = own.enter_context(tempfile.TemporaryDirectory())
    service = Service(Settings(port=0, **settings))  # pyright: ignore[reportCallIssue]
    service.use(llm)
    app = create_app(service)
    mount(app)
    config = uvicorn.Config(
        app, port=0, http=BoundedHeaders, ws="none", log_config=None, access_log=False,
        timeout_graceful_shutdown=2, timeout_keep_alive=keep_alive, limit_concurrency=connections,
    )  # fmt: skip
    server = Server(config)
    server.service = service
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    keys = service.settings.api_key
    try:
        yield Running(f"http://127.0.0.1:{port}", service, llm, keys[0] if keys else None)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        own.close()


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory) -> Iterator[None]:
    """Servers in processes of their own must not resume batches of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENNEMO_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with run_server(make_tiny_llm(), api_key=[KEY], admin_key=ADMIN, enable_docs=True) as server:
        yield server


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def make_tiny_folder(folder: Path) -> Path:
    """A tiny random model as a folder, for processes of their own."""
    torch.manual_seed(0)
    shape = replace(PRESETS["tiny"], max_position_embeddings=4096)
    save(Transformer(shape), folder, layout="mistral")
    VOCABULARY.save(folder / "tekken.json")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model") / "tiny-folder")


@pytest.fixture(scope="session")
def tiny_llm() -> Callable[..., LLM]:
    """Makes tiny models."""
    return make_tiny_llm


@pytest.fixture(scope="session")
def running() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """Runs servers."""
    return run_server
