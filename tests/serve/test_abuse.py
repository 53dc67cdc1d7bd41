"""A server in a process of its own, under everything that clients do wrong, and under a SIGTERM."""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import time
from collections import Counter
from contextlib import suppress

import httpx2
import pytest

from tests.servers import CHAT, KEY, Server, serving, wait_until

MAX_BODY = 100_000
BODY = {"model": "tiny-folder", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
STREAM = {**BODY, "stream": True, "ignore_eos": True, "max_tokens": 300}


def request(body: bytes, *, path: str = CHAT, key: str = KEY, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n{headers}"
    if "transfer-encoding" not in headers and "content-length" not in headers:
        head += f"content-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Abuser:
    """One client that connects again and again and never behaves in the same way twice."""

    def __init__(self, port: int, seed: int, statuses: Counter):
        self._port, self._rng, self._statuses = port, random.Random(seed), statuses

    async def run(self, deadline: float) -> None:
        kinds = [
            self.ask, self.hang_up_in_a_stream, self.hang_up_in_a_stream, self.hang_up_in_a_request,
            self.send_too_much, self.send_nonsense, self.show_a_bad_key, self.read_slowly,
            self.write_slowly, self.send_two_at_once,
        ]  # fmt: skip
        while time.monotonic() < deadline:
            reader, writer = await self._connect()
            kind = self._rng.choice(kinds)
            try:
                async with asyncio.timeout(30):
                    await kind(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                self._statuses["cut off"] += 1
            except TimeoutError:
                self._statuses[f"{kind.__name__} waits for ever"] += 1
            finally:
                if self._rng.random() < 0.5:  # a reset instead of an orderly end
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, linger
                    )
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self._port))
        return await asyncio.open_connection(sock=raw, limit=8192)

    async def _status(self, reader: asyncio.StreamReader) -> int:
        """Read an answer's head and count its status."""
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        self._statuses[status] += 1
        return status

    async def _read(self, reader: asyncio.StreamReader, n: int) -> None:
        while n > 0 and (data := await reader.read(min(n, 4096))):
            n -= len(data)

    def _body(self) -> dict:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        return self._rng.choice(
            [
                BODY,
                STREAM,
                {**STREAM, "n": 3, "logprobs": True, "top_logprobs": 5},
                {**STREAM, "tools": [tool], "tool_choice": "required"},
                {**BODY, "response_format": {"type": "json_object"}},
                {**BODY, "bad_words": ["a", "bc"], "temperature": 2},
                {**BODY, "messages": [{"role": "user", "content": "x" * 3000}]},
                {**STREAM, "stop": ["e"], "prompt_logprobs": 3},
            ]
        )

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = self._rng.choice([CHAT, CHAT, "/v1/messages", "/v1/responses", "/v1/completions"])
        body = dict(self._body())
        if path != CHAT:  # each protocol has a name of its own for these
            body |= {"input": "Hi", "prompt": "Hi", "max_output_tokens": 20}
            del body["messages"]
        if path == "/v1/messages":
            body["messages"] = BODY["messages"]
        writer.write(request(json.dumps(body).encode(), path=path, headers="connection: close\r\n"))
        await self._status(reader)
        await self._read(reader, 2**30)

    async def hang_up_in_a_stream(self, reader, writer) -> None:
        body = json.dumps(STREAM | self._body()).encode()
        writer.write(request(body, headers="connection: close\r\n"))
        if self._rng.random() < 0.2:  # before there is a word of an answer
            await asyncio.sleep(self._rng.random() * 0.05)
            return
        if await self._status(reader) == 200:
            await self._read(reader, self._rng.randrange(1, 20_000))

    async def hang_up_in_a_request(self, reader, writer) -> None:
        data = request(json.dumps(self._body()).encode())
        writer.write(data[: self._rng.randrange(1, len(data))])
        await writer.drain()
        await asyncio.sleep(self._rng.random() * 0.1)

    async def send_too_much(self, reader, writer) -> None:
        kind = self._rng.randrange(4)
        if kind == 0:  # as it says itself
            writer.write(request(b'{"x":"' + b"y" * MAX_BODY + b'"}'))
        elif kind == 1:  # as turns out while it comes
            writer.write(request(b"", headers="transfer-encoding: chunked\r\n"))
            for _ in range(MAX_BODY // 1000 + 10):
                writer.write(b"3e8\r\n" + b"y" * 1000 + b"\r\n")
            writer.write(b"0\r\n\r\n")
        elif kind == 2:  # headers
            writer.write(request(b"{}", headers=f"x: {'z' * 200_000}\r\n"))
        else:  # a conversation that fits no context
            long = {**BODY, "messages": [{"role": "user", "content": "y" * 30_000}]}
            writer.write(request(json.dumps(long).encode()))
        await self._status(reader)

    async def send_nonsense(self, reader, writer) -> None:
        body = json.dumps(self._body()).encode()
        length = f"content-length: {len(body)}\r\n"
        writer.write(
            self._rng.choice(
                [
                    request(body[: self._rng.randrange(len(body))]),
                    request(os.urandom(200)),
                    request(b"[" * 50_000),
                    request(json.dumps({**BODY, "temperature": "hot"}).encode()),
                    request(json.dumps({**BODY, "logit_bias": {"999999": 1}}).encode()),
                    request(json.dumps({**BODY, "model": "other"}).encode()),
                    request(body, path="/v1/nothing"),
                    request(body, headers=length + "content-length: 3\r\n"),
                    request(b"zz\r\n", headers="transfer-encoding: chunked\r\n"),
                    os.urandom(300) + b"\r\n\r\n",
                    b"GET / HTTP/9.9\r\n\r\n",
                ]
            )
        )
        await self._status(reader)

    async def show_a_bad_key(self, reader, writer) -> None:
        path = self._rng.choice([CHAT, "/v1/models", "/sleep", "/v1/files"])
        key = self._rng.choice(["wrong", "x" * 5000, "", "\xff\xfe"])
        writer.write(request(json.dumps(BODY).encode(), path=path, key=key))
        assert await self._status(reader) in (401, 503)

    async def read_slowly(self, reader, writer) -> None:
        """With a small window, so that the server cannot send its whole answer."""
        long = {**STREAM, "n": 4, "logprobs": True, "top_logprobs": 20, "max_tokens": 500}
        writer.write(request(json.dumps(long).encode()))
        if await self._status(reader) == 200:
            for _ in range(self._rng.randrange(2, 20)):
                await reader.read(300)
                await asyncio.sleep(0.2)

    async def write_slowly(self, reader, writer) -> None:
        data = request(json.dumps(BODY).encode(), headers="connection: close\r\n")
        for start in range(0, len(data), 16):
            writer.write(data[start : start + 16])
            await asyncio.sleep(0.02)
        await self._status(reader)

    async def send_two_at_once(self, reader, writer) -> None:
        writer.write(request(json.dumps(BODY).encode()) * 2)
        if await self._status(reader) == 200:
            await reader.readexactly(50)


def abuse(server: Server, seconds: float, seed: int, n_clients: int = 24) -> Counter:
    """-> how often which status came; other words for connections that gave none."""
    statuses: Counter = Counter()

    async def all() -> None:
        deadline = time.monotonic() + seconds
        abusers = [Abuser(server.port, seed + i, statuses) for i in range(n_clients)]
        await asyncio.gather(*(abuser.run(deadline) for abuser in abusers))

    asyncio.run(all())
    wait_until(lambda: server.is_idle)
    return statuses


@pytest.mark.slow
def test_a_minute_of_abuse_leaves_nothing_behind(folder, tmp_path):
    options = ["--max-num-seqs", "12", "--max-num-queued-reqs", "4", "--max-model-len", "4096"]
    options += ["--max-body-size", str(MAX_BODY)]
    with serving(folder, tmp_path, *options) as server:
        abuse(server, 30, seed=1000)  # let caches and the allocator's arenas fill
        memory, n_files = server.resident_bytes, server.n_descriptors
        statuses = abuse(server, 60, seed=1)
        wait_until(lambda: server.n_descriptors <= n_files + 1)  # sockets take a while to close
        grown = server.resident_bytes - memory
        print(f"{dict(statuses)}; {memory / 2**20:.0f} MB and {grown / 2**20:+.1f} MB")
        print(f"descriptors: {n_files} before, {server.n_descriptors} after")
        good = {200, 400, 401, 404, 405, 413, 422, 431, 503, "cut off"}
        assert statuses.keys() <= good, statuses
        assert {200, 400, 401, 404, 413, 422, 503} <= statuses.keys(), statuses
        assert grown < 12 * 2**20
        assert not {"defect", "failed"} & {event["event"] for event in server.events()}
        answer = httpx2.post(server.url + CHAT, json=BODY, headers={"x-api-key": KEY})
        assert answer.status_code == 200


def test_a_signal_under_load_breaks_no_stream_without_a_word(folder, tmp_path):
    with serving(folder, tmp_path, "--shutdown-timeout", "1.5", "--max-num-seqs", "32") as server:
        ends: Counter = Counter()

        async def stream(client: httpx2.AsyncClient, n_tokens: int) -> None:
            body, lines = {**STREAM, "max_tokens": n_tokens}, []
            async with client.stream("POST", CHAT, json=body) as answer:
                assert answer.status_code == 200
                ends["begun"] += 1
                async for line in answer.aiter_lines():
                    lines += [line] if line else []
            error = json.loads(lines[-1].removeprefix("data: ")) if lines[-1][-1] == "}" else {}
            assert lines[-1] == "data: [DONE]" or error["error"]["message"] == (
                "the server is shutting down"
            )
            ends["finished" if not error else "ended with an error"] += 1

        async def load() -> None:
            headers = {"authorization": f"Bearer {KEY}"}
            limits = httpx2.Limits(max_connections=64)
            async with httpx2.AsyncClient(
                base_url=server.url, headers=headers, timeout=60, limits=limits
            ) as client:
                streams = [stream(client, 20) for _ in range(8)]
                streams += [stream(client, 4000) for _ in range(16)]
                running = asyncio.gather(*streams)
                while ends["begun"] < 24 and not running.done():
                    await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
                while (await client.get("/v1/health/ready")).status_code == 200:
                    await asyncio.sleep(0.01)
                assert not running.done()  # it was not ready before anything had ended
                assert (await client.get("/v1/health/live")).status_code == 200
                refused = await client.post(CHAT, json=BODY)
                assert refused.status_code == 503 and refused.headers["retry-after"]
                await running

        asyncio.run(load())
        # How many finish in time is the machine's affair; the long ones cannot all.
        assert ends["finished"] + ends["ended with an error"] == 24
        assert ends["ended with an error"] > 0
        assert server.process.wait(30) == 0
