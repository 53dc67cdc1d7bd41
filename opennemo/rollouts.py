"""Answers of a model that is learning, drawn by the engine in the arithmetic that will serve it.

`served` turns a model in training into what would be loaded after its export, without a file.
Layers that learn as if rounded become codes. An adapter over frozen codes stays beside them; any
other is folded in. Weights that do not change are shared, not copied. So the log-probabilities of
the answers are those that the trainer computes, except for the order of additions.

The trainer takes a `Rollouts` as a function and knows no engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.engine import MAX_ANSWERS
from opennemo.engine.sizes import PAGE_SIZE
from opennemo.engine.token import Token
from opennemo.errors import OpenNemoError
from opennemo.model.formats import SCALED_KV, plain
from opennemo.model.fused_attention import FUSED_PAGE_SIZE
from opennemo.model.lora import Adapter, LoRALinear, RoundedLoRA
from opennemo.model.quantization import (
    KVRounding,
    QATLinear,
    QuantizedLinear,
    quantize_,
    replace_module,
)
from opennemo.model.transformer import Transformer
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.chat import turn_end
from opennemo.train.practice import Drawn

ADAPTER = "learning"
SEQUENCES = 64  # drawn side by side


class Rollouts:
    """A `Rollout`: each call makes an engine around the model, and closes it after the answers."""

    def __init__(self, tokenizer: Tokenizer):
        end = turn_end(tokenizer)
        self.eos_ids = {tokenizer.eos_id, *({end} if isinstance(end, int) else ())}
        self.n_tokens = tokenizer.vocab_size

    def __call__(
        self, model: Transformer, prompts: Sequence[list[int]], *, n: int, max_tokens: int,
        seeds: Sequence[int], greedy: bool = False,
    ) -> list[list[Drawn]]:  # fmt: skip
        with gathered(model):
            engine = self._engine(model, prompts, n, max_tokens)
            drawn = _Answers(len(prompts), n)
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                for first in range(0, n, MAX_ANSWERS):
                    params = SamplingParams(
                        temperature=0.0 if greedy else 1.0, max_tokens=max_tokens, logprobs=0,
                        seed=seed + first,
                    )  # fmt: skip
                    engine.submit(
                        prompt, params, drawn.listener(i, first), n=min(MAX_ANSWERS, n - first),
                        adapter=ADAPTER if engine.adapters else None,
                    )  # fmt: skip
            # Without a thread: what a step computes then depends on the requests alone.
            while engine.step():
                drawn.check()
            drawn.check()
            engine.close()
        return drawn.groups

    def _engine(
        self, model: Transformer, prompts: Sequence[list[int]], n: int, max_tokens: int
    ) -> LocalEngine:
        made, adapter = served(model)
        kv = getattr(model, "kv_rounding", None)
        scale = kv.scale if isinstance(kv, KVRounding) and kv.rounds else None
        own = plain(made.norm.weight.dtype)
        assert own is not None, made.norm.weight.dtype
        page = FUSED_PAGE_SIZE if made.norm.weight.is_cuda else PAGE_SIZE
        pages = [-(-(len(prompt) + max_tokens) // page) + 1 for prompt in prompts for _ in range(n)]
        config = EngineConfig(
            n_pages=sum(sorted(pages)[-SEQUENCES:]), page_size=page,
            kv_format=own.name if scale is None else SCALED_KV, max_sequences=SEQUENCES,
            max_queued=len(prompts) * n + 1,
            n_draft_tokens=0,  # how many are guessed depends on measured times
            adapters=adapter is not None,
            keep_model=True,  # weights are the trainer's
        )  # fmt: skip
        engine = LocalEngine(made, self.eos_ids, config, scale, n_tokens=self.n_tokens)
        if adapter is not None:
            engine.adapters[ADAPTER] = adapter
        return engine


class _Answers:
    """Answers to requests that are under way."""

    def __init__(self, n_prompts: int, n: int):
        self.groups = [[Drawn([], [], False) for _ in range(n)] for _ in range(n_prompts)]
        self._error: str | OpenNemoError | None = None

    def listener(self, prompt: int, first: int):
        def listen(token: Token) -> None:
            answer = self.groups[prompt][first + token.index]
            if token.id is not None and token.logprobs is not None:
                answer.ids.append(token.id)
                answer.log_probs.append(token.logprobs.logprob)
            if token.finish_reason == "stop":
                self.groups[prompt][first + token.index] = answer._replace(whole=True)
            elif token.finish_reason not in (None, "length"):
                self._error = token.error or "an answer was cancelled"

        return listen

    def check(self) -> None:
        if self._error is not None:
            raise OpenNemoError(f"an answer could not be drawn: {self._error}")


@contextmanager
def gathered(model: Transformer) -> Iterator[None]:
    """Within this context each rank holds the whole weights, which ranks otherwise share."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for part in parts:
            part.unshard()
        yield
    finally:
        for part in parts:
            part.reshard()


@torch.no_grad()
def served(model: Transformer) -> tuple[Transformer, Adapter | None]:
    """The model as it would be served now, and the adapter beside it if there is one."""
    with torch.device("meta"):
        made = Transformer(model.config)
    beside: dict[str, tuple[Tensor, Tensor]] = {}
    format = None
    # On a GPU a model learns in bf16 from weights in float32.
    dtype = torch.bfloat16 if model.norm.weight.is_cuda else torch.float32
    leaves = [(path, leaf) for path, leaf in made.named_modules() if not list(leaf.children())]
    for path, leaf in leaves:
        module = model.get_submodule(path)
        if isinstance(module, LoRALinear) and isinstance(module.base, QuantizedLinear):
            low_rank = module.low_rank
            beside[path] = low_rank.a.to(dtype), (low_rank.scale * low_rank.b).to(dtype)
            module = module.base
        if isinstance(module, QuantizedLinear):
            replace_module(made, path, module)
            continue
        if isinstance(module, LoRALinear):
            weight = module.low_rank(module.base.get_parameter("weight"))
        elif isinstance(module, RoundedLoRA):
            weight = module.weight
        else:
            weight = module.get_parameter("weight")
        weight = nn.Parameter(weight.detach(), requires_grad=False)
        if isinstance(module, QATLinear) and module.rounds:
            format = module.format
            replace_module(made, path, QATLinear(weight, module.format, module.largest))
        else:
            leaf.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if made.config.tied_embeddings:
        made.output.weight = made.tok_embeddings.weight
    if format is not None:
        quantize_(made, format)
    return made.eval(), Adapter(ADAPTER, beside) if beside else None
