"""The model that a server's settings name, in an engine of this process."""

from pathlib import Path

from opennemo.engine import EngineConfig
from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.model.formats import FORMATS, names
from opennemo.serve.settings import Settings


def load_model(settings: Settings) -> LLM:
    """The model that settings name, in an engine of this process, with its adapters.

    Raises:
        CheckpointError: it cannot be loaded.
        InvalidRequest: an adapter is not named as NAME=FOLDER.
    """
    modules = adapters_of(settings)
    kinds = names("cache")  # without "auto"
    kv_formats = {FORMATS[name].dtype_name: name for name in kinds} | {name: name for name in kinds}
    config = EngineConfig(
        max_context=settings.max_model_len,
        page_size=settings.block_size,
        kv_format=kv_formats.get(settings.kv_cache_dtype),
        kv_scale=settings.kv_scale,
        max_batched_tokens=settings.max_num_batched_tokens,
        max_sequences=settings.max_num_seqs,
        max_queued=settings.max_num_queued_reqs,
        prefix_caching=settings.enable_prefix_caching,
        n_draft_tokens=settings.num_speculative_tokens,
        draft=settings.draft,
        cache_dir=settings.cache_dir,
        max_cache_size=settings.max_cache_size,
        adapters=bool(modules or settings.lora_root),
        tensor_parallel_size=settings.tensor_parallel_size,
    )
    return LLM.load(
        settings.model, device=settings.device, dtype=settings.dtype, config=config,
        format=settings.quantization or settings.format, adapters=modules,
    )  # fmt: skip


def adapters_of(settings: Settings) -> dict[str, Path]:
    """The folders of `--lora-modules`, by name. Raises: InvalidRequest, one is not NAME=FOLDER."""
    modules = {}
    for module in settings.lora_modules:
        name, equals, folder = module.partition("=")
        if not equals:
            raise InvalidRequest(f"--lora-modules {module} is not NAME=FOLDER")
        modules[name] = Path(folder)
    return modules
