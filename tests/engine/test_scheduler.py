"""The scheduler by itself: plain Python, driven with random requests."""

from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.params import SamplingParams
from opennemo.engine.scheduler import Scheduler
from opennemo.engine.scoring import plan
from opennemo.engine.sequence import Sequence

VOCAB = 3  # few, so that prefixes coincide
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)


def sequence(tokens: list[int], max_tokens: int = 4, request_id: int = 0) -> Sequence:
    return Sequence(request_id, tokens, SamplingParams(), lambda token: None, max_tokens)


def check_pages(scheduler: Scheduler) -> None:
    cache = scheduler.cache
    assert all(len(s.pages) * cache.page_size >= s.n_computed for s in scheduler.running)
    assert all(not s.pages for s in (*scheduler.waiting, *scheduler.scores))
    assert cache.n_used == len({page for s in scheduler.running for page in s.pages})


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


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=12),
    n_pages=st.integers(8, 12),
    budget=st.integers(1, 12),
    max_rows=st.integers(1, 6),
)
def test_scores_keep_to_their_rows_and_let_answers_go_first(pairs, n_pages, budget, max_rows):
    """Whatever is preempted or forgotten, every target gets a row, once."""
    cache = KVCache(n_pages, 4)
    scheduler = Scheduler(cache, budget, max_sequences=4, max_rows=max_rows)
    scores = plan(1, pairs, lambda token: None)
    for s in scores:
        scheduler.add(s)
    answer = sequence([1, 2], max_tokens=1)
    scheduler.add(answer)
    first = scheduler.next_step()[0]
    assert first.sequence is answer
    answer.n_computed += first.n_new
    scheduler.remove(answer)
    for s in list(scheduler.running):  # what else was begun is preempted, so to speak
        scheduler.remove(s)
        scheduler.add(s)
    for _ in range(2000):
        chunks = scheduler.next_step()
        check_pages(scheduler)
        assert sum(len(c.tokens) for c in chunks) <= budget
        assert sum(c.n_rows for c in chunks) <= max_rows
        for chunk in chunks:
            s, targets = chunk.sequence, chunk.targets
            places = {t.place for t in targets}
            end = s.n_computed + chunk.n_new
            assert not places or end - chunk.n_rows <= min(places) <= max(places) < end
            s.scores += [(0.0, True)] * len(targets)
            s.n_computed = end
            cache.publish(s)
            if not s.n_pending:
                s.finished = True
                scheduler.remove(s)
        if all(s.finished for s in scores):
            break
    assert all(len(s.scores) == len(s.targets) for s in scores) and cache.n_used == 0
    assert sum(len(s.targets) for s in scores) == sum(len(ids) for _, ids in pairs)


def test_answers_of_one_request_take_turns_where_choosing_takes_longer_than_computing():
    scheduler = Scheduler(KVCache(100, 4), max_batched_tokens=64, max_sequences=40)
    many = [sequence([0, 1], 40, request_id=1) for _ in range(16)]
    one, two = (sequence([i, i], 40, request_id=i) for i in (2, 3))

    def step() -> list[Sequence]:
        chunks = scheduler.next_step()
        for chunk in chunks:
            chunk.sequence.n_computed += chunk.n_new
            chunk.sequence.tokens.append(0)
        return [chunk.sequence for chunk in chunks]

    for s in many:
        scheduler.add(s)
    step()
    scheduler.turns.note(16, computing=1.0, choosing=4.0)  # a quarter of a step each
    assert step() == many  # alone it is not held back
    scheduler.add(one)
    scheduler.add(two)
    step()
    for _ in range(8):
        assert {*step()} > {one, two}
        lengths = [s.n_output for s in many]
        assert max(lengths) - min(lengths) <= 1
    steps = [step() for _ in range(4)]
    assert [len(s) for s in steps] == [4] * 4
    scheduler.turns.note(1, computing=1.0, choosing=0.05)
    for _ in range(50):  # 16 rows take four times as long as one
        scheduler.turns.note(16, computing=3.7, choosing=0.5)
    assert 6 <= len(step()) <= 8
    for _ in range(50):
        scheduler.turns.note(16, computing=1.5, choosing=0.5)
    assert {*step()} == {*many, one, two}
