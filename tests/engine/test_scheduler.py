"""The scheduler and the page pool by themselves: plain Python, driven with random requests."""

from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.params import SamplingParams
from opennemo.engine.scheduler import Scheduler, look_up
from opennemo.engine.sequence import Sequence

VOCAB = 3  # few, so that prefixes coincide


def sequence(tokens: list[int], max_tokens: int = 4, request_id: int = 0) -> Sequence:
    return Sequence(request_id, tokens, SamplingParams(), lambda event: None, max_tokens)


def check_pages(scheduler: Scheduler) -> None:
    cache = scheduler.cache
    users = [0] * cache.n_pages
    for s in scheduler.running:
        assert len(s.pages) * cache.page_size >= s.n_computed
        for page in s.pages:
            users[page] += 1
    assert all(not s.pages for s in scheduler.waiting)
    assert users == [page.n_users for page in cache._pages]
    assert set(cache._free) == {i for i, n in enumerate(users) if n == 0}


requests = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), st.integers(1, 9)
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=st.lists(st.lists(requests, max_size=3), min_size=1, max_size=12),
    cancels=st.lists(st.integers(0, 30), max_size=12),
    n_pages=st.integers(8, 12),
    budget=st.integers(1, 12),
    prefix_caching=st.booleans(),
)
def test_pages_never_leak_and_everyone_is_served(
    arrivals, cancels, n_pages, budget, prefix_caching
):
    """30 tokens at most a sequence, 4 a page: one fits alone, several must preempt each other."""
    cache = KVCache(n_pages, 4, prefix_caching)
    scheduler = Scheduler(cache, max_batched_tokens=budget, max_sequences=4)
    alive, served, n = [], 0, 0
    for round in range(2000):
        for tokens, max_tokens in arrivals[round] if round < len(arrivals) else []:
            n += 1
            alive.append(sequence(list(tokens), max_tokens, n))
            scheduler.add(alive[-1])
        if round < len(cancels) and cancels[round] < len(alive):
            scheduler.remove(alive.pop(cancels[round]))
            served += 1
        chunks = scheduler.next_step()
        check_pages(scheduler)
        assert sum(len(c.tokens) for c in chunks) <= budget
        assert len({id(c.sequence) for c in chunks}) == len(chunks)
        for chunk in chunks:
            s, ends = chunk.sequence, chunk.reaches_end
            s.n_computed += chunk.n_new
            cache.publish(s)
            if ends:
                s.tokens.append((sum(s.tokens) + len(s.tokens)) % VOCAB)
                if s.n_output >= s.max_tokens:
                    scheduler.remove(s)
                    alive.remove(s)
                    served += 1
        if not alive and round >= len(arrivals):
            break
    assert not alive and served == n
    assert cache.n_used == 0


def test_a_shared_prefix_is_found_and_a_collision_is_not_believed():
    cache = KVCache(8, 4)
    first, again, other = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 9]), sequence([7] * 5)
    cache.extend(first, 5)
    first.n_computed = 5
    cache.publish(first)
    cache.match(again)
    assert again.n_computed == 4 and again.pages == first.pages[:1]
    key, _ = cache._name(other, 0)
    cache._by_key[key] = first.pages[0]  # as if two prefixes had the same hash
    cache.match(other)
    assert other.n_computed == 0


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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5))
def test_look_up_quotes_what_followed(tokens, n):
    guess = look_up(tokens, n)
    assert len(guess) <= n
    if guess:
        at = [i for i in range(len(tokens)) if tuple(tokens[i : i + len(guess)]) == guess]
        assert any(tokens[i - 1] == tokens[-1] for i in at if i > 0)
    else:
        assert tokens[-1] not in tokens[:-1]
