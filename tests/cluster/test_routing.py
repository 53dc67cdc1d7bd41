"""The router by itself: no Ray, no server, no clock."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.cluster.routing import CHUNK, SEQUENCE, Router


def prompt(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=n)


def make_router(n: int = 3, **options) -> Router:
    router = Router(**options)
    router.update({f"r{i}": None for i in range(n)})
    return router


def test_a_conversation_returns_to_its_replica():
    router, places = make_router(), {}
    for talk in range(9):
        places[talk] = router.choose(f"{talk}", prompt(talk, 500))
        router.finish(f"{talk}")
    assert set(places.values()) == {"r0", "r1", "r2"}  # idle ones take turns, for room to remember
    for talk in random.Random(0).sample(range(9), 9):
        assert router.choose(f"{talk} again", prompt(talk, 500) + [7] * 100) == places[talk]
        router.finish(f"{talk} again")


def test_a_queue_that_is_longer_than_the_beginning_is_worth_sends_it_elsewhere():
    router, talk = make_router(2), prompt(0, 10 * CHUNK)
    home = router.choose("first", talk)
    router.finish("first")
    n_stay = 0
    while router.choose(f"{n_stay}", [*talk, *prompt(n_stay, 30)], among=[home]):
        n_stay += 1
        place = router.choose("asks", talk)
        router.finish("asks")
        if place != home:
            break
    # Each that waits there counts for a sequence and what it must compute.
    assert n_stay == pytest.approx(10 * CHUNK / (SEQUENCE + 30), abs=1)


def test_equal_loads_are_shared_evenly():
    router, counts = make_router(4), dict.fromkeys([f"r{i}" for i in range(4)], 0)
    for i in range(400):
        counts[router.choose(f"{i}", prompt(i, 100))] += 1
    assert set(counts.values()) == {100}


def test_prompts_of_another_salt_are_not_found():
    router, talk = make_router(2), prompt(0, 500)
    home = router.choose("a", talk, b"one key")
    router.finish("a")
    assert router.choose("b", talk, b"another key") != home


def test_a_replica_that_is_gone_takes_its_memory_and_its_work_along():
    router, talk = make_router(2), prompt(0, 500)
    home = router.choose("a", talk)
    (other,) = {"r0", "r1"} - {home}
    router.update({other: None})
    assert router.choose("b", talk) == other
    router.update({other: None, home: None})
    router.finish("a")  # which ran on the one before
    assert router.choose("c", prompt(1, 100)) == home
    assert router.choose("b", talk) == other  # again: the request is moved, not counted twice


@settings(deadline=None)
@given(st.data())
def test_what_is_remembered_stays_within_bounds_and_work_returns_to_nothing(data: st.DataObject):
    router = Router(chunk=4, sequence=5)
    names = [f"r{i}" for i in range(4)]
    router.update(dict.fromkeys(names, 40))
    alive, open_requests = set(names), set()
    for i in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["ask", "ask", "ask", "end", "replicas"])):
            case "ask":
                ids = data.draw(st.lists(st.integers(0, 2), max_size=60))
                assert router.choose(f"{i}", ids) in alive
                open_requests.add(f"{i}")
            case "end" if open_requests:
                router.finish(open_requests.pop())
            case "replicas":
                alive = data.draw(st.sets(st.sampled_from(names), min_size=1))
                router.update(dict.fromkeys(alive, 40))
    for request in open_requests:
        router.finish(request)
    assert router.replicas.keys() == alive
    assert all(replica.work == 0 for replica in router.replicas.values())
    assert all(len(replica.kept) <= 10 for replica in router.replicas.values())
    held = {(key, name) for name, r in router.replicas.items() for key in r.kept}
    assert held == {(key, name) for key, who in router.holders.items() for name in who}
