"""Choose the next token of every row, each by its own rules.

Seeds hold in any batch: a row has exactly one uniform number, its sequence's for that place of the
answer, and finds its token by inverting the cumulative distribution. So a place's token is the same
whether or not those before it were guessed. (Where filters.py needs a number, it uses the lower
bits of that one.) top-k and top-p look at the likeliest `HEAD` tokens, sorted; where more are
wanted, or all, tokens keep the vocabulary's order and a filter is a threshold. Nothing sorts a
vocabulary of tokens: at a high temperature one request would slow everybody's step many times over.
A CPU takes one row after the other, since its caches hold a row of a large vocabulary but no batch
of them, and numpy where it is faster; a GPU takes all rows at once.
"""

from collections.abc import Sequence as Many

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opennemo.engine.filters import heal_, last_taken, mask_, narrow_, penalise_
from opennemo.engine.params import FORBIDDEN, SamplingParams
from opennemo.engine.sequence import Prefix
from opennemo.engine.token import TokenLogprobs

HEAD = 1024
BLOCK = 512  # tokens whose weights are summed first; the sum of all is searched in two steps
LARGEST = np.float32(1).view(np.int32)  # of weights, as bits
STRIDE = 32  # tokens of which the likeliest is looked at first


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
        mask_(logits, masks)
    if any(prefix.params.healing for prefix in prefixes):
        heal_(logits, prefixes)
    if logits.is_cpu and prefixes:
        rows = zip(logits.split(1), zip(prefixes), strict=True)
        return torch.cat([_choose(*row) for row in rows])
    return _choose(logits, prefixes)


def _choose(logits: Tensor, prefixes: Many[Prefix]) -> Tensor:
    """The next token of each row, once biases and masks are in it."""
    for row, prefix in zip(logits, prefixes, strict=True):
        if prefix.params.penalises:
            penalise_(row, prefix)
    tokens = torch.from_numpy(logits.numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)
    random = [i for i, p in enumerate(prefixes) if p.params.temperature > 0]
    for i in random:
        if prefixes[i].params.narrows:
            narrow_(logits[i], prefixes[i].params, prefixes[i].uniform * 2**26 % 1)
    if random:
        tokens[random] = _draw(_rows(logits, random), [prefixes[i] for i in random])
    return tokens


def token_logprobs(logits: Tensor, token: int, n_top: int) -> TokenLogprobs:
    """Log-probability of one token under logits (V,), its rank, and the n likeliest."""
    logprobs = logits.log_softmax(-1)
    own = logprobs[token].item()
    values, ids = _likeliest(logprobs[None], n_top)
    likelier = logprobs.numpy() > own if logprobs.is_cpu else (logprobs > own).cpu().numpy()
    return TokenLogprobs(
        logprob=own,
        rank=int(np.count_nonzero(likelier)) + 1,
        top=tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True)),
    )


def _bias_(row: Tensor, prefix: Prefix, eos_ids: frozenset[int]) -> None:
    """Apply a request's settings for single tokens to its row of logits (V,), in place."""
    params = prefix.params
    if params.logit_bias:
        ids, biases = (torch.from_numpy(part).to(row.device) for part in params.biases)
        row[ids] += biases
    if params.allowed_ids is not None:
        bias = torch.from_numpy(params.allowed_bias[: len(row)]).to(row.device)
        row[: len(bias)] += bias
        row[len(bias) :] += FORBIDDEN
    if params.bad_words:
        answer = prefix.answer
        said = ((answer[len(answer) - len(start) :] == start, x) for *start, x in params.bad_words)
        row[[last for is_said, last in said if is_said]] = FORBIDDEN
    if prefix.n_output < params.min_tokens and params.grammar is None:
        row[list(eos_ids | params.stop_ids)] = -torch.inf


def _rows(values: Tensor, places: list[int]) -> Tensor:
    """Some rows of values, in order; not a copy where they are all."""
    return values if len(places) == len(values) else values[places]


def _draw(logits: Tensor, prefixes: list[Prefix]) -> Tensor:
    """Sample each row of (S, V), overwritten, under its temperature and filters -> ids (S,)."""
    params = [p.params for p in prefixes]
    uniform = torch.tensor([p.uniform for p in prefixes], device=logits.device).double()
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    logits.div_(temperature[:, None])
    # Not a number: the row allows nothing, or the model failed; the engine detects that.
    probs = logits.sub_(logits.amax(-1, keepdim=True)).exp_().nan_to_num_(0)
    tokens = torch.zeros(len(params), dtype=torch.int64, device=logits.device)
    few = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    rest = [i for i, p in enumerate(params) if not (p.top_k or p.top_p < 1)]
    if few:
        # Sums in float64, so that a vocabulary's worth of rounding moves no token over its border.
        total = _rows(probs, few).sum(-1, dtype=torch.float64, keepdim=True)
        top, ids = _likeliest(_rows(probs, few), HEAD)
        chosen, complete = _pick(top / total, ids, uniform[few], [params[i] for i in few])
        tokens[few] = chosen
        # Checking makes the host wait for a GPU; the head covers every smaller choice.
        unsure = [j for j, i in enumerate(few) if not 0 < params[i].top_k < HEAD]
        if unsure:
            done = complete[unsure].tolist()
            rest += [few[j] for j, is_done in zip(unsure, done, strict=True) if not is_done]
    if rest:
        tokens[rest] = pick_among_all(_rows(probs, rest), uniform[rest], [params[i] for i in rest])
    return tokens


def _likeliest(weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of weights (S, V), all if V is less, sorted -> they, and their ids (S, n)."""
    n, n_blocks = min(n, weights.shape[-1]), weights.shape[-1] // STRIDE
    if not (weights.is_cpu and len(weights) == 1 and 0 < n < n_blocks):
        return weights.topk(n)
    # The n-th largest of the blocks' maxima: at least n weights are as large.
    least = weights[0, : n_blocks * STRIDE].view(-1, STRIDE).amax(-1).topk(n)[0][-1].item()
    ids = torch.from_numpy(np.flatnonzero(weights[0].numpy() >= least))
    top, places = weights[0, ids].topk(n)
    return top[None], ids[places][None]


def pick_among_all(probs: Tensor, uniform: Tensor, params: Many[SamplingParams]) -> Tensor:
    """Choose from weights (S, V), the likeliest 1, in the vocabulary's order -> ids (S,)."""
    for row, p in zip(probs, params, strict=True):
        least = np.float32(p.min_p)
        if p.top_k or p.top_p < 1:
            least = max(least, _least(row.cpu().numpy(), p.top_p, p.top_k or len(row)))
        if least > 0:
            torch.threshold_(row, float(np.nextafter(least, np.float32(-1))), 0)
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    target = uniform[:, None] * sums.sum(-1, keepdim=True)
    block, before = _passing(sums, target)
    inside = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]].double()
    # Below 0 by rounding, it would name a token without weight.
    rest = (target - before).clamp(min=0)
    return (block * BLOCK + _passing(inside, rest)[0])[:, 0]


def _passing(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum of weights (S, n) passes a target (S, 1), and the sum before (S, 1)."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, target, right=True)
    # A target that rounds to the whole sum means the last weight that is not zero.
    place = place.minimum(torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
    return place, cumulative.gather(-1, place) - weights.gather(-1, place)


def _least(weights: np.ndarray, top_p: float, top_k: int) -> np.float32:
    """The smallest of the likeliest weights, from 0 to 1, that make up `top_p`, at most `top_k`."""
    # Positive floats have the order of their bits.
    last = last_taken(LARGEST - weights.view(np.int32), weights, top_p, top_k)
    return np.int32(LARGEST - last).view(np.float32)


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
