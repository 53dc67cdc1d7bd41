"""Servers over HTTP, ours and peers on the same weights: latency, regularity, throughput.

    python benchmarks/serving.py [--llama-python PYTHON] [--transformers-python PYTHON]
                                 [--clients 1 8 32 64] [--threads N] [--json FILE]
    python benchmarks/serving.py --beside [--json FILE]

One server at a time on loopback, all in one run: 1, 8 and 32 clients stream chat completions, with
the same prompts, limits and threads. Ours in int8 against llama.cpp's server in Q8_0, and ours in
float32 against `transformers serve`, of whose two ways, with and without `--continuous-batching`,
both are measured. A row is the time to the first token (median), the time between tokens (50th,
95th and 99th of a hundred), the time of a whole answer (median), or the tokens a second of all
clients together. llama.cpp's server answers one client after the other: with several, its tokens
follow each other as fast as with one, once an answer has begun, while the other clients wait.

The last row shows what HTTP and text cost: tokens a second over HTTP, with the largest number of
clients, over those of the engine by itself in a process of its own; the median of three pairs. The
client shares the machine with the servers, and its work counts as theirs.

`--beside` measures something else instead: how much later the tokens of a greedy stream come while
another request asks for sixteen answers, by how these are sampled. The model is random, has 0.1 B
parameters in int8 and Mistral NeMo's 131,072 tokens. Times are processor time of the engine's one
thread, which other work on the machine changes little.

Peers run in environments of their own, unless this one has them, and are left out where there are
none: `pip install 'llama-cpp-python[server]'` and `pip install 'transformers[serving]'`.
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
import torch
from inference import as_q8_0
from measure import Row, peak_memory, write_rows
from rich.console import Console
from rich.table import Table

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.llm import LLM
from opennemo.model import export
from opennemo.model.checkpoint import convert
from opennemo.model.formats import FORMATS
from opennemo.model.hub import locate
from opennemo.model.quantization import quantize_
from opennemo.model.transformer import ModelConfig, Transformer

TOPICS = ["the sea", "a mountain", "rain", "an old house", "bread", "a letter", "night", "trains"]
CONTEXT = 2048
PATIENCE = 80  # seconds that a server has for one case; then larger ones are left out, too
ROUNDS = 3  # of what HTTP costs


N_BESIDE, N_VOCABULARY = 16, 131_072
EVERYTHING = frozenset(range(N_VOCABULARY))
BESIDE: dict[str, dict] = {
    "greedy": {},
    "temperature 5": {"temperature": 5},
    "allowed_token_ids of everything": {"allowed_ids": EVERYTHING},
    "20 log-probabilities": {"logprobs": 20},
    "all three": {"temperature": 5, "allowed_ids": EVERYTHING, "logprobs": 20},
    "top-p 0.99": {"temperature": 1, "top_p": 0.99},
    "top-p 0.99, temperature 5": {"temperature": 5, "top_p": 0.99},
    "top-k 2,000, temperature 5": {"temperature": 5, "top_k": 2000},
    "min-p 0.05": {"temperature": 5, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "typical 0.9": {"temperature": 1, "typical_p": 0.9},
    "top-n-sigma 1": {"temperature": 1, "top_n_sigma": 1},
    "DRY": {"dry_multiplier": 0.8},
    "XTC": {"temperature": 1, "xtc_probability": 1, "xtc_threshold": 1e-5},
}


class Measured(NamedTuple):
    """One server under a number of clients; times in milliseconds."""

    first_token: float
    first_token_p99: float
    gap_p50: float
    gap_p95: float
    gap_p99: float
    answer: float
    tokens_per_s: float
    memory: float  # MB of the server, the most it has had


METRICS = {
    "first_token": ("time to first token", "ms"),
    "first_token_p99": ("time to first token, p99", "ms"),
    "gap_p50": ("between tokens, p50", "ms"),
    "gap_p95": ("between tokens, p95", "ms"),
    "gap_p99": ("between tokens, p99", "ms"),
    "answer": ("whole answer", "ms"),
    "tokens_per_s": ("throughput", "tokens/s"),
    "memory": ("memory", "MB"),
}


# ---- clients ----------------------------------------------------------------------------------


def messages(i: int) -> list[dict]:
    topic = TOPICS[i % len(TOPICS)]
    return [{"role": "user", "content": f"Story {i}: tell me a long story about {topic}."}]


async def stream(port: int, model: str, i: int, n_tokens: int) -> list[float]:
    """Stream an answer -> when it was asked for, then when each of its pieces came.

    Over a plain socket: a client's library would take more of the processor than our server does.
    Each server here writes whole events, so that chunks need not be put together.
    """
    settings = {"model": model, "stream": True, "temperature": 0, "max_tokens": n_tokens}
    body = json.dumps({"messages": messages(i), **settings}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{head}connection: close\r\n\r\n"
    )
    times = [time.perf_counter()]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    if b" 200 " not in await reader.readline():
        raise RuntimeError((await reader.read(1000))[-300:])
    async for line in reader:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices")
            if choices and choices[0].get("delta", {}).get("content"):
                times.append(time.perf_counter())
    writer.close()
    if len(times) < 0.8 * n_tokens:  # some tokens are half a character, but not many
        raise RuntimeError(f"{len(times) - 1} pieces instead of {n_tokens}")
    return times


async def load(
    port: int, model: str, n_clients: int, n_tokens: int, pid: int | None = None
) -> Measured:
    """This many clients at once; a single one asks three questions, one after the other."""
    n_each = 3 if n_clients == 1 else 1

    async def ask(i: int) -> list[list[float]]:
        return [await stream(port, model, n_each * i + k, n_tokens) for k in range(n_each)]

    started = time.perf_counter()
    async with asyncio.timeout(PATIENCE):
        runs = list(itertools.chain(*await asyncio.gather(*map(ask, range(n_clients)))))
    seconds = time.perf_counter() - started
    gaps = sorted(b - a for run in runs for a, b in itertools.pairwise(run[1:]))
    p50, p95, p99 = (1000 * gaps[int(p * (len(gaps) - 1))] for p in (0.5, 0.95, 0.99))
    first = sorted(1000 * (run[1] - run[0]) for run in runs)
    return Measured(
        first_token=statistics.median(first), first_token_p99=first[int(0.99 * len(first))],
        gap_p50=p50, gap_p95=p95, gap_p99=p99,
        answer=1000 * statistics.median(run[-1] - run[0] for run in runs),
        tokens_per_s=sum(len(run) - 1 for run in runs) / seconds,
        memory=peak_memory(pid or "self") / 1e6,
    )  # fmt: skip


def engine_alone(folder: str, n_clients: int, n_tokens: int) -> None:
    """In a process of its own: the same questions without HTTP and text; tokens a second."""
    # Without the cache, as otherwise a second round would have no prompts to compute.
    config = EngineConfig(max_context=CONTEXT, prefix_caching=False, n_draft_tokens=0)
    with LLM.load(folder, config=config) as llm:
        llm.chat(messages(999), temperature=0, max_tokens=4).finish()
        for _ in sys.stdin:  # a line asks for a round
            started = time.perf_counter()
            questions = map(messages, range(n_clients))
            replies = [llm.chat(q, temperature=0, max_tokens=n_tokens) for q in questions]
            for reply in replies:
                reply.finish()
            n = sum(len(reply.ids) for reply in replies)
            print(n / (time.perf_counter() - started), flush=True)


# ---- servers ----------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], port: int, threads: int) -> Iterator[int]:
    """A server while it runs -> its process.

    Raises:
        RuntimeError: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, environment = Path(folder) / "log", dict(os.environ)
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"OPENNEMO_STATE_DIR": folder}
        with log.open("w") as file:
            server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            wait(server, f"http://127.0.0.1:{port}", log)
            yield server.pid
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait(server: subprocess.Popen, url: str, log: Path) -> None:
    """Until the server says that it is ready."""
    for _ in range(900):
        for path in ("/health", "/v1/models"):
            try:
                if httpx2.get(f"{url}{path}", timeout=5).is_success:
                    return
            except httpx2.HTTPError:
                pass
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"it did not start: {log.read_text()[-500:]}")


def has(python: str, modules: str) -> bool:
    done = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, check=False)
    return not done.returncode


def under_load(
    name: str, command: list[str], model: str, options: argparse.Namespace
) -> dict[int, Measured]:
    """One server under all its loads -> what was measured, by clients."""
    found = {}
    try:
        with running(command, options.port, options.threads) as pid:
            asyncio.run(stream(options.port, model, 999, 4))
            for n in options.clients:
                try:
                    found[n] = asyncio.run(load(options.port, model, n, options.tokens, pid))
                    numbers = ", ".join(f"{k} {v:.1f}" for k, v in found[n]._asdict().items())
                    print(f"  {name}, {n}: {numbers}", file=sys.stderr)
                except (RuntimeError, OSError) as error:
                    print(f"  {name}, {n}: {type(error).__name__} {error}", file=sys.stderr)
                    break
    except (RuntimeError, OSError) as error:
        print(f"  {name} is left out: {error}", file=sys.stderr)
    return found


def against(
    label: str, mine: dict[int, Measured], peer_name: str, peer: dict[int, Measured]
) -> list[Row]:
    rows = []
    for n in sorted(mine.keys() & peer.keys()):
        for key, (metric, unit) in METRICS.items():
            a, b = getattr(mine[n], key), getattr(peer[n], key)
            clients = f"{n} client{'s' * (n > 1)}"
            rows.append(
                Row(
                    name=f"{label}, {clients}, {metric}", ours=a, peer=b, peer_name=peer_name,
                    unit=unit, ratio=a / b if key == "tokens_per_s" else b / a, goal=1.0,
                )
            )  # fmt: skip
    return rows


def http_cost(folder: Path, command: list[str], options: argparse.Namespace) -> Row:
    """The share of the engine's tokens a second that remains behind HTTP."""
    n, pairs = max(options.clients), []
    own = [sys.executable, __file__, "--engine", str(folder), "--clients", str(n)]
    alone = subprocess.Popen(
        [*own, "--tokens", str(options.tokens)],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert alone.stdin and alone.stdout
    try:
        command = [*command, "--no-enable-prefix-caching"]
        with running(command, options.port, options.threads):
            asyncio.run(stream(options.port, "m", 999, 4))
            for _ in range(ROUNDS):
                over_http = asyncio.run(load(options.port, "m", n, options.tokens)).tokens_per_s
                print(file=alone.stdin, flush=True)
                pairs.append((over_http, float(alone.stdout.readline())))
                print("  over HTTP {:.1f}, alone {:.1f}".format(*pairs[-1]), file=sys.stderr)
    finally:
        alone.stdin.close()
        alone.wait()
    ours, engine = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return Row(
        name=f"HTTP and tokenising cost, int8, {n} clients", ours=ours, peer=engine,
        peer_name="our engine alone", unit="tokens/s", ratio=ratio, goal=0.9,
    )  # fmt: skip


# ---- requests beside each other ---------------------------------------------------------------


def gaps_beside(engine: LocalEngine, settings: dict | None, n_tokens: int) -> list[float]:
    """CPU milliseconds between a greedy stream's tokens, sorted, beside a request of settings."""
    other, times, done = None, [], threading.Event()
    if settings is not None:
        params = SamplingParams(seed=1, ignore_eos=True, **settings)
        computed = threading.Semaphore(0)
        other = engine.submit([*range(300)], params, lambda _: computed.release(), n=N_BESIDE)
        for _ in range(2 * N_BESIDE):
            computed.acquire()

    def note(token: Token) -> None:  # on the engine's thread
        times.append(time.thread_time())
        if token.finish_reason:
            done.set()

    engine.submit([*range(5)], SamplingParams(max_tokens=n_tokens, ignore_eos=True), note)
    done.wait()
    if other is not None:
        engine.cancel(other)
    return sorted(1000 * (b - a) for a, b in itertools.pairwise(times[1:]))


def beside(n_tokens: int) -> list[Row]:
    """How much longer one request lets another one's tokens take."""
    torch.manual_seed(0)
    shape = ModelConfig(
        dim=256, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=1024,
        vocab_size=N_VOCABULARY, max_position_embeddings=2048,
    )  # fmt: skip
    model = Transformer(shape).eval().requires_grad_(False)
    quantize_(model, FORMATS["int8"], head=FORMATS["int8"])
    engine, rows = LocalEngine(model, [2], EngineConfig(n_draft_tokens=0)), []
    engine.start()
    alone = statistics.median(gaps_beside(engine, None, n_tokens))
    for name, settings in BESIDE.items():
        gaps = gaps_beside(engine, settings, n_tokens)
        gap = statistics.median(gaps)
        print(f"  {name}: {gap:.1f} ms, p99 {gaps[int(0.99 * len(gaps))]:.1f}", file=sys.stderr)
        rows.append(
            Row(
                name=f"beside {N_BESIDE} answers, {name}", ours=gap, peer=alone, peer_name="alone",
                unit="CPU ms", ratio=alone / gap, goal=1 / 3,
            )
        )  # fmt: skip
    engine.close()
    return rows


# -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a .gguf file; by default the built-in model")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--beside", action="store_true", help="measure requests beside each other")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine_alone(options.engine, options.clients[0], options.tokens)
        return
    if options.beside:
        torch.set_num_threads(1)
        show(beside(options.tokens), options.json)
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        options.port = probe.getsockname()[1]
    port, threads, rows = str(options.port), str(options.threads), []
    model = options.model or locate("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as name:
        q8_0, int8, fp32 = (Path(name) / part for part in ("q8_0.gguf", "int8", "fp32"))
        serve = [sys.executable, "-m", "opennemo.cli", "serve", "--port", port]
        serve += ["--max-model-len", str(CONTEXT), "--served-model-name", "m"]
        export.quantize(model, int8, format="int8")
        mine = under_load("ours, int8", [*serve, str(int8)], "m", options)
        if has(options.llama_python, "llama_cpp.server.app"):
            as_q8_0(model, q8_0)
            # Without the last option a second client ends the first one's answer.
            command = [options.llama_python, "-m", "llama_cpp.server", "--model", str(q8_0)]
            command += ["--port", port, "--n_threads", threads, "--n_threads_batch", threads]
            command += ["--n_ctx", str(CONTEXT), "--interrupt_requests", "False"]
            peer = under_load("llama.cpp's server, Q8_0", command, "m", options)
            rows += against("int8", mine, "llama.cpp's server, Q8_0", peer)
        else:
            print("llama.cpp's server is left out: it is not installed", file=sys.stderr)
        if has(options.transformers_python, "transformers.cli.serving, uvicorn, fastapi, openai"):
            convert(model, fp32, to="hf", dtype=torch.float32)
            mine = under_load("ours, float32", [*serve, str(fp32)], "m", options)
            start = "from transformers.cli.transformers import main; main()"
            command = [options.transformers_python, "-c", start, "serve", str(fp32)]
            command += ["--port", port, "--device", "cpu", "--dtype", "float32"]
            for way in ((), ("--continuous-batching",)):
                label = " ".join(("transformers serve", *way))
                peer = under_load(label, [*command, *way], str(fp32), options)
                rows += against("float32", mine, label, peer)
        else:
            print("transformers serve is left out: it is not installed", file=sys.stderr)
        rows.append(http_cost(int8, [*serve, str(int8)], options))
    show(rows, options.json)


def show(rows: list[Row], file: Path | None) -> None:
    table = Table("case", "ours", "peer", "", "", "ratio", "goal")
    for row in rows:
        numbers = f"{row.ratio:.2f}", f"{row.goal:.2f}"
        table.add_row(
            row.name, f"{row.ours:.1f}", row.peer_name, f"{row.peer:.1f}", row.unit, *numbers
        )
    Console(width=130).print(table)
    write_rows(rows, file)


if __name__ == "__main__":
    main()
