"""Steps on a thread of their own: requests come at any time, and none is left waiting."""

import random
import threading
from collections import defaultdict
from copy import deepcopy
from queue import Queue

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token

EOS = 7


def test_threads_submit_and_cancel_at_any_time(model):
    engine = LocalEngine(
        deepcopy(model), [], EngineConfig(page_size=4, n_pages=40, max_queued=10_000)
    )
    engine.start()
    ends: dict[int, list[Token]] = defaultdict(list)
    done = threading.Semaphore(0)

    def listen(event: Token) -> None:
        if event.finish_reason:
            ends[event.request_id].append(event)
            done.release()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            prompt = [rng.randrange(320) for _ in range(rng.randint(1, 40))]
            id = engine.submit(prompt, SamplingParams(max_tokens=rng.randint(1, 30)), listen)
            if rng.random() < 0.5:
                engine.cancel(id)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(100):
        assert done.acquire(timeout=60)
    engine.stop()
    assert len(ends) == 100 and all(len(events) == 1 for events in ends.values())
    assert engine.cache.n_used == 0


def test_stopping_cancels_what_is_left(model):
    engine = LocalEngine(deepcopy(model), [])
    heard: list[Token] = []
    engine.start()
    engine.submit([1], SamplingParams(max_tokens=250), heard.append)
    engine.stop()
    assert heard[-1].finish_reason == "cancelled"


def test_a_defect_in_a_step_leaves_nobody_waiting(model, monkeypatch):
    engine = LocalEngine(deepcopy(model), [])
    heard: Queue[Token] = Queue()
    run, failures = engine.runner.run, iter([KeyError("a defect")])

    def sometimes(chunks):
        for failure in failures:
            raise failure
        return run(chunks)

    monkeypatch.setattr(engine.runner, "run", sometimes)
    engine.start()
    engine.submit([1], SamplingParams(max_tokens=1), heard.put)
    assert "engine failed" in str(heard.get(timeout=60).error)
    engine.submit([1], SamplingParams(max_tokens=1), heard.put)
    assert heard.get(timeout=60).finish_reason == "length"
    engine.stop()
    assert engine.cache.n_used == 0
