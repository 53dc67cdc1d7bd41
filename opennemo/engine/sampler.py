"""Choose the next token of every row at once, each by its own rules.

Seeds hold in any batch: a row has exactly one uniform number, its sequence's for that place of the
answer, and finds its token by inverting the cumulative distribution. So a place's token is the same
whether or not those before it were guessed. (Where filters.py needs a number, it has the lower bits
of that one.) Filters
(top-k, top-p, min-p) look at the likeliest `HEAD` tokens, sorted; the full vocabulary is sorted
only for the rare row whose nucleus is larger.
"""

import numpy as np
import torch
from torch import Tensor

from opennemo.engine.filters import narrow_, penalise_repeats_
from opennemo.engine.params import SamplingParams
from opennemo.engine.sequence import Prefix, Sequence
from opennemo.engine.token import TokenLogprobs

HEAD = 1024
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
        others[list(params.allowed_ids)] = 0
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
        """How often each token stands in the answer, or from `start` on."""
        counts = torch.zeros_like(logits)
        for sequence, rows in rows_of.items():  # what its prefixes share is counted once
            ids = sequence.tokens[sequence.n_prompt if start is None else start :]
            counts[rows] = torch.bincount(
                torch.tensor(ids, dtype=torch.int64, device=logits.device),
                minlength=logits.shape[1],
            ).float()
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
    """Sample each row of (S, V) under its temperature and filters -> ids (S,)."""
    params = [p.params for p in prefixes]
    numbers = [p.uniform for p in prefixes]
    uniform = torch.tensor(numbers, device=logits.device)
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    # Float64 so that a vocabulary's worth of rounding cannot move a token across its border.
    logits = logits.double() / temperature[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(min(HEAD, logits.shape[-1]))
    tokens, complete = _pick((top - total).exp(), ids, uniform, params)
    rest = [i for i, done in enumerate(complete.tolist()) if not done]
    if rest and logits.shape[-1] > HEAD:
        top, ids = logits[rest].sort(descending=True, stable=True)
        probs = (top - total[rest]).exp()
        tokens[rest], _ = _pick(probs, ids, uniform[rest], [params[i] for i in rest])
    return tokens


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
