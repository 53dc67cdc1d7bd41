"""API keys, hashed at rest, each with limits of its own.

Keys are random and long, so SHA-256 is enough; every known key is compared with each time, in
constant time, so that timing reveals nothing. Limits are windows that move with a clock that nobody
can set: with the time of day, a clock that is put back would lock a key out.
"""

import hashlib
import hmac
import re
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

from opennemo.errors import InvalidRequest
from opennemo.progress import count
from opennemo.serve.error_bodies import Refusal

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MINUTE = 60  # seconds


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What one key may ask for; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0


class Window:
    """How much was used within the last minute.

    What exceeds `limit` counts in the minutes that follow, a limit in each, so that the mean holds.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit  # 0: unlimited
        self._used: deque[tuple[float, int]] = deque()  # from when it counts, and how much
        self._total = 0

    def add(self, n: int) -> None:
        begins = self._forget()
        while n and self._limit:
            minutes, n_there = divmod(self._total, self._limit)
            part = min(n, self._limit - n_there)
            last = self._used[-1][0] if self._used else 0
            self._used.append((max(last, begins + MINUTE * (minutes + 1)), part))
            self._total, n = self._total + part, n - part

    def wait(self, n_expected: int = 0) -> float:
        """Seconds until less than the limit is used; 0 if it is, or if there is no limit.

        Expected tokens count as used. When they end is unknown, so the wait for them is 1 second.
        """
        begins = self._forget()
        too_many = self._total - self._limit  # 0 is one too many as well
        if not self._limit or too_many + n_expected < 0:
            return 0
        if too_many < 0:
            return 1
        for at, n in self._used:
            too_many -= n
            if too_many < 0:
                return at - begins
        raise AssertionError("what was used makes up the total")

    def _forget(self) -> float:
        """Drop what counts no longer; where the minute that counts begins."""
        begins = time.monotonic() - MINUTE
        while self._used and self._used[0][0] <= begins:
            self._total -= self._used.popleft()[1]
        return begins


@dataclass(eq=False)
class Client:
    """A client with a key, or all clients where no key is required."""

    name: str
    limits: KeyLimits
    digest: bytes = b""
    n_running: int = field(default=0, init=False)
    n_expected: int = field(default=0, init=False)  # tokens that running requests may use

    def __post_init__(self) -> None:
        self.requests = Window(self.limits.requests_per_minute)
        self.tokens = Window(self.limits.tokens_per_minute)


class Gatekeeper:
    """Knows the keys and keeps the limits."""

    def __init__(self, clients: list[Client], limits: KeyLimits, admin_key: str | None = None):
        self.clients = clients
        self.anonymous = Client("anonymous", limits)
        self.admin_digest = hash_key(admin_key) if admin_key else None

    def identify(self, headers: dict[bytes, bytes]) -> Client:
        """The client whose key is in `Authorization: Bearer` or `x-api-key`.

        Raises:
            Refusal: 401, no key or an unknown one.
        """
        if not self.clients:
            return self.anonymous
        digest, match = _presented(headers), None
        for client in self.clients:
            if hmac.compare_digest(digest, client.digest):
                match = client
        if match is None:
            raise _unauthorised()
        return match

    def check_admin(self, headers: dict[bytes, bytes]) -> None:
        """Raises: Refusal, 401, unless the admin key is given."""
        if not hmac.compare_digest(_presented(headers), self.admin_digest or b""):
            raise _unauthorised()

    def admit(self, client: Client, n_expected: int = 0, *, is_part: bool = False) -> None:
        """Count a new request, with the tokens that it may use; `release` must follow.

        For a request in parts, only the first part is checked against the token limit.

        Raises:
            Refusal: 429, one of the client's limits is reached.
        """
        limits = client.limits
        if limits.max_concurrent and client.n_running >= limits.max_concurrent:
            raise _too_much(f"{count(limits.max_concurrent, 'request')} at the same time", 1)
        wait = client.tokens.wait(client.n_expected)
        if wait and not is_part:
            raise _too_much(f"{count(limits.tokens_per_minute, 'token')} a minute", wait)
        if wait := client.requests.wait():
            raise _too_much(f"{count(limits.requests_per_minute, 'request')} a minute", wait)
        client.requests.add(1)
        client.n_running += 1
        client.n_expected += n_expected

    def release(self, client: Client, n_tokens: int, n_expected: int = 0) -> None:
        """Record the end of a request, with the tokens that it used instead of those expected."""
        client.n_running -= 1
        client.n_expected -= n_expected
        client.tokens.add(n_tokens)


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_clients(keys: list[str], file: Path | None, limits: KeyLimits) -> list[Client]:
    """Clients from keys in the clear, and from a file of lines `NAME SHA256 [LIMIT=NUMBER ...]`.

    Raises:
        InvalidRequest: a line that cannot be read; keys themselves are never shown.
    """
    clients = [Client(f"key-{i}", limits, hash_key(key)) for i, key in enumerate(keys, 1)]
    if file is None:
        return clients
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not (words := line.split("#")[0].split()):
            continue
        own = dict(word.split("=", 1) for word in words[2:] if "=" in word)
        are_limits = own.keys() <= vars(limits).keys() and all(v.isdecimal() for v in own.values())
        if len(own) != len(words[2:]) or not are_limits:
            raise InvalidRequest(f"{file}, line {number}: limits are {', '.join(vars(limits))}")
        if len(words) < 2 or not re.fullmatch("[0-9a-fA-F]{64}", words[1]):
            raise InvalidRequest(
                f"{file}, line {number}: expected NAME and the key's SHA-256 in hex"
            )
        own = replace(limits, **{name: int(value) for name, value in own.items()})
        clients.append(Client(words[0], own, bytes.fromhex(words[1])))
    return clients


def _presented(headers: dict[bytes, bytes]) -> bytes:
    """The digest of a request's key; without a key b"", which is no key's digest."""
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not key:
        key = headers.get(b"x-api-key", b"").decode("latin-1")
    return hash_key(key.strip()) if key.strip() else b""


def _unauthorised() -> Refusal:
    return Refusal(
        401, "no valid API key: send one as `Authorization: Bearer KEY`", code="invalid_api_key"
    )


def _too_much(limit: str, wait: float) -> Refusal:
    return Refusal(
        429, f"this key is limited to {limit}", code="rate_limit_exceeded", retry_after=wait
    )
