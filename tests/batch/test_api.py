"""Batches by OpenAI's and Mistral's clients: both see the same, and only what is theirs."""

import json

import pytest

from tests.batch.conftest import CHAT, content, finished, jsonl, request, tiny, upload, wait_until

mistralai = pytest.importorskip("mistralai.client")
openai = pytest.importorskip("openai")


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
