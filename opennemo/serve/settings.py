"""A server's settings: command line over environment over a TOML file over defaults.

Names are vLLM's, since people know them; `NIM_*` variables of NVIDIA's containers mean what they
mean there. This and the command line are the only places that read the environment.
"""

import os
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from opennemo.errors import InvalidRequest
from opennemo.model.formats import FORMATS, SCALED_KV, by_name, names
from opennemo.model.memory import STORED
from opennemo.serve.auth import LOOPBACK

Names = Annotated[list[str], NoDecode]
Count = Annotated[int, Field(ge=0, le=2**40)]
NIM = {
    "NIM_MODEL_PATH": "model",
    "NIM_SERVED_MODEL_NAME": "served_model_name",
    "NIM_MAX_MODEL_LEN": "max_model_len",
    "NIM_SERVER_PORT": "port",
    "NIM_LOG_LEVEL": "log_level",
    "NIM_JSONL_LOGGING": "log_format",
    "NIM_PEFT_SOURCE": "lora_root",
    "NIM_SSL_KEY_PATH": "ssl_keyfile",
    "NIM_SSL_CERTS_PATH": "ssl_certfile",
    "NIM_CORS_ALLOW_ORIGINS": "allowed_origins",
    "NIM_ENABLE_KV_CACHE_REUSE": "enable_prefix_caching",
    "NIM_TENSOR_PARALLEL_SIZE": "tensor_parallel_size",
    "NIM_DRAFT_MODEL_PATH": "draft",
    "NIM_MAX_BATCH_SIZE": "max_num_seqs",
}
TLS_MODE = "NIM_SSL_MODE"  # DISABLED, or TLS, which the certificate's path says, too
PASSTHROUGH = "NIM_PASSTHROUGH_ARGS"
LOG_FORMATS = {"true": "json", "1": "json", "false": "text", "0": "text"}  # NIM's
LOG_LEVELS = {"default": "info", "trace": "debug", "warn": "warning", "fatal": "critical"}  # NIM's
# vLLM's flags that change no answer here: they arrange its memory, graphs and workers.
VLLM_ONLY = frozenset(
    {
        "api-server-count", "async-scheduling", "attention-backend", "compilation-config",
        "cpu-offload-gb", "cuda-graph-sizes", "disable-custom-all-reduce",
        "disable-fastapi-docs", "disable-frontend-multiprocessing",
        "disable-hybrid-kv-cache-manager",
        "disable-log-requests", "disable-log-stats", "disable-uvicorn-access-log",
        "distributed-executor-backend", "download-dir", "enable-chunked-prefill", "enable-lora",
        "enable-log-requests", "enable-prompt-tokens-details", "enable-sleep-mode", "enforce-eager",
        "gpu-memory-utilization", "guided-decoding-backend",
        "kv-cache-memory-bytes", "load-format", "max-cpu-loras", "max-log-len", "max-logprobs",
        "max-lora-rank", "max-loras", "max-parallel-loading-workers", "max-seq-len-to-capture",
        "mm-processor-kwargs", "num-gpu-blocks-override", "num-scheduler-steps",
        "optimization-level", "preemption-mode", "safetensors-load-strategy",
        "scheduling-policy", "seed", "swap-space", "trust-remote-code",
        "use-v2-block-manager", "uvicorn-log-level",
    }
)  # fmt: skip


def _formats() -> list[str]:
    return ["auto", STORED, *names("load")]


def _quantizations() -> list[str]:
    return [name for name in names("load") if by_name(name).in_codes]


def _kv_dtypes() -> list[str]:
    """vLLM's names, which are PyTorch's of plain types, and ours."""
    kinds = names("cache")
    return list(dict.fromkeys(["auto", *(FORMATS[name].dtype_name for name in kinds), *kinds]))


def _one_of(choices: Callable[[], list[str]]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices():
            raise ValueError(f"allowed are {', '.join(choices())}")
        return value

    return check


class Settings(BaseSettings):
    """Serve a model to clients of OpenAI, Mistral, Anthropic and NVIDIA NIM."""

    model_config = SettingsConfigDict(
        env_prefix="OPENNEMO_", cli_kebab_case=True, cli_implicit_flags=True, extra="forbid",
        cli_hide_none_type=True, cli_avoid_json=True,
    )  # fmt: skip

    model: CliPositionalArg[str] = Field(
        "smollm2-135m-instruct", description="A model folder, a .gguf file or a Hugging Face id."
    )
    served_model_name: Names = Field([], description="Name of the model for clients; repeatable.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    device: str | None = Field(None, description="cpu or cuda; by default a GPU if there is one.")
    format: Annotated[str, AfterValidator(_one_of(_formats))] = Field(
        "auto",
        description="Of the weights: auto keeps what is stored, and rounds what does not fit into "
        f"memory; {', '.join(_formats()[1:])}.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="vLLM's way to say --format."
    )
    quantization: Annotated[str, AfterValidator(_one_of(_quantizations))] | None = Field(
        None, description=f"Round weights as they are loaded: {', '.join(_quantizations())}."
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="Processes, or GPUs, that share every layer of the model."
    )
    replicas: int = Field(
        0, ge=0, le=4096, description="Engines, over Ray Serve; 0: one, in this process, no Ray."
    )
    max_replicas: int | None = Field(
        None, ge=1, le=4096, description="Ray adds replicas up to here as requests queue."
    )
    ray_address: str | None = Field(
        None, description="HOST:PORT or auto, of a cluster; by default one for this server alone."
    )
    replica_cpus: int | None = Field(
        None, ge=1, le=1024, description="Threads of a replica; by default its share of this host."
    )
    replica_gpus: float | None = Field(
        None, ge=0, le=64, description="Or a fraction; by default one for each rank."
    )
    config: Path | None = Field(None, description="A TOML file with any of these settings.")

    api_key: Names = Field([], description="A key that clients must show; repeatable.")
    api_key_file: Path | None = Field(None, description="Lines of: NAME SHA256 [LIMIT=NUMBER ...]")
    admin_key: str | None = Field(None, description="Key of the admin routes, off without one.")
    insecure: bool = Field(False, description="Allow other hosts in without a key.")
    metrics_auth: bool = Field(False, description="Require a key at /metrics, too.")
    allowed_origins: Names = Field([], description="CORS; off by default.")
    requests_per_minute: Count = Field(0, description="Of each key; 0 is no limit.")
    tokens_per_minute: Count = Field(0, description="Of each key; 0 is no limit.")
    max_concurrent: Count = Field(0, description="Requests of each key at once; 0 is no limit.")

    max_model_len: int | None = Field(None, ge=1, le=2**31, description="Tokens of context.")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Answers computed side by side.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, le=2**20,
        description="Tokens in one step; by default 512 on a CPU and 2,048 on a GPU.",
    )  # fmt: skip
    max_num_queued_reqs: int = Field(1024, ge=1, le=2**20, description="One more gets a 503.")
    block_size: int | None = Field(None, ge=1, le=1024, description="Tokens in a page of KV cache.")
    kv_cache_dtype: Annotated[str, AfterValidator(_one_of(_kv_dtypes))] = Field(
        "auto",
        description=f"Number format of the KV cache: auto, {', '.join(names('cache'))}. auto is "
        f"{SCALED_KV} where the model brings scales, else int8 on a CPU and dtype on a GPU.",
    )
    kv_scale: float | None = Field(
        None,
        gt=0,
        le=2**20,
        description=f"For {SCALED_KV} where the model brings no scales, such as 1.",
    )
    enable_prefix_caching: bool = Field(True, description="Share prompts that begin alike.")
    cache_dir: Path | None = Field(
        None, description="Keep computed prompts here, for after a restart."
    )
    max_cache_size: int = Field(10 * 2**30, ge=0, le=2**50, description="Bytes of --cache-dir.")
    share_prefix_cache: bool = Field(
        False, description="Share prefixes between keys, which must trust each other."
    )
    num_speculative_tokens: int | None = Field(
        None, ge=0, le=64,
        description="Guessed for an answer in each step; 0: off; by default as many as save time.",
    )  # fmt: skip
    draft: str | None = Field(
        None, description="A small model of the same vocabulary that guesses ahead."
    )
    override_generation_config: dict[str, float] = Field(
        {}, description='Defaults of requests, e.g. {"temperature": 0.3}.'
    )
    lora_modules: Names = Field([], description="NAME=FOLDER of an adapter; repeatable.")
    lora_root: Path | None = Field(None, description="Adapters may be loaded from below it.")
    enable_auto_tool_choice: bool = Field(True, description="Always on.")
    tool_call_parser: Literal["mistral"] = Field("mistral", description="Always this.")
    tokenizer_mode: Literal["auto", "mistral"] = Field("auto", description="Changes nothing.")

    strict_params: bool = Field(False, description="Unknown fields get a 422.")
    mistral_usage: bool = Field(False, description="Always put usage on the last chunk.")
    max_body_size: int = Field(2**24, ge=1024, le=2**32, description="Bytes of a request.")
    sse_keep_alive_interval: float = Field(15, gt=0, le=3600, description="Seconds.")
    state_dir: Path = Field(
        default_factory=lambda: _state_home() / "opennemo",
        description="Files and batches are kept here; by default ~/.local/state/opennemo.",
    )
    max_file_size: int = Field(200 * 2**20, ge=1024, le=2**40, description="Bytes of an upload.")
    max_batch_lines: int = Field(50_000, ge=1, le=2**31, description="Lines of an upload.")
    max_state_size: int = Field(10 * 2**30, ge=0, le=2**50, description="Bytes of all files.")
    max_num_batch_seqs: int = Field(
        32, ge=1, le=4096,
        description="Lines of batches answered side by side; a live request takes one's place.",
    )  # fmt: skip
    shutdown_timeout: float = Field(30, ge=0, le=86400, description="Seconds to finish answers.")
    watchdog_timeout: float = Field(300, gt=0, le=86400, description="Seconds a step may take.")
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="Show metrics under vLLM's names, too."
    )
    otlp_traces_endpoint: str | None = Field(
        None, pattern="^https?://", description="Collector of OpenTelemetry spans; needs an extra."
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="By default warning in a terminal, else info."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto: text in a terminal, else one JSON object a line."
    )
    enable_docs: bool = Field(False, description="Offer /openapi.json.")
    root_path: str = Field("", description="Path a proxy strips.")
    ssl_keyfile: Path | None = Field(None, description="Key for HTTPS.")
    ssl_certfile: Path | None = Field(None, description="Its certificate.")

    @model_validator(mode="before")
    @classmethod
    def _read_file_and_lists(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The file has the lowest priority; commas separate names in the environment, as in NIM."""
        if file := values.get("config"):
            try:
                values = tomllib.loads(Path(file).read_text("utf-8")) | values
            except (OSError, ValueError) as error:
                what = error.strerror if isinstance(error, OSError) else error
                raise InvalidRequest(f"--config {file}: {what}") from None
        for name in ("served_model_name", "allowed_origins", "api_key", "lora_modules"):
            if isinstance(values.get(name), str):
                values[name] = [v.strip() for v in values[name].split(",") if v.strip()]
        if isinstance(values.get("log_level"), str):
            level = values["log_level"].lower()
            values["log_level"] = LOG_LEVELS.get(level, level)
        form = str(values.get("log_format", "auto")).lower()
        values["log_format"] = LOG_FORMATS.get(form, form)
        for name in ("model", "draft"):
            if isinstance(values.get(name), str):  # as NIM writes that it lies on the hub
                values[name] = values[name].removeprefix("hf://")
        return values

    @model_validator(mode="after")
    def _closed_by_default(self) -> "Settings":
        if not (self.is_loopback or self.api_key or self.api_key_file or self.insecure):
            raise ValueError(f"listening on {self.host} needs --api-key, or --insecure")
        if not self.replicas and (self.max_replicas or self.ray_address):
            raise ValueError("--max-replicas and --ray-address need --replicas")
        if (self.format != "auto") + (self.dtype != "auto") + (self.quantization is not None) > 1:
            raise ValueError("--format, --dtype and --quantization exclude each other")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError("--max-replicas is below --replicas")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        if any(len(key) < 8 for key in (*self.api_key, self.admin_key or "long enough")):
            raise ValueError("keys have at least 8 characters")
        return self

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def is_talking(self) -> bool:
        """Whether a person reads the log, rather than a program."""
        return self.log_format == "text" or (self.log_format == "auto" and sys.stderr.isatty())

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        init, env = named["init_settings"], named["env_settings"]
        nim = {NIM[k]: v for k, v in os.environ.items() if k in NIM and v}
        if os.environ.get(TLS_MODE, "").upper() == "DISABLED":
            nim = {name: v for name, v in nim.items() if not name.startswith("ssl_")}
        return init, env, InitSettingsSource(settings_cls, nim)


def _state_home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))


def without_effect() -> list[str]:
    """NIM's variables, and vLLM's flags among its arguments, that are set and have no effect."""
    nim = {name for name, value in os.environ.items() if name.startswith("NIM_") and value}
    flags = [f"{PASSTHROUGH}: {flag}" for flag in _passed_through()[1]]
    return [*sorted(nim - NIM.keys() - {PASSTHROUGH, TLS_MODE}), *flags]


def _passed_through() -> tuple[list[str], list[str]]:
    """Arguments of NIM_PASSTHROUGH_ARGS that have an effect, and flags that only vLLM knows."""
    kept: list[str] = []
    dropped: list[str] = []
    into = kept
    for word in shlex.split(os.environ.get(PASSTHROUGH, "")):
        if word.startswith("-") and not word[1:2].isdigit():
            name = word.lstrip("-").partition("=")[0].replace("_", "-")
            into = dropped if name.removeprefix("no-") in VLLM_ONLY else kept
        into.append(word)
    return kept, [word for word in dropped if word.startswith("-")]


def read_settings(arguments: list[str]) -> Settings:
    """The settings of a server that is started with these arguments.

    Raises:
        InvalidRequest: what is wrong with which setting.
    """
    if (mode := os.environ.get(TLS_MODE) or "TLS").upper() not in ("TLS", "DISABLED"):
        raise InvalidRequest(f"{TLS_MODE} is {mode}, allowed are TLS and DISABLED")
    # A later flag wins over an earlier one, so those of the environment come first.
    try:
        arguments = [*_passed_through()[0], *arguments]
        options: dict[str, Any] = {"_cli_parse_args": arguments, "_cli_exit_on_error": False}
        return Settings(**options, _cli_prog_name="opennemo serve")  # pyright: ignore
    except ValidationError as error:
        first = error.errors()[0]
        where = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise InvalidRequest(
            (f"--{where}: " if where else "") + first["msg"].removeprefix("Value error, ")
        ) from None
    except (SettingsError, ValueError, RecursionError) as error:
        raise InvalidRequest(str(error).splitlines()[0]) from None
