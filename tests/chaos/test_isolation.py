"""Keys do not see each other: one key's requests save another no work, and show nowhere.

Timing follows from what is computed, so the tests count tokens: those in `usage`, which the client
sees, and those that the model itself was given.
"""

import hashlib
import json

import pytest

from tests.servers import CHAT, wait_until

KEYS = ["the-key-of-alice", "the-key-of-bob"]
PROMPT = "a secret that is long enough to fill many pages of the cache " * 4
BODY = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}


class Asked:
    """A server, and how many tokens its model computes for each request."""

    def __init__(self, server):
        self.server, self.n_computed = server, 0
        run = server.llm.engine.runner.run

        def count(chunks):
            self.n_computed += sum(len(chunk.tokens) for chunk in chunks)
            return run(chunks)

        server.llm.engine.runner.run = count

    def __call__(self, key: str, path: str = CHAT, **fields) -> tuple[dict, int]:
        """-> (usage, tokens computed)."""
        before = self.n_computed
        with self.server.client(key) as http:
            answer = http.post(path, json={**BODY, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"], self.n_computed - before


def test_what_one_key_asked_looks_new_to_another(running, tiny_llm):
    with running(tiny_llm(), api_key=KEYS) as server:
        ask = Asked(server)
        alone = ask(KEYS[1])  # before anybody else has asked
        warm = ask(KEYS[1])
        assert warm[0]["prompt_tokens_details"]["cached_tokens"] > 200 and warm[1] < alone[1] - 200
        server.llm.engine.cache.reset()
        ask(KEYS[0])  # now alice has the same prompt in the cache
        assert ask(KEYS[0])[1] == warm[1]
        assert (
            ask(KEYS[1]) == alone
        )  # and bob's answer reveals nothing about it: not in work, not in words
        assert ask(KEYS[1]) == warm


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/completions"])
def test_every_protocol_keeps_keys_apart(running, tiny_llm, path):
    fields = {"prompt": PROMPT, "input": PROMPT, "max_output_tokens": 2}
    with running(tiny_llm(), api_key=KEYS) as server:
        ask = Asked(server)
        cold, again = ask(KEYS[0], path, **fields), ask(KEYS[0], path, **fields)
        assert again[1] < cold[1] - 200
        assert ask(KEYS[1], path, **fields) == cold


def test_two_keys_of_one_name_are_two_keys(running, tiny_llm, tmp_path):
    lines = [f"team {hashlib.sha256(key.encode()).hexdigest()}" for key in KEYS]
    (tmp_path / "keys").write_text("\n".join(lines))
    with running(tiny_llm(), api_key_file=tmp_path / "keys") as server:
        ask = Asked(server)
        assert ask(KEYS[0]) == ask(KEYS[1])


def test_a_salt_cannot_lead_into_another_key_s_pages(running, tiny_llm):
    digest = hashlib.sha256(KEYS[0].encode()).hexdigest()
    with running(tiny_llm(), api_key=KEYS) as server:
        ask = Asked(server)
        cold = ask(KEYS[0])
        for salt in (digest, "alice", f"{digest[:60]}"):
            assert ask(KEYS[1], cache_salt=salt) == cold


def test_keys_share_where_the_server_is_told_so(running, tiny_llm):
    with running(tiny_llm(), api_key=KEYS, share_prefix_cache=True) as server:
        ask = Asked(server)
        cold = ask(KEYS[0])
        warm = ask(KEYS[1])
        assert warm[1] < cold[1] - 200 and warm == ask(KEYS[0])
        assert ask(KEYS[1], cache_salt="mine") == cold  # who wants to be alone still can


def test_batches_keep_keys_apart(running, tiny_llm):
    line = json.dumps({"custom_id": "1", "method": "POST", "url": CHAT, "body": BODY}).encode()
    with running(tiny_llm(), api_key=KEYS) as server:
        cached = []
        for key in (KEYS[0], KEYS[1], KEYS[0]):
            with server.client(key) as http:
                file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": line})
                asked = {"endpoint": CHAT, "completion_window": "24h"}
                asked["input_file_id"] = file.json()["id"]
                batch = http.post("/v1/batches", json=asked).json()["id"]
                url = f"/v1/batches/{batch}"
                wait_until(lambda http=http, url=url: http.get(url).json()["output_file_id"])
                output = http.get(url).json()["output_file_id"]
                body = http.get(f"/v1/files/{output}/content").json()["response"]["body"]
                cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[:2] == [0, 0] and cached[2] > 200
