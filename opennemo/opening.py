"""From a model's files to a running engine and its text side: what `LLM.load` does.

It chooses the format, the context and the device, for the draft model and the ranks as well; no
module below knows of both a tokenizer and an engine.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.ranks import Ranks
from opennemo.engine.sizes import Fit, announcement, fit
from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import Checkpoint, load, open_checkpoint
from opennemo.model.companions import read_generation_config
from opennemo.model.hub import locate
from opennemo.model.memory import open_device
from opennemo.model.tensor_parallel import check_divides, load_share
from opennemo.model.transformer import Transformer
from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.chat import turn_end

# NeMo's model card asks for it: "requires smaller temperatures". A model without sampling settings
# answers greedily, which suits the small one that `make chat` brings.
NEMO_TEMPERATURE = 0.3


def open_model(
    model: str, device: str | None, dtype: torch.dtype | None, config: EngineConfig, format: str
) -> tuple[str, Tokenizer, LocalEngine, SamplingParams]:
    """A model's name, its tokenizer, its running engine, and its own sampling settings.

    Raises:
        CheckpointError, InvalidRequest: as `LLM.load`.
    """
    path, device = locate(model), open_device(device)
    name, tokenizer, defaults, eos_ids = text_side(path, model)
    checkpoint = open_checkpoint(path)
    eos_ids = {id for id in eos_ids if id < checkpoint.config.vocab_size}
    draft, small = _fit_draft(config, tokenizer, device)
    chosen = fit(checkpoint, device, config, format, dtype, small)
    if line := announcement(checkpoint, config, chosen, format):
        print(f"opennemo: {line}", file=sys.stderr)
    config = replace(config, kv_format=chosen.kv_format, n_pages=chosen.n_pages)
    ranks = None
    if config.tensor_parallel_size > 1:
        if config.adapters or chosen.form.format is not None:
            raise InvalidRequest("tensor_parallel_size above 1 takes no adapters and no codes")
        check_divides(checkpoint.config, config.tensor_parallel_size)
        share = partial(_share, path, chosen.form.dtype, config.tensor_parallel_size)
        ranks = Ranks(config.tensor_parallel_size, share, device)
        net = ranks.model
    else:
        net = load(checkpoint, device=device, form=chosen.form)
    small_net = load(draft, device=device, form=small.form) if draft and small else None
    engine = LocalEngine(
        net, eos_ids, config, checkpoint.read_kv_scale(), ranks, tokenizer.vocab_size, small_net
    )
    engine.start()
    return name, tokenizer, engine, defaults


def text_side(path: Path, model: str) -> tuple[str, Tokenizer, SamplingParams, set[int]]:
    """A model's name, its tokenizer, its own sampling settings, and the ids that end an answer."""
    tokenizer = load_tokenizer(path)
    given = read_generation_config(path)
    nemo = tokenizer.instruct_version == "v3-tekken"
    defaults = SamplingParams(
        temperature=given.get("temperature", NEMO_TEMPERATURE if nemo else 0.0),
        top_p=given.get("top_p", 1.0),
        top_k=given.get("top_k", 0),
    )
    end = turn_end(tokenizer)
    eos_ids = {tokenizer.eos_id, *given.get("eos_token_ids", ())}
    eos_ids |= {end} if isinstance(end, int) else set()
    name = path.stem if path.suffix == ".gguf" else model.rstrip("/").rsplit("/", 1)[-1]
    return name, tokenizer, defaults, eos_ids


def _share(
    path: Path, dtype: torch.dtype | None, n_ranks: int, rank: int, device: str
) -> Transformer:
    """What a rank loads, in a process of its own; see Ranks."""
    return load_share(open_checkpoint(path), rank, n_ranks, device=device, dtype=dtype)


def _fit_draft(
    config: EngineConfig, tokenizer: Tokenizer, device: str
) -> tuple[Checkpoint | None, Fit | None]:
    """The small model that guesses for one with this tokenizer, and how it runs."""
    if config.draft is None:
        return None, None
    path = locate(config.draft)
    if not tokenizer.has_vocabulary_of(load_tokenizer(path)):
        raise InvalidRequest(
            f"draft {config.draft}: its vocabulary is not that of the model it guesses for"
        )
    checkpoint = open_checkpoint(path)
    return checkpoint, fit(checkpoint, device, EngineConfig(n_pages=1, page_size=config.page_size))
