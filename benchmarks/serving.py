"""Time to first token, time between tokens and tokens a second over HTTP, ours and peers.

Every server gets the same weights, prompts, limits and seeds, on loopback, one server at a time, in
turns: 1, 8 and 32 clients that stream chat completions. Ours also runs without HTTP (the engine
alone), which tells what HTTP and text cost. Peers that are not installed are left out by name.

    python benchmarks/serving.py [--clients 1,8,32] [--tokens 64] [--threads 2] [--json FILE]
"""

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from opennemo.engine import Engine, EngineConfig, SamplingParams
from opennemo.model.checkpoint import convert, load
from opennemo.model.hub import locate
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.chat import encode_chat

TOPICS = ["the sea", "a mountain", "rain", "an old house", "bread", "a letter", "night", "trains"]


def messages(i: int) -> list[dict]:
    topic = TOPICS[i % len(TOPICS)]
    return [{"role": "user", "content": f"Story {i}: tell me a long story about {topic}."}]


async def one(client: httpx2.AsyncClient, model: str, i: int, n_tokens: int) -> list[float]:
    """Stream an answer -> the times at which its pieces came."""
    body = {
        "model": model, "messages": messages(i), "stream": True, "temperature": 0,
        "max_tokens": n_tokens, "stream_options": {"include_usage": True},
    }  # fmt: skip
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError((await answer.aread())[:300])
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0].get("delta", {}).get("content"):
                    times.append(time.perf_counter())
    return times


async def measure(url: str, model: str, n_clients: int, n_tokens: int) -> dict[str, float]:
    """n clients, each with two answers one after the other."""
    limits = httpx2.Limits(max_connections=n_clients)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await one(client, model, 999, 4)  # warm

        async def two(i: int) -> list[list[float]]:
            return [await one(client, model, 2 * i + k, n_tokens) for k in range(2)]

        started = time.perf_counter()
        runs = [run for pair in await asyncio.gather(*map(two, range(n_clients))) for run in pair]
        seconds = time.perf_counter() - started
    gaps = sorted(b - a for run in runs for a, b in itertools.pairwise(run[1:]))
    first = [run[1] - run[0] for run in runs if len(run) > 1]

    def percentile(p: float) -> float:
        return 1000 * gaps[min(len(gaps) - 1, int(p * len(gaps)))]

    return {
        "ttft_ms": 1000 * statistics.median(first),
        "itl_p50_ms": percentile(0.5),
        "itl_p95_ms": percentile(0.95),
        "itl_p99_ms": percentile(0.99),
        "tokens_per_s": sum(len(run) - 1 for run in runs) / seconds,
    }


def engine_alone(path: Path, n_clients: int, n_tokens: int) -> float:
    """Tokens a second of the engine by itself on the same prompts, all at once."""
    tokenizer = load_tokenizer(path)
    engine = Engine(load(path), [tokenizer.eos_id], EngineConfig(max_context=2048))
    prompts = [encode_chat(tokenizer, messages(i)) for i in range(2 * n_clients)]
    n, rest = 0, iter(prompts)

    def listen(event) -> None:
        nonlocal n
        n += event.token is not None
        if event.finish_reason and (prompt := next(rest, None)):
            engine.submit(prompt, SamplingParams(max_tokens=n_tokens), listen)

    started = time.perf_counter()
    for _ in range(n_clients):
        engine.submit(next(rest), SamplingParams(max_tokens=n_tokens), listen)
    while engine.step():
        pass
    return n / (time.perf_counter() - started)


def commands(path: Path, folder: Path, port: int, threads: int) -> dict[str, list[str] | None]:
    """How each server is started; None if it is not installed."""
    python, p, t = sys.executable, str(port), str(threads)
    llama = importlib.util.find_spec("llama_cpp") and path.suffix == ".gguf"
    peer = shutil.which("transformers", path=Path(python).parent)
    serve = [python, "-m", "opennemo.cli", "serve", str(path), "--port", p]
    llama_serve = [python, "-m", "llama_cpp.server", "--model", str(path), "--port", p]
    return {
        "opennemo": [*serve, "--max-model-len", "2048", "--served-model-name", "m"],
        "llama-cpp-python": [*llama_serve, "--n_threads", t, "--n_ctx", "2048"] if llama else None,
        "transformers serve": [peer, "serve", str(folder), "--port", p, "--device", "cpu"]
        if peer
        else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path, console, rows = locate(options.model), Console(), []
    counts = [int(n) for n in options.clients.split(",")]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        convert(path, folder, to="hf")
        for name, command in commands(path, folder, port, options.threads).items():
            if command is None:
                console.print(f"{name}: not installed, left out")
                continue
            log = Path(temporary) / "log"
            with log.open("w") as file:
                server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            url = f"http://127.0.0.1:{port}"
            try:
                wait(server, url, log)
                model = str(folder) if name.startswith("transformers") else "m"
                for n in counts:
                    try:
                        row = asyncio.run(measure(url, model, n, options.tokens))
                        rows.append({"server": name, "clients": n, **row})
                        console.print(f"{name}, {n} clients: {row['tokens_per_s']:.1f} tokens/s")
                    except (RuntimeError, httpx2.HTTPError) as error:
                        console.print(f"{name}, {n} clients: {type(error).__name__} {error}")
            except RuntimeError as error:
                console.print(f"{name}: {error}")
            finally:
                server.terminate()
                server.wait(60)
    for n in counts:
        rate = engine_alone(path, n, options.tokens)
        rows.append({"server": "engine alone", "clients": n, "tokens_per_s": rate})
    columns = ["ttft_ms", "itl_p50_ms", "itl_p95_ms", "itl_p99_ms", "tokens_per_s"]
    table = Table("server", "clients", *columns)
    for row in rows:
        numbers = [f"{row[c]:.1f}" if c in row else "" for c in columns]
        table.add_row(row["server"], str(row["clients"]), *numbers)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def wait(server: subprocess.Popen, url: str, log: Path) -> None:
    """Until the server answers at /health or /v1/models."""
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


if __name__ == "__main__":
    main()
