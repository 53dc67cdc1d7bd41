"""Many replicas behind one application, on Ray Serve: real processes, two at a time, on a CPU.

One cluster for all of them, since it takes ten seconds to start; each test leaves two replicas.
"""

# Ray is an extra, which few users install.
# pyright: reportMissingImports=false
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch

from opennemo.errors import InvalidRequest, Unavailable
from opennemo.llm import LLM
from opennemo.model.checkpoint import load
from opennemo.model.lora import add_lora_, save_adapter
from opennemo.serve.settings import Settings
from tests.servers import CHAT, KEY, needs_ray, serving

KEYS = ["first-key-of-two", "second-key-of-two"]
ADMIN = "the-admin-key-for-tests"
SAID = "The quick brown fox jumps over the lazy dog. " * 8  # 360 tokens, one a byte


def test_a_server_without_replicas_does_not_know_of_ray():
    code = (
        "import sys, opennemo.serve.app, opennemo.serve.service, opennemo.batch.offline\n"
        "assert not any(name.split('.')[0] == 'ray' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def adapter_root(folder: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    model = load(folder)
    generator = torch.Generator().manual_seed(1)
    add_lora_(model, rank=2, alpha=64, generator=generator)
    for name, weight in model.named_parameters():
        if name.endswith(".b"):  # zero at first, which would change nothing
            torch.nn.init.normal_(weight, 0, 1, generator)
    save_adapter(model, root / "loud", base_model_name="tiny")
    return root


@pytest.fixture(scope="module")
def replicas(folder: Path, adapter_root: Path, running) -> Iterator:
    # Not imported to see: Ray reads the environment as it is.
    if not (importlib.util.find_spec("ray") and importlib.util.find_spec("grpc")):
        pytest.skip("needs Ray Serve: pip install -e '.[scale]'")
    from opennemo.cluster.fleet import open_fleet

    options = {"replicas": 2, "api_key": KEYS, "admin_key": ADMIN, "lora_root": adapter_root}
    llm = open_fleet(Settings(model=str(folder), device="cpu", **options))  # pyright: ignore
    with running(llm, **options) as server:
        yield server


def chat(http, **fields) -> dict:
    body = {"model": "tiny-folder", "max_tokens": 24, "min_tokens": 24} | fields
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(body: dict) -> list:
    """The answer, without the names of calls, which are random."""
    for choice in body["choices"]:
        for call in choice["message"].get("tool_calls") or []:
            del call["id"]
    return [(c["message"], c["finish_reason"], c.get("logprobs")) for c in body["choices"]]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def replica_pids() -> list[int]:
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def two_answer(replicas) -> bool:
    """A process is there long before the model in it is."""
    with contextlib.suppress(Unavailable):
        return len(replica_pids()) == len(replicas.llm.engine.broadcast("stats")) == 2
    return False


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
ASKED = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1, "seed": 5, "top_p": 0.9},
    "several": {"temperature": 1, "seed": 6, "n": 3},
    "log-probabilities": {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    "biased": {"temperature": 0, "logit_bias": {"165": 5}, "frequency_penalty": 1},
    "a schema": {
        "temperature": 0, "min_tokens": 0, "max_tokens": 99,
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"enum": ["yes", "no"]}}},
    },
    "a call": {"temperature": 0, "min_tokens": 0, "max_tokens": 99, "tools": [TOOL],
               "tool_choice": "required"},
    "a stop text": {"temperature": 1, "seed": 8, "stop": ["e", "a", "\n"], "n": 2},
}  # fmt: skip


@pytest.mark.slow
def test_answers_are_those_of_one_engine(replicas, folder: Path, running):
    alone = LLM.load(str(folder), device="cpu")
    with running(alone, api_key=KEYS) as one, replicas.client() as http, one.client() as alone:
        for name, fields in ASKED.items():
            ours, expected = (chat(c, messages=user(name), **fields) for c in (http, alone))
            assert texts(ours) == texts(expected), name
            assert ours["usage"] == expected["usage"], name
        # Streamed, the same: every event except ids and times.
        body = {"model": "tiny-folder", "messages": user("stream"), "stream": True,
                "max_tokens": 40, "temperature": 1, "seed": 3}  # fmt: skip
        heard = []
        for client in (http, alone):
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = [x[6:] for x in answer.iter_lines() if x.startswith("data: {")]
            deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
            heard.append("".join(delta.get("content") or "" for delta in deltas))
        assert heard[0] == heard[1] != ""
        wrong = {"model": "tiny-folder", "prompt": "x" * 5000}
        ours, expected = (c.post("/v1/completions", json=wrong) for c in (http, alone))
        assert (ours.status_code, ours.json()["message"]) == (400, expected.json()["message"])


@pytest.mark.slow
def test_a_conversation_returns_to_the_replica_that_has_its_beginning(replicas):
    with replicas.client() as http:
        talks = [user(f"{i}{SAID}") for i in range(6)]
        for turn in range(3):
            for talk in talks:
                body = chat(http, messages=talk, temperature=0)
                cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (cached > 300 * turn) if turn else cached < 300
                talk += [body["choices"][0]["message"], *user(SAID)]
        wait_until(lambda: "opennemo_replicas{" in http.get("/metrics").text)
        each = replicas.llm.engine.broadcast("stats")
        assert len(each) == 2
        assert all(stats["prefix_cache_hits"] > 1000 for stats in each)  # both had a share
        # Another key finds nothing of it: salts travel, too.
        with replicas.client(KEYS[1]) as other:
            body = chat(other, messages=talks[0][:1], temperature=0)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.slow
def test_hanging_up_frees_the_pages_of_a_replica(replicas):
    stats = lambda: replicas.llm.engine.broadcast("stats")  # noqa: E731
    with replicas.client() as http:
        # Together they would take far longer than they are given to end.
        body = {"model": "tiny-folder", "messages": user("long"), "stream": True, "n": 16,
                "max_tokens": 3500, "min_tokens": 3500}  # fmt: skip
        with contextlib.ExitStack() as streams:
            for _ in range(8):
                answer = http.stream("POST", "/v1/chat/completions", json=body)
                lines = streams.enter_context(answer).iter_lines()
                for _ in range(60):  # of which 16 say who speaks
                    next(lines)
        wait_until(lambda: not any(s["kv_cache_pages_used"] for s in stats()), 20)
        assert not any(s["requests_running"] + s["requests_waiting"] for s in stats())


@pytest.mark.slow
def test_an_adapter_is_on_all_replicas_also_on_later_ones(replicas, adapter_root: Path):
    with replicas.client() as http, replicas.client(ADMIN) as admin:
        plain = texts(chat(http, messages=user("hi"), temperature=0))
        answer = admin.post("/v1/load_lora_adapter", json={"lora_name": "no", "lora_path": "none"})
        assert answer.status_code == 400, answer.text
        answer = admin.post("/v1/load_lora_adapter", json={"lora_name": "loud"})
        assert answer.status_code == 200, answer.text
        ask = lambda text: texts(chat(http, model="loud", messages=user(text), temperature=0))  # noqa: E731
        loud = ask("hi")
        assert loud != plain == texts(chat(http, messages=user("hi"), temperature=0))
        os.kill(replica_pids()[0], signal.SIGKILL)
        wait_until(lambda: two_answer(replicas))
        with ThreadPoolExecutor(8) as pool:  # so many at once go to both
            assert all(answer == loud for answer in pool.map(ask, ["hi"] * 16))
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "loud"}).status_code == 200


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_nothing_is_answered_twice_or_lost(replicas, folder):
    with LLM.load(str(folder), device="cpu") as llm:
        right = llm.chat(user("count"), temperature=0.0, max_tokens=400, min_tokens=400).text
    wait_until(lambda: two_answer(replicas))
    body = {"model": "tiny-folder", "messages": user("count"), "max_tokens": 400,
            "min_tokens": 400, "temperature": 0}  # fmt: skip

    def ask(i: int) -> str:
        """How it ended: each request in one way only."""
        with replicas.client() as http:
            if i % 2:
                answer = http.post("/v1/chat/completions", json=body)
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["message"]["content"] == right
                    return "whole"
                assert (answer.status_code, answer.json()["code"]) == (503, "replica_lost")
                return "refused"
            with http.stream(
                "POST", "/v1/chat/completions", json=body | {"stream": True}
            ) as answer:
                events = [x[6:] for x in answer.iter_lines() if x.startswith("data: {")]
            events = [json.loads(event) for event in events]
            deltas = [e["choices"][0]["delta"] for e in events if "choices" in e]
            text = "".join(delta.get("content") or "" for delta in deltas)
            assert right.startswith(text)
            if "error" in events[-1]:
                assert "lost" in events[-1]["error"]["message"]
                return "broken off"
            assert text == right
            return "whole"

    with ThreadPoolExecutor(12) as pool:
        asked = []
        for i in range(36):
            asked.append(pool.submit(ask, i))
            time.sleep(0.1)  # else those of one replica end, and others begin, all at once
            if i == 18:
                os.kill(replica_pids()[0], signal.SIGKILL)
        ends = [future.result(120) for future in asked]
    print({end: ends.count(end) for end in sorted(set(ends))})
    assert 0 < len(ends) - ends.count("whole") <= 12  # those that were under way there, no other
    wait_until(lambda: two_answer(replicas))
    assert [ask(i) for i in range(4)] == ["whole"] * 4


@pytest.mark.slow
def test_replicas_are_replaced_under_load_without_a_lost_request(replicas):
    before, stop = set(replica_pids()), False

    def ask_on(i: int) -> int:
        n = 0
        with replicas.client() as http:
            while not stop:
                chat(http, messages=user(f"{i} {n}"), max_tokens=60, min_tokens=60)
                n += 1
        return n

    with ThreadPoolExecutor(6) as pool, replicas.client(ADMIN) as admin:
        asked = [pool.submit(ask_on, i) for i in range(6)]
        try:
            answer = admin.post("/restart_replicas", timeout=300)
            assert answer.status_code == 200, answer.text
        finally:
            stop = True
        n_answered = sum(future.result() for future in asked)  # raises, if one was not a 200
    print(n_answered, "answers")
    assert n_answered > 50
    wait_until(lambda: two_answer(replicas))
    assert not before & set(replica_pids())


@pytest.mark.slow
def test_a_cluster_of_our_own_is_closed_to_others(replicas):
    import psutil
    import ray

    children = psutil.Process().children(recursive=True)
    listening = [
        connection.laddr
        for process in children
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {a.ip.removeprefix("::ffff:") for a in listening} == {"127.0.0.1"}
    address = ray.get_runtime_context().gcs_address
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    # Else it asks at another address of this machine's, where nobody listens.
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    code = f"import ray; ray.init(address={address!r}); print('IN')"
    said = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240
    )
    assert said.returncode != 0
    assert "IN" not in said.stdout
    assert "InvalidAuthToken" in said.stderr
    with socket.socket() as dashboard:
        assert dashboard.connect_ex(("127.0.0.1", 8265)) != 0


@pytest.mark.slow
def test_scores_are_those_of_one_engine_and_come_once_whoever_is_killed(replicas, folder: Path):
    generator = torch.Generator().manual_seed(0)
    numbers = lambda n: torch.randint(200, (n,), generator=generator).tolist()  # noqa: E731
    questions = [[1, *numbers(n)] for n in range(100, 500)]
    pairs = [(question, numbers(n)) for question in questions for n in (1, 2, 9)]
    heard: list[int] = []

    def listen(index: int, score: object) -> None:
        heard.append(index)
        if len(heard) == 1:
            os.kill(replica_pids()[0], signal.SIGKILL)

    wait_until(lambda: two_answer(replicas))
    ours = replicas.llm.score(pairs, listen)
    assert sorted(heard) == list(range(len(pairs)))
    with LLM.load(str(folder), device="cpu") as alone:
        theirs = alone.score(pairs)
    assert [s.greedy for s in ours] == [s.greedy for s in theirs]
    expected = pytest.approx([s.logprob for s in theirs], abs=1e-3)
    assert [s.logprob for s in ours] == expected
    with pytest.raises(InvalidRequest, match="at least one token"):
        replicas.llm.score([*pairs, ([], [1])])
    wait_until(lambda: two_answer(replicas))


@pytest.mark.slow
@needs_ray
def test_a_replica_is_added_as_requests_queue(folder: Path, tmp_path: Path):
    """A whole server, on a cluster of its own; Ray waits half a minute before it adds one."""
    options = ["--replicas", "1", "--max-replicas", "2", "--max-num-seqs", "2"]
    with serving(folder, tmp_path, *options) as server:
        wait_until(lambda: server.metric("replicas") == 1)
        body = {"model": "tiny-folder", "messages": user("long"), "max_tokens": 3000,
                "min_tokens": 3000}  # fmt: skip
        stop = False

        def ask_on() -> list[int]:
            found = []
            while not stop:
                with httpx2.Client(headers={"Authorization": f"Bearer {KEY}"}) as http:
                    answer = http.post(f"{server.url}{CHAT}", json=body, timeout=300)
                found.append(answer.status_code)
            return found

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask_on) for _ in range(8)]
            try:
                wait_until(lambda: server.metric("replicas") == 2, 180)
            finally:
                stop = True
            statuses = [status for future in asked for status in future.result()]
        assert statuses and set(statuses) == {200}
