"""Choose the next token of every row at once, each by its own rules.

Seeds hold in any batch: a row has exactly one uniform number, its sequence's for that place of the
answer, and finds its token by inverting the cumulative distribution. So a place's token is the same
whether or not those before it were guessed. (Where filters.py needs a number, it has the lower bits
of that one.) top-k and top-p look at the likeliest `HEAD` tokens, sorted; where more are wanted, or
all, tokens keep the vocabulary's order and a filter is a threshold. Nothing sorts a vocabulary of
tokens: at a high temperature one request would slow everybody's step many times over.
"""

import numpy as np
import torch
from torch import Tensor

from opennemo.engine.filters import heal_, narrow_, penalise_repeats_
from opennemo.engine.params import SamplingParams
from opennemo.engine.sequence import Prefix, Sequence
from opennemo.engine.token import TokenLogprobs

HEAD = 1024
BLOCK = 512  # tokens whose weights are summed first; the sum of all is searched in two steps
FORBIDDEN = -1e9  # finite: where a grammar allows nothing but such tokens, one of them comes


def sample(
    logits: Tensor,
    prefixes: list[Prefix],
    eos_ids: frozenset[int],
    masks: dict[int, np.ndarray] | None = None,
) -> Tensor:
    """The next token (S,) after each prefix from its row of logits (S, V), changed in place.

    `masks` holds, for rows whose answer follows a grammar, one bit for each token that may come.
    """
    for i, prefix in enumerate(prefixes):
        _bias_(logits[i], prefix, eos_ids)
    if masks:
        bits = torch.from_numpy(np.stack(list(masks.values()))).to(logits.device)
        places = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bits[:, :, None] >> places & 1).flatten(1)[:, : logits.shape[1]].bool()
        rows = list(masks)
        logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
    if any(prefix.params.healing for prefix in prefixes):
        heal_(logits, prefixes)
    penalised = [i for i, p in enumerate(prefixes) if p.params.penalises]
    if penalised:
        logits[penalised] = _penalise(logits[penalised], [prefixes[i] for i in penalised])
    for i in penalised:
        if prefixes[i].params.dry_multiplier:
            tokens = [*prefixes[i].sequence.tokens, *prefixes[i].guesses]
            penalise_repeats_(logits[i], prefixes[i].params, tokens)
    tokens = logits.argmax(-1)
    random = [i for i, p in enumerate(prefixes) if p.params.temperature > 0]
    for i in random:
        if prefixes[i].params.narrows:
            narrow_(logits[i], prefixes[i].params, prefixes[i].uniform * 2**26 % 1)
    if random:
        tokens[random] = _draw(logits[random], [prefixes[i] for i in random])
    return tokens


def token_logprobs(logits: Tensor, token: int, n_top: int) -> TokenLogprobs:
    """Log-probability of one token under logits (V,), its rank, and the n likeliest."""
    logprobs = logits.log_softmax(-1)
    own = logprobs[token]
    values, ids = logprobs.topk(n_top)
    return TokenLogprobs(
        logprob=own.item(),
        rank=int((logprobs > own).sum()) + 1,
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )


def _bias_(row: Tensor, prefix: Prefix, eos_ids: frozenset[int]) -> None:
    """Apply what a request asks for single tokens to its row of logits (V,), in place."""
    params = prefix.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if params.allowed_ids is not None:
        others = torch.full_like(row, FORBIDDEN)
        others[torch.from_numpy(params.allowed_index).to(row.device)] = 0
        row += others
    if params.bad_words:
        answer = prefix.answer
        for *start, last in params.bad_words:
            if answer[len(answer) - len(start) :] == start:
                row[last] = FORBIDDEN
    if prefix.n_output < params.min_tokens and params.grammar is None:
        row[list(eos_ids | params.stop_ids)] = -torch.inf


def _penalise(logits: Tensor, prefixes: list[Prefix]) -> Tensor:
    """Repetition (CTRL, arXiv:1909.05858), presence and frequency penalties, (S, V) -> (S, V)."""
    rows_of: dict[Sequence, list[int]] = {}
    for row, prefix in enumerate(prefixes):
        rows_of.setdefault(prefix.sequence, []).append(row)

    def count(start: int | None) -> Tensor:
        """Count each token in the answer, or in the part of it from `start` on."""
        counts = torch.zeros_like(logits)
        for sequence, rows in rows_of.items():  # what its prefixes share is counted once
            ids = sequence.tokens[sequence.n_prompt if start is None else start :]
            index = torch.tensor(ids, dtype=torch.int64, device=logits.device)
            # Not bincount, for which a GPU would have to wait: it looks for the largest first.
            ones = counts.new_ones(len(ids))
            counts[rows] = counts.new_zeros(logits.shape[1]).index_add_(0, index, ones)
        for row, prefix in enumerate(prefixes):
            for guess in prefix.guesses:
                counts[row, guess] += 1
        return counts

    def column(name: str) -> Tensor:
        values = [getattr(p.params, name) for p in prefixes]
        return torch.tensor(values, device=logits.device)[:, None]

    repetition = column("repetition_penalty")
    seen = count(0) > 0
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, scaled, logits)
    answered = count(None)
    presence, frequency = column("presence_penalty"), column("frequency_penalty")
    return logits - presence * (answered > 0) - frequency * answered


def _draw(logits: Tensor, prefixes: list[Prefix]) -> Tensor:
    """Sample each row of (S, V), overwritten, under its temperature and filters -> ids (S,)."""
    params = [p.params for p in prefixes]
    uniform = torch.tensor([p.uniform for p in prefixes], device=logits.device).double()
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    logits.div_(temperature[:, None])
    # Not a number: the row allows nothing, or the model failed; the engine sees that by itself.
    probs = logits.sub_(logits.amax(-1, keepdim=True)).exp_().nan_to_num_(0)
    tokens = torch.zeros(len(params), dtype=torch.int64, device=logits.device)
    few = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    rest = [i for i, p in enumerate(params) if not (p.top_k or p.top_p < 1)]
    if few:
        # Sums in float64, so that a vocabulary's worth of rounding moves no token over its border.
        total = probs[few].sum(-1, dtype=torch.float64, keepdim=True)
        top, ids = probs[few].topk(min(HEAD, logits.shape[-1]))
        chosen, complete = _pick(top / total, ids, uniform[few], [params[i] for i in few])
        tokens[few] = chosen
        # Asking makes the host wait for a GPU; the head holds any choice of fewer than it has.
        unsure = [j for j, i in enumerate(few) if not 0 < params[i].top_k < HEAD]
        if unsure:
            done = complete[unsure].tolist()
            rest += [few[j] for j, is_done in zip(unsure, done, strict=True) if not is_done]
    if rest:
        tokens[rest] = pick_among_all(probs[rest], uniform[rest], [params[i] for i in rest])
    return tokens


def pick_among_all(probs: Tensor, uniform: Tensor, params: list[SamplingParams]) -> Tensor:
    """Choose from weights (S, V), the likeliest 1, in the vocabulary's order -> ids (S,)."""
    for row, p in zip(probs, params, strict=True):
        least = p.min_p
        if p.top_k or p.top_p < 1:
            least = max(least, _least(row.cpu().numpy(), p.top_p, p.top_k or len(row)))
        row[row < least] = 0
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(
        -1, (-1, BLOCK)
    )
    sums = blocks.sum(-1, dtype=torch.float64)
    target = uniform[:, None] * sums.sum(-1, keepdim=True)
    block, before = _passing(sums, target)
    inside = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]].double()
    rest = (target - before).clamp(
        min=0
    )  # below 0 by rounding, it would name a token without weight
    return (block * BLOCK + _passing(inside, rest)[0])[:, 0]


def _passing(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum of weights (S, n) passes a target (S, 1), and the sum before (S, 1)."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, target, right=True)
    # A target that rounds to the whole sum means the last weight that is not zero.
    place = place.minimum(torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
    return place, cumulative.gather(-1, place) - weights.gather(-1, place)


def _least(weights: np.ndarray, top_p: float, top_k: int) -> float:
    """The smallest of the likeliest weights that make up `top_p`, `top_k` of them at most.

    Positive floats have the order of their bits: counting by the upper ones leaves few to sort.
    """
    buckets = weights.view(np.int32) >> 14
    mass = np.bincount(buckets, weights)[::-1].cumsum()
    count = np.bincount(buckets)[::-1].cumsum()
    wanted, top_k = top_p * mass[-1], min(top_k, len(weights))
    at = min(np.searchsorted(mass, wanted), np.searchsorted(count, top_k), len(mass) - 1)
    inside = np.sort(weights[buckets == len(mass) - 1 - at])[::-1]
    before = (mass[at - 1], count[at - 1]) if at else (0.0, 0)
    n = np.searchsorted(before[0] + inside.cumsum(dtype=np.float64), wanted) + 1
    return float(inside[min(n, top_k - before[1], len(inside)) - 1])


def _pick(
    probs: Tensor, ids: Tensor, uniform: Tensor, params: list[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Filter probabilities (S, head), likeliest first, and invert their cumulative distribution.

    -> token ids (S,), and whether the head held all of each row's choice (S,). The likeliest
    token always stays.
    """

    def column(values: list) -> Tensor:
        return torch.tensor(values, device=probs.device)[:, None]

    places = torch.arange(probs.shape[-1], device=probs.device)
    before = probs.cumsum(-1) - probs  # mass of the tokens that are likelier
    dropped = places >= column([p.top_k or 2**31 for p in params])
    dropped |= before >= column([p.top_p for p in params])
    dropped |= probs < column([p.min_p for p in params]) * probs[:, :1]
    dropped |= probs == 0  # or a uniform number that rounds to 1 would pick what is masked
    dropped[:, 0] = False
    cumulative = probs.masked_fill(dropped, 0).cumsum(-1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (~dropped).sum(-1, keepdim=True) - 1
    tokens = ids.gather(-1, torch.minimum(place, last))[:, 0]
    # What lies beyond the head is negligible once the head has all but 1e-9 of the mass.
    return tokens, dropped[:, -1] | (before[:, -1] + probs[:, -1] > 1 - 1e-9)
