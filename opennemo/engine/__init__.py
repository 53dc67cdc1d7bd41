"""Token ids in, token ids out: many requests at once over one model and one paged KV cache."""

from opennemo.engine.engine import Engine, EngineConfig
from opennemo.engine.sequence import Event, SamplingParams

__all__ = ["Engine", "EngineConfig", "Event", "SamplingParams"]
