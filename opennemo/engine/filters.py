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

IMPOSSIBLE = -1e8  # what a request forbids is below it, and finite
LONGEST_REPEAT = 64  # tokens; the penalty is beyond any logit long before


def narrow_(row: Tensor, params: SamplingParams, chance: float) -> None:
    """Apply top-n-sigma, typical and XTC to logits (V,); `chance` from 0 to 1 decides for XTC."""
    if params.top_n_sigma > 0:
        possible = row[row > IMPOSSIBLE].float()
        if len(possible):
            spread = possible.std(correction=0) * params.top_n_sigma
            row[row < possible.amax() - spread] = -torch.inf
    if params.typical_p < 1:
        logprobs = row.float().log_softmax(-1)
        probs = logprobs.exp()
        surprise = -torch.where(probs > 0, logprobs, 0.0)
        distance = (surprise - (probs * surprise).sum()).abs()
        distance[probs == 0] = torch.inf
        order = distance.argsort(stable=True)
        mass = probs[order].cumsum(-1)
        row[order[1:][mass[:-1] >= params.typical_p]] = -torch.inf
    if params.xtc_probability > chance:
        probs = row.float().softmax(-1)
        likely = (probs >= params.xtc_threshold).nonzero().flatten()
        if len(likely) > 1:
            kept = int(likely[probs[likely].argmin()])
            value = row[kept].clone()
            row[likely] = -torch.inf
            row[kept] = value


def penalise_repeats_(row: Tensor, params: SamplingParams, tokens: Sequence[int]) -> None:
    """DRY: lower the logits (V,) of tokens that would continue a repetition.

    A token that followed an earlier occurrence of the last n tokens loses `multiplier * base **
    (n - allowed_length)`. Breakers end what is compared, and are never penalised.
    """
    window = tokens[-params.dry_window :] if params.dry_window else tokens
    said = np.array(window, np.int64)
    if len(said) < 2:
        return
    breakers = np.array(sorted(params.dry_breakers), np.int64)
    last = np.isin(said[-LONGEST_REPEAT:], breakers)[::-1]
    longest = int(last.argmax()) if last.any() else min(len(said), LONGEST_REPEAT)
    lengths: dict[int, int] = {}
    for at in np.nonzero(said[:-1] == said[-1])[0] if longest else ():
        n = 1
        while n < longest and n <= at and said[at - n] == said[-1 - n]:
            n += 1
        following = int(said[at + 1])
        lengths[following] = max(lengths.get(following, 0), n)
    for token, n in lengths.items():
        if n >= params.dry_allowed_length and token not in params.dry_breakers:
            power = min(n - params.dry_allowed_length, LONGEST_REPEAT)
            row[token] -= min(params.dry_multiplier * params.dry_base**power, 1e9)


def heal_(logits: Tensor, prefixes: list[Prefix]) -> None:
    """Let answers spell the ends of their prompts first; changes their rows of logits (S, V).

    To stay on the path is as likely as its next token and, behind it, all ways to go on together.
    So rows are looked at from the last to the first of a sequence, and each adds the probability of
    the rows behind to that token. (A row that is not in this step counts as certain.)
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
