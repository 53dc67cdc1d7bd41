"""Which replica answers a request: the one that has the least to compute until it is done.

Replicas keep the prompts they have computed, so the one that answered a conversation before need
not compute its beginning again. What a replica would have to compute for a request (tokens that it
has not seen) and what it is computing already are both counted in tokens, and the smallest sum
wins: a conversation returns to its cache, unless the queue there outweighs its beginning. Both aims
are in one number, so no threshold between them is needed.

The router does not ask what a replica holds. It remembers what was sent there: prompts in chunks,
each named by a hash over all before it, forgotten in the order in which the replica forgets them. A
wrong guess costs time, never an answer. This file knows no Ray, no HTTP and no clock, so that a
simulation runs it as it is (benchmarks/scale.py). The sum is that of Preble (arXiv:2407.00023), in
tokens; Ray's own router for prefixes takes turns between two rules instead.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

CHUNK = 64  # tokens; shorter ones find more and cost more memory, some 200 bytes each
CAPACITY = 1 << 17  # tokens that a replica keeps, until it has reported how many
SEQUENCE = 256  # tokens that an answer under way counts for, besides its prompt: see docs/scale.md


@dataclass
class Memory:
    capacity: int = CAPACITY
    work: int = 0  # tokens
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)  # chunks, oldest use first


class Router:
    """Remembers what was sent where, and chooses."""

    def __init__(self, chunk: int = CHUNK, sequence: int = SEQUENCE):
        self._chunk, self._sequence = chunk, sequence
        self.replicas: dict[str, Memory] = {}
        self.holders: dict[int, set[str]] = {}  # of a chunk
        self._under_way: dict[str, tuple[str, int]] = {}  # by request: where, and its work

    def update(self, replicas: dict[str, int | None]) -> None:
        """Set which replicas there are, and how many tokens each keeps, if that is known."""
        for name in self.replicas.keys() - replicas.keys():
            for key in self.replicas.pop(name).kept:
                self._forget(key, name)
            lost = [request for request, (place, _) in self._under_way.items() if place == name]
            for request in lost:
                del self._under_way[request]
        for name, capacity in replicas.items():
            replica = self.replicas.setdefault(name, Memory())
            replica.capacity = capacity or replica.capacity

    def choose(
        self, request: str, ids: list[int], salt: bytes = b"", among: Iterable[str] | None = None
    ) -> str:
        """The replica for a request, which counts as its work until `finish`; "" if there is none.

        Choosing again for the same request moves it. Replicas share no pages between salts.
        """
        self.finish(request)
        keys = self._keys(ids, salt)
        cached = self._find(keys)

        def cost(name: str) -> tuple[int, int]:
            replica = self.replicas[name]
            # Of two that are as good, the one that has more room to remember.
            return replica.work - cached.get(name, 0), len(replica.kept)

        names = self.replicas if among is None else [n for n in among if n in self.replicas]
        if not names:
            return ""
        name = min(names, key=cost)
        work = len(ids) - cached.get(name, 0) + self._sequence
        self.replicas[name].work += work
        self._under_way[request] = name, work
        self._remember(name, keys)
        return name

    def place(self, request: str) -> str:
        """Where a request is under way; "" if it is not."""
        return self._under_way.get(request, ("", 0))[0]

    def finish(self, request: str) -> None:
        """Record that a request has ended, in any way; unknown ones are ignored."""
        if request in self._under_way:
            name, work = self._under_way.pop(request)
            self.replicas[name].work -= work

    def _keys(self, ids: list[int], salt: bytes) -> list[int]:
        """Names of a prompt's whole chunks; the last token is always computed."""
        key, keys = hash(salt), []
        for start in range(0, len(ids) - self._chunk, self._chunk):
            key = hash((key, array("q", ids[start : start + self._chunk]).tobytes()))
            keys.append(key)
        return keys

    def _find(self, keys: list[int]) -> dict[str, int]:
        """How many tokens of a prompt each replica holds, of those that hold any."""
        cached: dict[str, int] = {}
        holders: set[str] = set(self.replicas)
        for depth, key in enumerate(keys):
            here = self.holders.get(key, set())
            for name in holders - here:
                cached[name] = depth * self._chunk
            holders = holders & here
            if not holders:
                break
        for name in holders:
            cached[name] = len(keys) * self._chunk
        return cached

    def _remember(self, name: str, keys: list[int]) -> None:
        replica = self.replicas[name]
        for key in reversed(keys):  # the end of a prefix is forgotten before its start
            replica.kept[key] = None
            replica.kept.move_to_end(key)
            self.holders.setdefault(key, set()).add(name)
        while len(replica.kept) * self._chunk > replica.capacity:
            key, _ = replica.kept.popitem(last=False)
            self._forget(key, name)

    def _forget(self, key: int, name: str) -> None:
        holders = self.holders[key]
        holders.discard(name)
        if not holders:
            del self.holders[key]
