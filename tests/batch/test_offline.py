"""`opennemo batch`: every line is answered once, whatever ends the command."""

import errno
import os
import signal
import subprocess
from collections import Counter

import pytest

from opennemo.batch import lines as batch
from opennemo.batch import offline
from opennemo.errors import OpenNemoError
from opennemo.serve.settings import read_settings
from tests import processes
from tests.batch.conftest import MODEL, jsonl, read, request, wait_until


def test_a_kill_repeats_and_loses_nothing(folder, tmp_path):
    source, target, n = tmp_path / "in.jsonl", tmp_path / "out.jsonl", 120
    source.write_bytes(jsonl([request(i, max_tokens=100) for i in range(n)]))
    command = ["-m", "opennemo.cli", "batch", source, folder, "-o", target, "--max-num-seqs", "8"]
    process = processes.start(*command, stderr=subprocess.DEVNULL)
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
    target.write_bytes(batch.output_line("batch_req_x", 1, "other", error={}).data)
    refused("holds 1 answer to no line of")
    target.unlink()
    target.mkdir()
    refused("is not a file")
    target = source
    refused("is also the input")
