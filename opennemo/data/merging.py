"""Learn merges: byte-pair encoding of weighted words, exactly, by operations on whole arrays.

All words lie in one array, a cell for each byte: the cell where a symbol begins holds its number,
and a second array says which symbol ends in a cell. A merge is then a few gathers and scatters at
the places of its pair. Two facts keep the bookkeeping small. A pair only loses occurrences once its
younger symbol is made, so the places and the count recorded at that moment are bounds that need
checking only when the pair comes to the top. And pairs rarer than a floor are not recorded at all:
when the others are used up, all words are scanned again with a lower floor.

Of equally frequent pairs the one with the lowest numbers is merged first, so the result depends on
the counts alone. BPE: arXiv:1508.07909.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from opennemo.progress import Stages

EDGE, DEAD = -1, -2  # cells between words, and cells in which no symbol begins or ends
FLOORS = 16  # how much rarer than the most frequent pair a recorded one may be
ENOUGH = 1.2  # pairs recorded for each one that is still to be merged
RIGHT = 1 << 30  # marks the numbers of right neighbours among those of left ones
MAX_BITS = 63  # of a number that can be sorted
NOT_UTF8 = b"\xff"


def learn_merges(
    words: Mapping[str, int],
    n_tokens: int,
    given: Sequence[bytes],
    encode: Callable[[str], Sequence[int]] | None = None,
    report: Stages | None = None,
    most_words: int | None = None,
) -> list[bytes]:
    """Up to `n_tokens` tokens that BPE makes of the words, in order; fewer if no pair is left.

    Args:
        words: each with how often it counts; the counts together stay below 2**62.
        given: the tokens to begin with, the single bytes in order or more.
        encode: how `given` spells a word, as ranks; by default in single bytes.
        most_words: that a token may hold, as `bytes.split` counts them; by default any number.
    """
    tokens, made, seen = list(given), [], set(given)
    begin, end, weight = _lay_out(words, given, encode)
    while len(made) < n_tokens:
        floor, places, heap = _note_pairs(begin, weight, tokens, n_tokens - len(made), most_words)
        if not heap:
            break
        while heap and len(made) < n_tokens:
            bound, pair = heap[0]
            a, b = pair
            n_a, n_both = len(tokens[a]), len(tokens[a]) + len(tokens[b])
            at = places[pair]
            there = begin[at] == a
            there &= begin[at + n_a] == b
            at = at[there]
            counts = weight[at]
            if (count := int(counts.sum())) < -bound:
                if count < floor:
                    heapq.heappop(heap)
                    del places[pair]
                else:
                    heapq.heapreplace(heap, (-count, pair))
                    places[pair] = at
                continue
            heapq.heappop(heap)
            del places[pair]
            if a == b:
                at = _apart(at, n_a)
                counts = weight[at]
            new, token = len(tokens), tokens[a] + tokens[b]
            tokens.append(token)
            if token not in seen:  # "a"+"bc" and "ab"+"c" make the same
                seen.add(token)
                made.append(token)
            after = at + n_both
            begin[at], begin[at + n_a] = new, DEAD
            end[at + (n_a - 1)], end[after - 1] = DEAD, new
            left, right = end[at - 1], begin[after]
            left[left == new] = EDGE  # that pair is found from its left half
            for symbol, count, some in _frequent(left, right, counts, floor):
                if symbol & RIGHT:
                    pair, where = (new, symbol ^ RIGHT), at[some - len(at)]
                else:
                    pair, where = (symbol, new), at[some] - len(tokens[symbol])
                if most_words and len((tokens[pair[0]] + tokens[pair[1]]).split()) > most_words:
                    continue
                places[pair] = where
                heapq.heappush(heap, (-count, pair))
            if report and len(made) % 512 == 0:
                report("Learning merges", len(made), n_tokens)
    return made


def _lay_out(
    words: Mapping[str, int],
    given: Sequence[bytes],
    encode: Callable[[str], Sequence[int]] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The symbol that begins in each cell, the one that ends there, and how often it counts."""
    if encode is None:
        data = NOT_UTF8.join([b"", *map(str.encode, words), b""])
        begin = np.frombuffer(data, np.uint8).astype(np.int32)
        begin[begin == NOT_UTF8[0]] = EDGE
        end = begin.copy()
    else:
        spelled = chain.from_iterable((*encode(word), EDGE) for word in words)
        symbols = np.fromiter(chain([EDGE], spelled), np.int32)
        lengths = np.array([*map(len, given), 1], np.int32)[symbols]  # an edge takes one cell
        ends = lengths.cumsum()
        begin = np.full(ends[-1], DEAD, np.int32)
        end = begin.copy()
        begin[ends - lengths], end[ends - 1] = symbols, symbols
    edges = (begin == EDGE).nonzero()[0]
    counts = np.fromiter(words.values(), np.int64, len(words))
    return begin, end, np.repeat(counts, np.diff(edges))


def _note_pairs(
    begin: np.ndarray,
    weight: np.ndarray,
    tokens: Sequence[bytes],
    n_wanted: int,
    most_words: int | None,
) -> tuple[int, dict[tuple[int, int], np.ndarray], list[tuple[int, tuple[int, int]]]]:
    """The floor, where every pair is that is not below it, and a heap of (-count, pair)."""
    lengths = np.array([len(token) for token in tokens], np.int32)
    for_symbol, for_cell = len(lengths).bit_length(), len(begin).bit_length()
    starts = (begin >= 0).nonzero()[0]
    pairs = begin[starts].astype(np.int64)
    second = begin[starts + lengths[pairs]]
    pairs <<= for_symbol
    pairs |= second  # an edge makes it negative
    if 2 * for_symbol + for_cell <= MAX_BITS:
        # Sorting numbers that hold the place too is ten times as fast as sorting both by one.
        pairs <<= for_cell
        pairs |= starts
        pairs.sort()
        np.bitwise_and(pairs, (1 << for_cell) - 1, out=starts)
        pairs >>= for_cell
    else:
        order = pairs.argsort(kind="stable")
        pairs, starts = pairs[order], starts[order]
    n_edges = int(np.searchsorted(pairs, 0))
    pairs, starts = pairs[n_edges:], starts[n_edges:]
    if not len(pairs):
        return 0, {}, []
    first = _where_new(pairs)
    counts = np.add.reduceat(weight[starts], first)
    last = np.append(first[1:], len(pairs))
    mask = (1 << for_symbol) - 1
    if most_words:
        allowed = _n_words(tokens, pairs[first] >> for_symbol, pairs[first] & mask) <= most_words
        first, last, counts = first[allowed], last[allowed], counts[allowed]
        if not len(first):
            return 0, {}, []
    floor = max(1, int(counts.max()) // FLOORS)
    if (n_enough := int(ENOUGH * n_wanted)) < len(counts):
        floor = max(floor, int(np.partition(counts, -n_enough)[-n_enough]))
    noted = counts >= floor
    keys = [(pair >> for_symbol, pair & mask) for pair in pairs[first[noted]].tolist()]
    spans = zip(first[noted].tolist(), last[noted].tolist(), strict=True)
    places = {key: starts[i:j].copy() for key, (i, j) in zip(keys, spans, strict=True)}
    heap = list(zip((-counts[noted]).tolist(), keys, strict=True))
    heapq.heapify(heap)
    return floor, places, heap


def _n_words(tokens: Sequence[bytes], left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many words the union of each pair of tokens holds."""
    n_words = np.array([len(token.split()) for token in tokens], np.int32)
    begins = np.array([not token[:1].isspace() for token in tokens])
    ends = np.array([not token[-1:].isspace() for token in tokens])
    return n_words[left] + n_words[right] - (ends[left] & begins[right])


def _where_new(values: np.ndarray) -> np.ndarray:
    """The first index of each run of equals; there is at least one value."""
    later = (values[1:] != values[:-1]).nonzero()[0]
    first = np.zeros(len(later) + 1, np.int64)
    np.add(later, 1, out=first[1:])
    return first


def _frequent(
    left: np.ndarray, right: np.ndarray, weight: np.ndarray, floor: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(symbol, count, indices) of the neighbours that are not rarer than the floor.

    Indices are into the left neighbours followed by the right ones, whose symbols have `RIGHT`.
    """
    right |= RIGHT  # an edge stays negative
    symbols = np.concatenate([left, right])
    order = symbols.argsort()
    symbols = symbols[order]
    first = _where_new(symbols)
    counts = np.add.reduceat(np.concatenate([weight, weight])[order], first)
    for i in (counts >= floor).nonzero()[0].tolist():
        if (symbol := int(symbols[first[i]])) >= 0:
            end = first[i + 1] if i + 1 < len(first) else len(symbols)
            yield symbol, int(counts[i]), order[first[i] : end]


def _apart(places: np.ndarray, length: int) -> np.ndarray:
    """Every other place of runs such as "aaaa", from the left: pairs of equals must not overlap."""
    places = np.sort(places)
    is_first = np.append(True, places[1:] - places[:-1] != length)
    index = np.arange(len(places))
    run = np.maximum.accumulate(np.where(is_first, index, 0))
    return places[(index - run) % 2 == 0]
