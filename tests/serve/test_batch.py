"""Batches: by the command, by OpenAI's and Mistral's clients; every line once, whatever happens."""

import asyncio
import errno
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from opennemo.batch import lines as batch
from opennemo.batch import offline
from opennemo.errors import OpenNemoError
from opennemo.llm import LLM
from opennemo.serve.settings import read_settings

mistralai = pytest.importorskip("mistralai.client")
openai = pytest.importorskip("openai")

CHAT = "/v1/chat/completions"
MODEL = "tiny-folder"


def request(i: int, *, max_tokens: int = 4, **changes) -> dict:
    messages = [{"role": "user", "content": f"Hello {i}"}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 1, "ignore_eos": True}
    line = {"custom_id": f"line-{i}", "method": "POST", "url": CHAT, "body": body}
    return line | changes


def jsonl(lines: list[dict]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# The command


def test_a_kill_repeats_and_loses_nothing(folder, tmp_path):
    source, target, n = tmp_path / "in.jsonl", tmp_path / "out.jsonl", 120
    source.write_bytes(jsonl([request(i, max_tokens=100) for i in range(n)]))
    command = [sys.executable, "-m", "opennemo.cli", "batch", source, folder, "-o", target]
    process = subprocess.Popen([*command, "--max-num-seqs", "8"], stderr=subprocess.PIPE)
    try:
        wait_until(lambda: target.exists() and target.read_bytes().count(b"\n") > 20)
        with pytest.raises(OpenNemoError, match="another opennemo batch writes it"):
            offline.run_batch(source, target, read_settings([str(folder)]))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = target.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 20 < kept.count(b"\n") < n
    target.write_bytes(kept + b'{"id":"batch_req_12')  # half a line, as a kill may leave
    with source.open("ab") as file:  # and lines may be added
        file.write(jsonl([request(n)]))
    assert offline.run_batch(source, target, read_settings([str(folder)]))
    assert target.read_bytes().startswith(kept)
    answers = read(target)
    assert Counter(a["custom_id"] for a in answers) == {f"line-{i}": 1 for i in range(n + 1)}
    for answer in answers:
        body = answer["response"]["body"]
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"] and body["object"] == "chat.completion"
        assert body["usage"]["completion_tokens"] in (4, 100) and body["model"] == MODEL
    assert offline.run_batch(source, target, read_settings(["no-such-model-is-needed"]))
    assert len(read(target)) == n + 1


def test_lines_that_are_wrong_say_so_and_the_others_go_on(folder, tmp_path, capsys):
    def said(text: str) -> dict:
        return {"messages": [{"role": "user", "content": text}]}

    good = [
        request(0),
        {"custom_id": "mistral", "body": request(1)["body"]},
        request(2, url="/v1/completions", body={"prompt": "Hello", "max_tokens": 3}),
        request(3, url="/v1/responses", body={"input": "Hello", "max_output_tokens": 3}),
        request(4, body={**request(4)["body"], "model": "mine"}),
    ]
    wrong = [
        (b"{", "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (b'{"custom_id": "\xff"}', "invalid_json_line"),
        (jsonl([{"body": {}}]), "invalid_custom_id"),
        (jsonl([request(10, custom_id=7)]), "invalid_custom_id"),
        (jsonl([request(11, url="/v1/embeddings")]), "invalid_url"),
        (jsonl([request(12, method="GET")]), "invalid_method"),
        (jsonl([request(13, body="Hello")]), "invalid_body"),
        (jsonl([request(14, body={"messages": [], "stream": True})]), "streaming_not_supported"),
        (jsonl([request(0, method="POST")]), "duplicate_custom_id"),
        (jsonl([{**request(15), "custom_id": "line-0"}]), "duplicate_custom_id"),
        (jsonl([request(16, body={"messages": []})]), "invalid_request_error"),
        (jsonl([request(17, body=said("x" * 5000))]), "context_length_exceeded"),
        (jsonl([request(18, body={**request(0)["body"], "model": "other"})]), "model_not_found"),
        (jsonl([request(19, body=said("x" * 2**24))]), "request_too_large"),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line.rstrip(b"\n") for line, _ in wrong]
    source.write_bytes(b"\xef\xbb\xbf" + jsonl(good) + b"\r\n  \n" + b"\r\n".join(lines))
    settings = read_settings([str(folder), "--served-model-name", "mine"])
    assert not offline.run_batch(source, target, settings)
    answers = read(target)
    assert Counter(a["error"] and a["error"]["code"] for a in answers) == Counter(
        [None] * len(good) + [code for _, code in wrong]
    )
    kinds = {a["custom_id"]: a["response"]["body"]["object"] for a in answers if not a["error"]}
    assert kinds == {
        "line-0": "chat.completion", "mistral": "chat.completion", "line-2": "text_completion",
        "line-3": "response", "line-4": "chat.completion",
    }  # fmt: skip
    for answer in answers:
        if answer["error"]:
            assert answer["error"]["message"] and answer["id"].startswith("batch_req_")
            status = (answer["response"] or {"status_code": None})["status_code"]
            assert status in (None, 400, 404, 413, 422)
    assert capsys.readouterr().out.endswith("21 lines, 16 of them with an error\n")


def test_a_full_disk_loses_nothing(folder, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl([request(i) for i in range(40)]))
    write, device = os.write, os.stat(tmp_path).st_dev

    def write_to_a_small_disk(fd: int, data: bytes) -> int:
        status = os.fstat(fd)
        if status.st_dev == device and status.st_ino == target.stat().st_ino:
            room = 9_000 - status.st_size
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data[:room])  # as a disk does: some, then none
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_to_a_small_disk)
        with pytest.raises(OpenNemoError, match="No space left on device; the answers so far"):
            offline.run_batch(source, target, read_settings([str(folder), "--max-num-seqs=4"]))
    n_safe = len(read(target))
    assert 0 < n_safe < 40
    assert offline.run_batch(source, target, read_settings([str(folder)]))
    assert len({a["custom_id"] for a in read(target)}) == len(read(target)) == 40


def test_files_that_cannot_be_meant(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    settings = read_settings(["no-such-model-is-needed"])

    def refused(message: str) -> None:
        with pytest.raises(OpenNemoError, match=message) as caught:
            offline.run_batch(source, target, settings)
        assert "\n" not in str(caught.value)

    refused("in.jsonl: No such file")
    source.write_bytes(b"\n")
    refused("holds no requests")
    source.write_bytes(jsonl([request(0)]))
    for text in ("notes", "notes\n", '{"id":1}\n', '{"id":"batch_req_x"}\n'):  # not ours to cut
        target.write_text(text)
        refused("is not an answer of a batch")
        assert target.read_text() == text
    target.write_bytes(batch.answer_of("batch_req_x", 1, "other", error={}).data)
    refused("1 answers in it are to no line of")
    target.unlink()
    target.mkdir()
    refused("is no file")
    target = source
    refused("is the input, too")


# The server


@pytest.fixture(scope="module")
def shared(running, tiny_llm):
    keys = ["first-key", "second-key"]
    with running(tiny_llm(), api_key=keys, max_batch_lines=1000, max_file_size=10**6) as server:
        yield server


@pytest.fixture(scope="module")
def oai(shared):
    url = f"{shared.url}/v1"
    with openai.OpenAI(base_url=url, api_key="first-key", max_retries=0) as client:
        yield client


def upload(client, lines: list[dict]) -> str:
    return client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch").id


def tiny(i: int, **changes) -> dict:
    line = request(i, **changes)
    line["body"]["model"] = "tiny"
    return line


def finished(client, id: str):
    def is_done() -> bool:
        return client.batches.retrieve(id).status in ("completed", "failed", "cancelled", "expired")

    wait_until(is_done)
    return client.batches.retrieve(id)


def content(client, file: str) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def test_openai_client(oai):
    data = jsonl([tiny(i) for i in range(30)]) + jsonl([tiny(30, max_tokens=-1)])
    file = oai.files.create(file=("in.jsonl", data), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(data), "batch")
    assert oai.files.content(file.id).content == data
    made = oai.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )
    assert made.status == "validating" and made.output_file_id is None
    done = finished(oai, made.id)
    assert done.status == "completed" and done.metadata == {"a": "b"} and done.model == "tiny"
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (31, 30, 1)
    assert made.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.expires_at == done.created_at + 24 * 3600
    answers = content(oai, done.output_file_id)
    assert sorted(a["custom_id"] for a in answers) == sorted(f"line-{i}" for i in range(30))
    assert all(a["response"]["status_code"] == 200 for a in answers)
    assert all(a["response"]["body"]["usage"]["completion_tokens"] == 4 for a in answers)
    (failed,) = content(oai, done.error_file_id)
    assert failed["custom_id"] == "line-30" and failed["response"]["status_code"] == 422
    names = {f.id: f.purpose for f in oai.files.list()}
    assert names[done.output_file_id] == "batch_output" and names[file.id] == "batch"
    assert next(iter(oai.files.list(purpose="batch", limit=1))).id == file.id
    assert done.id in [b.id for b in oai.batches.list(limit=1)]  # several pages
    assert oai.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        oai.files.retrieve(file.id)


def test_a_file_that_is_wrong_fails_before_anything_is_computed(oai):
    wrong = [
        tiny(0), tiny(0), {"custom_id": "x"}, tiny(1, url="/v1/completions"),
        request(2), {**tiny(3), "body": {**tiny(3)["body"], "model": "none"}},
    ]  # fmt: skip
    made = oai.batches.create(
        input_file_id=upload(oai, wrong), endpoint=CHAT, completion_window="24h"
    )
    failed = finished(oai, made.id)
    assert failed.status == "failed" and failed.output_file_id is None
    codes = [(error.line, error.code) for error in failed.errors.data]
    assert codes == [
        (2, "duplicate_custom_id"), (3, "invalid_body"), (4, "mismatched_url"),
        (5, "model_not_found"), (6, "model_not_found"),
    ]  # fmt: skip
    made = oai.batches.create(input_file_id=upload(oai, []), endpoint=CHAT, completion_window="24h")
    assert finished(oai, made.id).errors.data[0].code == "empty_file"
    for change in (
        {"endpoint": "/v1/embeddings"}, {"completion_window": "1000h"}, {"metadata": {"a": 1}},
        {"input_file_id": "file-none"}, {"input_file_id": "../../etc/passwd"},
    ):  # fmt: skip
        given = {"input_file_id": made.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
        with pytest.raises((openai.NotFoundError, openai.UnprocessableEntityError)):
            oai.batches.create(**(given | change))


def test_mistral_client(shared):
    with mistralai.Mistral(server_url=shared.url, api_key="second-key") as client:
        lines = [{"custom_id": str(i), "body": request(i)["body"]} for i in range(5)]
        files = [
            client.files.upload(
                file={"file_name": "in.jsonl", "content": part.strip()}, purpose="batch"
            ).id
            for part in (jsonl(lines[:2]), jsonl(lines[2:]))
        ]
        job = client.batch.jobs.create(
            input_files=files, model="tiny", endpoint=CHAT, metadata={"job": "testing"}
        )
        assert job.status == "QUEUED" and job.input_files == files

        def done(id: str) -> bool:
            return client.batch.jobs.get(job_id=id).status == "SUCCESS"

        wait_until(lambda: done(job.id))
        job = client.batch.jobs.get(job_id=job.id)
        assert (job.total_requests, job.completed_requests, job.succeeded_requests) == (5, 5, 5)
        assert job.completed_at >= job.started_at >= job.created_at and job.error_file is None
        text = client.files.download(file_id=job.output_file).read().decode()
        answers = [json.loads(line) for line in text.splitlines()]
        assert sorted(a["custom_id"] for a in answers) == list("01234")
        inline = client.batch.jobs.create(
            requests=[{"body": request(0)["body"]}, {"body": {"messages": []}}],
            model="tiny", endpoint=CHAT,
        )  # fmt: skip
        wait_until(lambda: done(inline.id))
        outputs = client.batch.jobs.get(job_id=inline.id, inline=True).outputs
        assert [(a["custom_id"], a["response"]["status_code"]) for a in outputs] == [
            ("0", 200), ("1", 422),
        ]  # fmt: skip
        jobs = client.batch.jobs.list(status=["SUCCESS"], model="tiny", page_size=1)
        assert jobs.total == 2 and jobs.data[0].id == inline.id
        assert client.batch.jobs.list(status=["FAILED"]).total == 0
        assert client.files.list(page_size=2).total == 7
        assert client.files.retrieve(file_id=files[0]).sample_type == "batch_request"
        assert client.batch.jobs.delete(job_id=inline.id).deleted


def test_nobody_sees_or_touches_what_is_anothers(shared, oai):
    file = upload(oai, [tiny(0, max_tokens=4)])
    made = oai.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    output = finished(oai, made.id).output_file_id
    with shared.client("second-key") as other:
        mine = {entry["id"] for entry in other.get("/v1/files").json()["data"]}
        mine |= {entry["id"] for entry in other.get("/v1/batches").json()["data"]}
        mine |= {entry["id"] for entry in other.get("/v1/batch/jobs").json()["data"]}
        assert not mine & {file, output, made.id}
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        job = {"input_files": [file, file], "endpoint": CHAT}
        asked = [
            ("GET", f"/v1/files/{file}", None), ("GET", f"/v1/files/{file}/content", None),
            ("GET", f"/v1/files/{output}", None), ("GET", f"/v1/files/{output}/content", None),
            ("DELETE", f"/v1/files/{file}", None), ("GET", f"/v1/batches/{made.id}", None),
            ("POST", f"/v1/batches/{made.id}/cancel", None), ("POST", "/v1/batches", body),
            ("GET", f"/v1/batch/jobs/{made.id}?inline=true", None),
            ("POST", f"/v1/batch/jobs/{made.id}/cancel", None), ("POST", "/v1/batch/jobs", job),
            ("DELETE", f"/v1/batch/jobs/{made.id}", None),
        ]  # fmt: skip
        for method, path, data in asked:
            answer = other.request(method, path, json=data)
            assert answer.status_code == 404, (method, path)
        files = {"file": ("in.jsonl", b"{}")}
        for id in ("x", "%00", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 32):
            assert other.get(f"/v1/files/{id}").status_code == 404
        answer = other.post("/v1/files", files=files, data={"purpose": "fine-tune"})
        assert answer.status_code == 400 and "purpose" in answer.json()["message"]
    assert oai.files.retrieve(file).id == file


def test_a_batch_can_be_cancelled_and_keeps_what_it_has(shared, oai):
    file = upload(oai, [tiny(i, max_tokens=3000 if i else 2) for i in range(40)])
    made = oai.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    wait_until(lambda: oai.batches.retrieve(made.id).request_counts.completed >= 1)
    with pytest.raises(openai.BadRequestError, match="still needs this file"):
        oai.files.delete(file)
    assert oai.batches.cancel(made.id).status == "cancelling"
    done = finished(oai, made.id)
    assert done.status == "cancelled" and done.cancelled_at >= done.cancelling_at
    n_kept = len(content(oai, done.output_file_id))
    assert 1 <= n_kept == done.request_counts.completed < 40
    assert oai.batches.cancel(made.id).status == "cancelled"
    assert oai.files.delete(file).deleted
    wait_until(lambda: not shared.service.active)
    assert shared.llm.engine.cache.n_used == 0


def test_bounds(running, tiny_llm, shared, oai):
    with pytest.raises(openai.APIStatusError) as caught:
        upload(oai, [{}] * 1001)
    assert caught.value.status_code == 413 and "1,000 lines" in str(caught.value)
    with pytest.raises(openai.APIStatusError) as caught:
        oai.files.create(file=("x", b"x" * 1_200_000), purpose="batch")
    assert caught.value.status_code == 413
    with running(tiny_llm(), max_state_size=20_000) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            files = [upload(client, [{"x": "y" * 8000}]) for _ in range(2)]
            with pytest.raises(openai.APIStatusError, match="20,000 bytes; delete some"):
                upload(client, [{"x": "y" * 8000}])
            client.files.delete(files[0])
            upload(client, [{"x": "y" * 8000}])


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


def test_live_requests_take_the_places_of_lines():
    async def begun(n_live: int) -> int:
        slots = batch.Slots(4, lambda: n_live)
        tasks = [asyncio.create_task(slots.take()) for _ in range(10)]
        await asyncio.sleep(0.05)
        n_taken = slots.n_taken
        slots.give()
        await asyncio.sleep(0.05)
        assert slots.n_taken == n_taken  # the next one came
        for task in tasks:
            task.cancel()
        return n_taken

    assert [asyncio.run(begun(n_live)) for n_live in (0, 1, 3, 9)] == [4, 3, 1, 1]


def test_a_killed_server_goes_on_where_it_was(running, folder, tmp_path):
    n, state = 80, tmp_path / "state"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "opennemo.cli", "serve", folder, "--port", str(port)]
    command += ["--state-dir", state, "--api-key", "first-key", "--max-num-batch-seqs", "4"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    lines = [request(i, max_tokens=40) for i in range(n)]
    for line in lines:
        line["body"]["model"] = MODEL
    try:

        def is_ready() -> bool:
            try:
                return httpx2.get(f"http://127.0.0.1:{port}/health").is_success
            except httpx2.TransportError:
                return False

        wait_until(is_ready)
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
            ((status, rest),) = db.execute("SELECT status, rest FROM batches").fetchall()
        assert status == "in_progress" and 20 < json.loads(rest)["n_ok"] < n
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
