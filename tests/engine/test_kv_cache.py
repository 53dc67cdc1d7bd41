"""The page pool by itself: which prefixes are found, and which page goes next."""

import hashlib

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.params import SamplingParams
from opennemo.engine.scoring import plan
from opennemo.engine.sequence import Sequence


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(0, tokens, SamplingParams(), lambda token: None, max_tokens=4)


def test_a_shared_prefix_is_found():
    cache = KVCache(8, 4)
    first, again = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 9])
    cache.extend(first, 5)
    first.n_computed = 5
    cache.publish(first)
    cache.match(again)
    assert again.n_computed == 4 and again.pages == first.pages[:1]


def test_a_collision_of_names_is_not_believed(monkeypatch):
    same = lambda data, **_: hashlib.blake2b(b"")  # noqa: E731
    monkeypatch.setattr("opennemo.engine.kv_cache.blake2b", same)
    cache, first, other = KVCache(8, 4), sequence([1, 2, 3, 4, 5]), sequence([7] * 5)
    cache.extend(first, 5)
    first.n_computed = 5
    cache.publish(first)
    cache.match(other)
    assert other.n_computed == 0


def test_a_page_that_is_shared_in_part_is_copied_from_who_leads_even_when_it_has_ended():
    for ends in (False, True):
        cache = KVCache(8, 4)
        leader, led = plan(1, [([1, 2, 3, 4, 5, 6], [7]), ([1, 2, 3, 4, 5, 9], [7])], print)
        cache.extend(leader, 6)
        leader.n_computed, page = 6, leader.pages[1]
        cache.publish(leader)
        assert led.leader is leader and led.n_shared == 5 and led.is_ready
        if ends:
            cache.release(leader)
        assert cache.match(led) == page and led.n_computed == 5
        assert len(led.pages) == 1 and led.n_cached == 4
        cache.release(led)
        if ends:
            cache.extend(sequence([0] * 32), 32)  # other tokens lie there now
            assert cache.match(led) is None and led.n_computed == 0


def test_salts_do_not_share_and_reset_forgets():
    cache = KVCache(8, 4)
    first, salted = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 5])
    salted.salt = b"tenant"
    cache.extend(first, 5)
    first.n_computed = 5
    cache.publish(first)
    cache.match(salted)
    assert salted.n_computed == 0
    cache.reset()
    again = sequence([1, 2, 3, 4, 5])
    cache.match(again)
    assert again.n_computed == 0
    cache.release(first)
    assert cache.n_used == 0


def test_least_recently_used_prefixes_go_first():
    cache = KVCache(3, 2)
    old, new = sequence([1, 1, 1]), sequence([2, 2, 2])
    for s in (old, new):
        cache.extend(s, 2)
        s.n_computed = 2
        cache.publish(s)
    cache.release(old)
    cache.release(new)
    crowd = sequence([0, 0, 0, 0])
    assert cache.extend(crowd, 4)  # takes the page never used and the oldest prefix
    again_old, again_new = sequence([1, 1, 1]), sequence([2, 2, 2])
    cache.match(again_old)
    cache.match(again_new)
    assert (again_old.n_computed, again_new.n_computed) == (0, 2)
