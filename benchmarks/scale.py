"""Many replicas, simulated: router, scheduler and KV cache as they are, over simulated time.

    python benchmarks/scale.py [--replicas 1 8 64 256 1000] [--per-replica REQUESTS_A_DAY]
                               [--seconds N] [--step BASE TOKEN CONTEXT] [--kv-tokens N]
                               [--plot FILE] [--json FILE]

A discrete-event simulation. `cluster/routing.py` chooses, `engine/scheduler.py` plans every step
and `engine/kv_cache.py` shares every page: the classes themselves, on the ids of every prompt. Only
the model is a stub: a step takes BASE seconds, TOKEN for each token computed and CONTEXT for each
token that is attended to. By default these are fitted to steps of SmolLM2-135M in float32, measured
at the beginning on one thread; for another machine give its own.

It is compared with routers that know no prefixes: round robin, and least loaded (fewest requests
under way). The load grows with the replicas, up to 1,000 replicas and 10 million requests a day.
Conversations begin at random (Poisson); each is of one of four kinds, whose lengths follow
quantiles of real ones (below), behind the system prompt of one of 16 applications; after an answer,
the next turn comes when it was read, at four words a second, and some seconds later.

A row is a router at a number of replicas: time to the first token and of a whole answer, the share
of prompt tokens that were in a cache, and replica-hours for a million generated tokens. The first
third of the time, in which conversations only begin, is left out. Rows of `--json` compare with
the routers that know no prefixes.
"""

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table

from opennemo.cluster.routing import Router
from opennemo.engine.kv_cache import KVCache
from opennemo.engine.params import SamplingParams
from opennemo.engine.scheduler import Scheduler
from opennemo.engine.sequence import Sequence

DAY = 86_400
PAGE, MAX_BATCHED, MAX_SEQUENCES = 16, 512, 64  # the engine's own defaults
N_APPLICATIONS, SYSTEM = 16, 256  # an assumption: prompts that many conversations share
AT = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)


class Kind(NamedTuple):
    """Conversations of a kind: quantiles (at AT) of turns, and of tokens as SmolLM2 counts."""

    share: float
    turns: tuple[int, ...]
    first: tuple[int, ...]  # message of the user
    later: tuple[int, ...]
    answer: tuple[int, ...]


# Every fifth conversation of DSTC8's schema-guided dialogues, XQuAD's questions on a passage, grade
# school maths and GNOME's user guides. The shares are an assumption.
KINDS = {
    "dialogue": Kind(
        0.35, (2, 5, 7, 9, 11, 13, 16, 18), (3, 7, 8, 12, 17, 23, 37, 57),
        (1, 4, 6, 9, 13, 18, 31, 41), (1, 5, 7, 12, 22, 31, 48, 64),
    ),
    "questions": Kind(
        0.15, (1, 3, 3, 3, 3, 3, 5, 5), (55, 256, 350, 541, 847, 1221, 2714, 5398),
        (4, 14, 23, 36, 55, 82, 137, 176), (1, 3, 4, 9, 18, 33, 91, 141),
    ),
    "arithmetic": Kind(
        0.25, (1,) * 8, (21, 37, 45, 57, 72, 91, 130, 150), (1,) * 8,
        (28, 52, 66, 88, 119, 157, 248, 286),
    ),
    "guides": Kind(
        0.25, (1,) * 8, (3, 8, 11, 16, 26, 40, 98, 182), (1,) * 8,
        (56, 153, 253, 387, 590, 1042, 2265, 3359),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of a step: `base + token * tokens computed + context * tokens attended to`."""

    base: float
    token: float
    context: float

    def step(self, n_tokens: int, n_context: int) -> float:
        return self.base + self.token * n_tokens + self.context * n_context


class Routes(Protocol):
    def choose(self, request: str, ids: list[int], salt: bytes = b"") -> str: ...

    def finish(self, request: str) -> None: ...


class RoundRobin:
    """One after the other."""

    def __init__(self, names: list[str]):
        self._turn = itertools.cycle(names)

    def choose(self, request: str, ids: list[int], salt: bytes = b"") -> str:
        return next(self._turn)

    def finish(self, request: str) -> None: ...


class LeastLoaded:
    """The replica with the fewest requests under way; of several, any."""

    def __init__(self, names: list[str]):
        self._load, self._place = dict.fromkeys(names, 0), {}
        self._random = random.Random(0)

    def choose(self, request: str, ids: list[int], salt: bytes = b"") -> str:
        least = min(self._load.values())
        name = self._random.choice([n for n, load in self._load.items() if load == least])
        self._load[name] += 1
        self._place[request] = name
        return name

    def finish(self, request: str) -> None:
        self._load[self._place.pop(request)] -= 1


def by_prefix(names: list[str], kv_tokens: int) -> Router:
    router = Router()
    router.update(dict.fromkeys(names, kv_tokens))
    return router


# ---- what comes -------------------------------------------------------------------------------


def draw(rng: random.Random, quantiles: tuple[int, ...]) -> int:
    """A number that follows quantiles, in straight lines between them."""
    return max(1, round(float(np.interp(rng.random() * AT[-1], AT, quantiles))))


class Conversation:
    """A client that asks, reads, and asks again."""

    numbers = itertools.count(1 << 20, 1 << 20)  # ids that no other text has

    def __init__(self, rng: random.Random, application: int):
        kinds = list(KINDS.values())
        self.kind = rng.choices(kinds, [kind.share for kind in kinds])[0]
        self.n_turns, self.turn = draw(rng, self.kind.turns), 0
        self.ids = list(range(application * SYSTEM, (application + 1) * SYSTEM))
        self._rng = rng

    def ask(self) -> tuple[list[int], int]:
        """The next prompt, and how long its answer will be."""
        n = draw(self._rng, self.kind.later if self.turn else self.kind.first)
        self.turn += 1
        start = next(self.numbers)
        self.ids = [*self.ids, *range(start, start + n)]
        return self.ids, draw(self._rng, self.kind.answer)

    def pause(self, n_answer: int) -> float:
        """Seconds until the next turn: reading, and thinking (an assumption: 15 on average)."""
        return n_answer / 5.3 + self._rng.expovariate(1 / 15)


def beginnings(rng: random.Random, requests_a_day: float, seconds: float) -> Iterator[float]:
    """Start times of conversations that give this many requests a day in the long run."""
    turns = sum(k.share * statistics.fmean(draw(rng, k.turns) for _ in range(500))
                for k in KINDS.values())  # fmt: skip
    now = 0.0
    while (now := now + rng.expovariate(requests_a_day / DAY / turns)) < seconds:
        yield now


# ---- the world --------------------------------------------------------------------------------


@dataclass
class Replica:
    """A scheduler and a KV cache, and a model that only takes time."""

    kv_tokens: int
    times: Times
    busy: bool = False
    chunks: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = KVCache(self.kv_tokens // PAGE, PAGE)
        self.scheduler = Scheduler(self.cache, MAX_BATCHED, MAX_SEQUENCES)

    def begin(self) -> float | None:
        """Plan a step; how long it takes, or None if there is nothing to do."""
        self.chunks = self.scheduler.next_step()
        self.busy = bool(self.chunks)
        if not self.busy:
            return None
        n_context = sum(c.sequence.n_computed + c.n_new for c in self.chunks)
        return self.times.step(sum(c.n_new for c in self.chunks), n_context)

    def end(self) -> Iterator[tuple[Sequence, bool]]:
        """Record the step as the engine does: sequences get a token, and some end."""
        for chunk in self.chunks:
            sequence, reaches_end = chunk.sequence, chunk.reaches_end
            sequence.n_computed += chunk.n_new
            self.cache.publish(sequence)
            if reaches_end:
                sequence.tokens.append(sequence.request_id)
                last = sequence.n_output >= sequence.max_tokens
                if last:
                    self.scheduler.remove(sequence)
                yield sequence, last


class Result(NamedTuple):
    first_p50: float
    first_p99: float
    whole_p50: float
    whole_p99: float
    hit_rate: float
    cost: float  # replica-hours a million generated tokens
    n_requests: int
    in_time: float  # share of what came in that was answered by the end
    decision: float  # seconds of this machine's that a choice took


GREEDY = SamplingParams()


def simulate(
    router: Routes, names: list[str], times: Times, kv_tokens: int, requests_a_day: float,
    seconds: float,
) -> Result:  # fmt: skip
    """Let `seconds` pass."""
    rng = random.Random(1)
    replicas = {name: Replica(kv_tokens, times) for name in names}
    warm, order = seconds / 3, itertools.count()
    shares = [1 / (i + 1) for i in range(N_APPLICATIONS)]  # the first has most of the users
    events: list[tuple[float, int, object]] = []
    for at in beginnings(rng, requests_a_day, seconds):
        application = rng.choices(range(N_APPLICATIONS), shares)[0]
        talk = Conversation(random.Random(rng.random()), application)
        heapq.heappush(events, (at, next(order), talk))
    asked: dict[int, tuple[float, str, Conversation]] = {}
    firsts, wholes, n_tokens, n_prompt, n_cached, decisions = [], [], 0, 0, 0, []
    n_came = n_done = 0
    ids = itertools.count()

    def go(name: str, now: float) -> None:
        duration = replicas[name].begin()
        if duration is not None:
            heapq.heappush(events, (now + duration, next(order), name))

    while events:
        now, _, what = heapq.heappop(events)
        if now > seconds:
            break
        if isinstance(what, Conversation):
            prompt, n_answer = what.ask()
            id = next(ids)
            began = time.perf_counter()
            name = router.choose(str(id), prompt)
            decisions.append(time.perf_counter() - began)
            sequence = Sequence(id, list(prompt), GREEDY, lambda event: None, n_answer)
            replicas[name].scheduler.add(sequence)
            asked[id] = now, name, what
            n_came += now > warm
            if not replicas[name].busy:
                go(name, now)
            continue
        assert isinstance(what, str)
        for sequence, last in replicas[what].end():
            came, name, talk = asked[sequence.request_id]
            counts = came > warm
            n_tokens += now > warm
            if sequence.n_output == 1 and counts:
                firsts.append(now - came)
                n_prompt += sequence.n_prompt
                n_cached += sequence.n_cached
            if last:
                router.finish(str(sequence.request_id))
                del asked[sequence.request_id]
                if counts:
                    wholes.append(now - came)
                    n_done += 1
                if talk.turn < talk.n_turns:
                    talk.ids = sequence.tokens
                    pause = talk.pause(sequence.max_tokens)
                    heapq.heappush(events, (now + pause, next(order), talk))
        go(what, now)
    quantile = lambda values, q: float(np.quantile(values, q)) if values else float("nan")  # noqa: E731
    return Result(
        quantile(firsts, 0.5), quantile(firsts, 0.99), quantile(wholes, 0.5),
        quantile(wholes, 0.99), n_cached / max(1, n_prompt),
        len(names) * (seconds - warm) / 3600 / max(1, n_tokens) * 1e6,
        n_came, n_done / max(1, n_came), statistics.median(decisions),
    )  # fmt: skip


# ---- how long a step takes --------------------------------------------------------------------


def measured() -> Times:
    """Fitted to steps of the small model in float32, on one thread of this machine."""
    from opennemo.engine.runner import Runner
    from opennemo.engine.sequence import Chunk
    from opennemo.engine.sizes import CacheSize
    from opennemo.model.checkpoint import load
    from opennemo.model.hub import locate

    torch.set_num_threads(1)
    model = load(locate("smollm2-135m-instruct"), dtype=torch.float32)
    size = CacheSize(n_pages=1024, n_spare=0, page_size=PAGE, format="fp32", scale=None)
    runner = Runner(model, size)
    cases, seconds = [], []
    # (sequences, tokens computed of each, tokens before them)
    for n, new, past in ((1, 1, 64), (1, 1, 1500), (8, 1, 256), (32, 1, 256), (32, 1, 448),
                         (1, 256, 0), (1, 256, 1024), (2, 256, 0)):  # fmt: skip
        chunks = []
        for i in range(n):
            sequence = Sequence(i, [5] * (past + new), GREEDY, lambda event: None, 1)
            sequence.n_computed = past
            width = -(-(past + new) // PAGE)
            sequence.pages = list(range(i * width, (i + 1) * width))
            chunks.append(Chunk(sequence, new))
        tries = []
        for _ in range(3):
            began = time.process_time()  # of one thread, so that other work does not count
            runner.run(chunks)
            tries.append(time.process_time() - began)
        cases.append((1, n * new, n * (past + new)))
        seconds.append(min(tries))
    weights = 1 / np.array(seconds)  # so that errors count by their share
    solution = np.linalg.lstsq(
        np.array(cases) * weights[:, None], np.array(seconds) * weights, rcond=None
    )[0]
    return Times(*(max(0.0, float(x)) for x in solution))


# ---- the tables -------------------------------------------------------------------------------


ROUTERS = {
    "by prefix": by_prefix,
    "least loaded": lambda names, kv_tokens: LeastLoaded(names),
    "round robin": lambda names, kv_tokens: RoundRobin(names),
}


def table_of(results: dict[int, dict[str, Result]], per_replica: float) -> Table:
    columns = ("replicas", "requests a day", "router", "first p50", "p99", "answer p50", "p99")
    table = Table(*columns, "cached", "h / M tokens", "answered", "a choice")
    for n, of_router in results.items():
        for router, r in of_router.items():
            table.add_row(
                f"{n:,}", f"{n * per_replica:,.0f}", router, f"{r.first_p50:.2f} s",
                f"{r.first_p99:.2f} s", f"{r.whole_p50:.1f} s", f"{r.whole_p99:.1f} s",
                f"{r.hit_rate:.0%}", f"{r.cost:.2f}", f"{r.in_time:.0%}",
                f"{1e6 * r.decision:.0f} µs",
            )  # fmt: skip
    return table


def rows_of(results: dict[int, dict[str, Result]]) -> list[Row]:
    rows = []
    for n, of_router in results.items():
        ours = of_router["by prefix"]
        for peer, other in of_router.items():
            if peer == "by prefix":
                continue
            for name, mine, theirs, unit in (
                ("first token, p50", ours.first_p50, other.first_p50, "s"),
                ("first token, p99", ours.first_p99, other.first_p99, "s"),
                ("whole answer, p99", ours.whole_p99, other.whole_p99, "s"),
                ("not from the cache", 1 - ours.hit_rate, 1 - other.hit_rate, "of prompt tokens"),
            ):
                rows.append(
                    Row(
                        name=f"{name}, {n:,} replicas",
                        ours=mine,
                        peer=theirs,
                        peer_name=peer,
                        unit=unit,
                        ratio=theirs / mine,
                    )
                )
    return rows


def plot(results: dict[int, dict[str, Result]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), dpi=80)
    for router in ROUTERS:
        xs = [n for n, of_router in results.items() if router in of_router]
        found = [results[n][router] for n in xs]
        axes[0].plot(xs, [r.first_p50 for r in found], marker="o", ms=3, label=router)
        axes[1].plot(xs, [r.first_p99 for r in found], marker="o", ms=3)
        axes[2].plot(xs, [100 * r.hit_rate for r in found], marker="o", ms=3)
    titles = ("first token, p50, seconds", "first token, p99, seconds", "prompts from a cache, %")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xscale="log", xlabel="replicas")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 256, 1000])
    parser.add_argument("--per-replica", type=float, default=10_000, help="requests a day")
    parser.add_argument("--seconds", type=float, default=600, help="of the simulated world")
    parser.add_argument("--step", type=float, nargs=3, help="seconds: BASE TOKEN CONTEXT")
    parser.add_argument("--kv-tokens", type=int, default=16_384, help="that a replica keeps")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    times = Times(*options.step) if options.step else measured()
    where = "given" if options.step else "measured here, SmolLM2-135M in float32, one thread"
    console.print(
        f"A step ({where}): {1e3 * times.base:.2f} ms + {1e3 * times.token:.3f} ms a token + "
        f"{1e6 * times.context:.2f} µs a token attended to"
    )
    results: dict[int, dict[str, Result]] = {}
    for n in options.replicas:
        names, results[n] = [f"r{i}" for i in range(n)], {}
        for router, make in ROUTERS.items():
            began = time.perf_counter()
            result = simulate(
                make(names, options.kv_tokens), names, times, options.kv_tokens,
                n * options.per_replica, options.seconds,
            )  # fmt: skip
            results[n][router] = result
            spent = f"{time.perf_counter() - began:.0f} s of this machine"
            print(f"{n:,} replicas, {router}, {spent}: {result}", flush=True)
    console.print(table_of(results, options.per_replica))
    if options.plot:
        plot(results, options.plot)
    write_rows(rows_of(results), options.json)


if __name__ == "__main__":
    main()
