"""Sampling filters that look at a whole row of logits, as used for creative writing.

Each takes one row (V,) and changes it in place: dropped tokens become -inf. They run before the
temperature, as in llama.cpp, so the temperature does not change which tokens are dropped.

Sources: locally typical sampling (arXiv:2202.00666), top-n-sigma (arXiv:2411.07641), XTC and DRY
as text-generation-webui (pull requests 6335 and 5677) and llama.cpp have them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opennemo.engine.params import SamplingParams
from opennemo.engine.sequence import Prefix

IMPOSSIBLE = -1e8  # logits of forbidden tokens are below it, and finite
LONGEST_REPEAT = 64  # tokens; the penalty is beyond any logit long before
# What a byte of a mask adds to the logits of its eight tokens.
MASKED = np.where(np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little"), 0, -np.inf)
MASKED = MASKED.reshape(256, 8).astype(np.float32)


def narrow_(row: Tensor, params: SamplingParams, chance: float) -> None:
    """Apply top-n-sigma, typical and XTC to logits (V,); `chance` from 0 to 1 decides for XTC."""
    if params.top_n_sigma > 0:
        possible = row if row.amin() > IMPOSSIBLE else row[row > IMPOSSIBLE]
        if len(possible):
            spread = possible.float().std(correction=0) * params.top_n_sigma
            _drop_(row, row < possible.amax() - spread)
    if params.typical_p < 1:
        depths, probs = _softmax(row)
        # How far a token's surprise is from the mean of all.
        distances = (depths - (probs * depths).sum()).abs_().cpu().numpy()
        ranks = distances.view(np.int32)  # positive floats have the order of their bits
        last = last_taken(ranks, probs.cpu().numpy(), params.typical_p, len(row))
        _drop_(row, torch.from_numpy(ranks > last).to(row.device))
    if params.xtc_probability > chance:
        probs = _softmax(row)[1]
        likely = np.flatnonzero(probs.cpu().numpy() >= np.float32(params.xtc_threshold))
        if len(likely) > 1:
            ids = torch.from_numpy(likely).to(row.device)
            kept = ids[probs[ids].argmin()]
            value = row[kept].clone()
            row[ids] = -torch.inf
            row[kept] = value


def _softmax(row: Tensor) -> tuple[Tensor, Tensor]:
    """How far logits (V,) are below the largest, nowhere without end, and their softmax."""
    depths = (row.float() - row.amax()).clamp_(min=-1e4)
    probs = depths.exp()
    return depths, probs.div_(probs.sum())


def _drop_(row: Tensor, dropped: Tensor) -> None:
    """Set logits (V,) to -inf by flags (V,)."""
    if row.is_cpu:
        row.numpy()[np.flatnonzero(dropped.numpy())] = -np.inf
    else:
        row.masked_fill_(dropped, -torch.inf)


def last_taken(ranks: np.ndarray, weights: np.ndarray, share: float, most: int) -> int:
    """The rank of the last item taken, the lowest ranks first, until `share` of the weight is.

    No more than `most` of the items are taken. `ranks` (V,) int32 are not negative. Counting by
    their upper bits leaves few to sort.
    """
    buckets = (ranks >> 17).astype(np.int64)  # for bincount, which converts others slowly
    mass = np.bincount(buckets, weights).cumsum()
    at, n_before, wanted = len(mass) - 1, 0, share * mass[-1]
    if wanted > 0:
        at = min(at, int(np.searchsorted(mass, wanted)))
    if most < len(ranks):
        counts = np.bincount(buckets).cumsum()
        at = min(at, int(np.searchsorted(counts, most)))
        n_before = int(counts[at - 1]) if at else 0
    inside = np.flatnonzero(buckets == at)
    inside = inside[ranks[inside].argsort(kind="stable")]
    sums = weights[inside].cumsum(dtype=np.float64) + (mass[at - 1] if at else 0)
    n = min(int(np.searchsorted(sums, wanted)) + 1, most - n_before, len(inside))
    return int(ranks[inside[n - 1]])


def mask_(logits: Tensor, masks: dict[int, np.ndarray]) -> None:
    """Forbid the tokens that the bits (ceil(V / 32),) of a row of logits (S, V) do not allow."""
    n_tokens = logits.shape[1]
    if logits.is_cpu:
        for i, bits in masks.items():
            logits[i].numpy()[:] += MASKED.take(bits.view(np.uint8), 0).reshape(-1)[:n_tokens]
        return
    bits = torch.from_numpy(np.stack(list(masks.values()))).to(logits.device)
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits[:, :, None] >> places & 1).flatten(1)[:, :n_tokens].bool()
    rows = list(masks)
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def penalise_(row: Tensor, prefix: Prefix) -> None:
    """Repetition (CTRL, arXiv:1909.05858), presence, frequency and DRY, in a row (V,), in place."""
    params, sequence = prefix.params, prefix.sequence
    tokens = [*sequence.tokens, *prefix.guesses]
    ids = torch.from_numpy(np.array(tokens, np.int64)).to(row.device)
    if (by := params.repetition_penalty) != 1:
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / by, seen * by)
    if params.presence_penalty or params.frequency_penalty:
        answered = ids[sequence.n_prompt :]
        # Not bincount, for which a GPU would have to wait: it looks for the largest first.
        ones = row.new_ones(len(answered))
        times = torch.zeros_like(row).index_add_(0, answered, ones)[answered]
        row[answered] = row[answered] - params.presence_penalty - params.frequency_penalty * times
    if params.dry_multiplier:
        penalise_repeats_(row, params, tokens)


def penalise_repeats_(row: Tensor, params: SamplingParams, tokens: Sequence[int]) -> None:
    """DRY: lower the logits (V,) of tokens that would continue a repetition.

    A token that followed an earlier occurrence of the last n tokens loses `multiplier * base **
    (n - allowed_length)`. Breakers end what is compared, and are never penalised.
    """
    window = tokens[-params.dry_window :] if params.dry_window else tokens
    said = np.array(window, np.int64)
    if len(said) < 2:
        return
    last = np.isin(said[-LONGEST_REPEAT:], params.breakers)[::-1]
    longest = int(last.argmax()) if last.any() else min(len(said), LONGEST_REPEAT)
    lengths: dict[int, int] = {}
    places = np.flatnonzero(said[:-1] == said[-1])
    for n in range(1, longest + 1):
        lengths |= dict.fromkeys(said[places + 1].tolist(), n)
        places = places[places >= n]
        places = places[said[places - n] == said[-1 - n]] if n < longest else places[:0]
        if not len(places):
            break
    allowed, unpunished = params.dry_allowed_length, params.dry_breakers
    lengths = {x: n for x, n in lengths.items() if n >= allowed and x not in unpunished}
    by = [
        min(params.dry_multiplier * params.dry_base ** (n - allowed), 1e9) for n in lengths.values()
    ]
    row[list(lengths)] -= torch.tensor(by, device=row.device)


def heal_(logits: Tensor, prefixes: list[Prefix]) -> None:
    """Let answers spell the ends of their prompts first; changes their rows of logits (S, V).

    Staying on the path is as likely as its next token times the sum of all ways to continue after
    it. So rows are visited from the last to the first of a sequence, and each adds the probability
    of the later rows to that token. (A row that is not in this step counts as certain.)
    """
    behind: dict[int, tuple[int, Tensor]] = {}  # by sequence: the place, and its log-probability
    for row, prefix in zip(reversed(logits.unbind()), reversed(prefixes), strict=True):
        healing = prefix.params.healing
        if healing is None or (ahead := healing.ahead(prefix.answer)) is None:
            continue
        place, scale = len(healing.path) - len(ahead), prefix.params.temperature or 1.0
        total = (row / scale).logsumexp(-1)
        ids = torch.tensor([*healing.ends[place], *ahead[:1]], device=row.device)
        kept = row[ids]
        row.fill_(-torch.inf)
        row[ids] = kept
        after, logprob = behind.get(id(prefix.sequence), (-1, total))
        if after == place + 1:
            row[ahead[0]] += scale * logprob
        behind[id(prefix.sequence)] = place, (row / scale).logsumexp(-1) - total
