"""Token ids in, token ids out: many requests at once over one model and one paged KV cache."""

from opennemo.engine.engine import Engine
from opennemo.engine.local import LocalEngine
from opennemo.engine.params import SamplingParams
from opennemo.engine.sizes import EngineConfig
from opennemo.engine.token import Token

__all__ = ["Engine", "EngineConfig", "LocalEngine", "SamplingParams", "Token"]
