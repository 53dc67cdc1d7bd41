"""OpenNemo: the whole Mistral NeMo system in one small package. Start at docs/architecture.md.

from opennemo import LLM

with LLM.load("smollm2-135m-instruct") as llm:
    print(llm.chat([{"role": "user", "content": "Hello!"}]).text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opennemo.engine import EngineConfig, SamplingParams
    from opennemo.errors import OpenNemoError
    from opennemo.llm import LLM
    from opennemo.reply import Reply

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "OpenNemoError", "Reply", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import the name on first use, since that imports PyTorch."""
    homes = {"LLM": "llm", "Reply": "reply", "OpenNemoError": "errors"}
    if name not in __all__:
        raise AttributeError(f"module 'opennemo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"opennemo.{homes.get(name, 'engine')}"), name)
