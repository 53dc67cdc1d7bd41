"""The server's batches resume after a kill, keep to a key's limits and end in time."""

import json
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing

import pytest

from opennemo.llm import LLM
from tests import processes
from tests.batch.conftest import CHAT, MODEL, content, finished, request, tiny, upload, wait_until
from tests.servers import free_port, status

openai = pytest.importorskip("openai")


def test_limits_of_a_key_hold_for_batches_but_live_requests_have_their_own(running, tiny_llm):
    with running(tiny_llm(), requests_per_minute=3) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            file = upload(client, [tiny(i) for i in range(5)])
            made = client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
            wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed == 3)
            for _ in range(3):
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "Hi"}]
                )
            assert client.batches.retrieve(made.id).status == "in_progress"


def test_a_killed_server_goes_on_where_it_was(running, folder, tmp_path):
    n, state = 80, tmp_path / "state"
    port = free_port()
    command = ["-m", "opennemo.cli", "serve", folder, "--port", port]
    command += ["--state-dir", state, "--api-key", "first-key", "--max-num-batch-seqs", "4"]
    process = processes.start(*command, stderr=subprocess.DEVNULL)
    lines = [request(i, max_tokens=40) for i in range(n)]
    for line in lines:
        line["body"]["model"] = MODEL
    try:
        wait_until(lambda: status(port) == 200)
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="first-key", max_retries=0) as client:
            made = client.batches.create(
                input_file_id=upload(client, lines), endpoint=CHAT, completion_window="24h"
            )
            wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed > 20)
    finally:
        process.kill()
        process.wait()
    # Another model, or another key: the batch waits.
    with running(LLM.load(str(folder)), state_dir=state, api_key=["other-key"]) as server:
        time.sleep(0.3)
        with closing(sqlite3.connect(state / "batches.sqlite3")) as db:
            ((state_then, rest),) = db.execute("SELECT status, rest FROM batches").fetchall()
        assert state_then == "in_progress" and 20 < json.loads(rest)["n_ok"] < n
        assert not server.service.active
    with running(LLM.load(str(folder)), state_dir=state, api_key=["first-key"]) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="first-key", max_retries=0) as client:
            done = finished(client, made.id)
            assert done.status == "completed" and done.request_counts.completed == n
            answers = content(client, done.output_file_id)
            assert Counter(a["custom_id"] for a in answers) == {f"line-{i}": 1 for i in range(n)}
            with running(LLM.load(str(folder)), state_dir=state) as second, second.client() as http:
                refused = http.get("/v1/files")  # one server a folder
                assert refused.status_code == 503 and "off" in refused.json()["message"]


def test_a_batch_whose_time_is_over_says_so(running, tiny_llm, monkeypatch, tmp_path):
    with running(tiny_llm(), max_num_batch_seqs=1) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            lines = [tiny(i, max_tokens=2 if not i else 3500) for i in range(5)]
            made = client.batches.create(
                input_file_id=upload(client, lines), endpoint=CHAT, completion_window="24h"
            )
            wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed == 1)
            now = time.time()
            monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
            done = finished(client, made.id)
            assert done.status == "expired" and done.expired_at >= done.expires_at
            assert len(content(client, done.output_file_id)) == 1
            late = content(client, done.error_file_id)
            assert {a["error"]["code"] for a in late} == {"batch_expired"} and len(late) == 4
            assert all(a["response"] is None for a in late)
