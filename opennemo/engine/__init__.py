"""Token ids in, token ids out: many requests at once over one model and one paged KV cache."""

from opennemo.engine.engine import Engine, EngineConfig
from opennemo.engine.sequence import SamplingParams
from opennemo.engine.token import Token

__all__ = ["Engine", "EngineConfig", "SamplingParams", "Token"]
