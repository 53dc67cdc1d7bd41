"""Bodies of OpenAI's and Mistral's requests, as one superset, and what they ask of the model.

Every number has bounds, and NaN is invalid. Unknown fields are kept apart and reported, not
refused, because clients keep adding new ones; `--strict-params` refuses them. Messages and tools
stay plain dicts here: `tokenizer/messages.py` brings them to one form.
"""

from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from opennemo.engine import SamplingParams
from opennemo.engine.repetition import Repetition
from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.serve.error_bodies import Refusal
from opennemo.serve.protocols.answer_formats import (
    FIELDS,
    Format,
    guided,
    only,
    response_format,
    structured_outputs,
)
from opennemo.tokenizer import Tokenizer

# Fields of the protocols that cannot change our answers; never refused.
WITHOUT_EFFECT = frozenset(
    {
        "background", "guardrails", "guided_decoding_backend", "include", "metadata", "modalities",
        "parallel_tool_calls", "prediction", "priority", "prompt_cache_key",
        "prompt_cache_retention", "prompt_mode", "reasoning", "reasoning_effort", "request_id",
        "safety_identifier", "service_tier", "skip_special_tokens",
        "spaces_between_special_tokens", "store", "tool_choice", "truncation", "user", "verbosity",
    }
)  # fmt: skip
# Fields that would let a request run code in the server.
REFUSED = ("chat_template", "chat_template_kwargs", "logits_processors", "logits_processor_pattern")
DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
MAXIMA = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # the first that is given
PROMPTS = ("prompt", "messages", "input", "instructions", "system", "tools")
SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid "
    "harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and "
    "positivity."
)


def _few(value: Any) -> Any:
    """Count the entries of an object before pydantic validates each of them."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES:,} entries are allowed")
    return value


MAX_BIASES = 1024
LEAST_LOGPROB = -9999.0  # -inf is no JSON number; OpenAI's own server writes this instead
# In a long list only the first invalid entry is reported.
Stop = Annotated[
    list[Annotated[str, Field(max_length=1024)]],
    Field(max_length=16),
    BeforeValidator(lambda v: [v] if isinstance(v, str) else v or []),
]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=1024, fail_fast=True)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096, fail_fast=True)]
ToolChoice = str | dict[str, Any]


class Body(BaseModel):
    """A request's body; `extra` holds what it has besides."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(max_length=256)]
    stream: bool | None = False

    def ignored(self, *, strict: bool) -> list[str]:
        """Names of the fields without effect.

        Raises:
            InvalidRequest: a field that is refused for safety.
            Refusal: 422 for an unknown field, if `strict`.
        """
        extra = {name for name, value in (self.model_extra or {}).items() if value is not None}
        extra -= FIELDS  # `format` applies or refuses them
        if refused := sorted(extra & set(REFUSED)):
            raise InvalidRequest(f"{refused[0]}: the server does not take this from a request")
        unknown = sorted(extra - WITHOUT_EFFECT)
        if strict and unknown:
            detail = [
                {"type": "extra_forbidden", "loc": ["body", name], "msg": "unknown field"}
                for name in unknown[:20]
            ]
            names = ", ".join(unknown[:20])[:1000]
            raise Refusal(422, f"unknown fields: {names}", detail=detail)
        return sorted(extra)

    def applied(self, llm: LLM) -> frozenset[str]:
        """Fields beyond those of the class that this model takes."""
        return frozenset()

    @property
    def longest(self) -> int | None:
        """How many tokens an answer may have, by whichever field says it."""
        given = [n for name in MAXIMA if (n := getattr(self, name, None)) is not None]
        return given[0] if given else None

    def n_expected(self, llm: LLM) -> int:
        """An estimate of the tokens that the request may use: its prompt, and answers in full."""
        most = llm.engine.max_context
        longest = most if self.longest is None else min(self.longest, most)
        prompt = sum(_n_tokens(getattr(self, name, None)) for name in PROMPTS)
        return prompt + longest * (getattr(self, "n", None) or 1)

    def format(self, *own: Format | None) -> Format | None:
        """The format of the answer, from the protocol's own fields or another server's.

        Raises:
            InvalidRequest: it cannot be enforced, or there are two.
        """
        return only({*own, guided(self.model_extra or {})})


def _n_tokens(value: Any) -> int:
    """An estimate of the tokens in a value: one for each id, and for each four characters."""
    if isinstance(value, str):
        return len(value) // 4 + 1
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_n_tokens, value)) if isinstance(value, list) else value is not None


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class RepetitionDetection(BaseModel):
    """vLLM's, where 0 means off, or one token at the least."""

    model_config = ConfigDict(extra="forbid")

    max_pattern_size: int = Field(0, ge=0, le=2048)
    min_pattern_size: int = Field(0, ge=0, le=2048)
    min_count: int = Field(0, ge=0, le=2**20)

    def params(self) -> Repetition | None:
        """The same for the engine. Raises: InvalidRequest, the numbers make no sense."""
        if self.max_pattern_size == 0:
            return None
        least = max(self.min_pattern_size, 1)
        return Repetition(
            max_pattern_size=self.max_pattern_size, min_pattern_size=least, min_count=self.min_count
        )


class Sampling(Body):
    """How tokens are chosen: fields of OpenAI, Mistral and vLLM."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    # Names of llama.cpp and koboldcpp, where -1 and 0 mean off.
    typical_p: float | None = Field(
        None, gt=0, le=1, validation_alias=AliasChoices("typical_p", "typical")
    )
    top_n_sigma: float | None = Field(
        None, ge=-1, le=100, validation_alias=AliasChoices("top_n_sigma", "nsigma")
    )
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    dry_multiplier: float | None = Field(None, ge=0, le=100)
    dry_base: float | None = Field(None, ge=1, le=100)
    dry_allowed_length: int | None = Field(None, ge=0, lt=2**31)
    dry_penalty_last_n: int | None = Field(None, ge=-1, lt=2**31)
    dry_sequence_breakers: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=16)]
        | None
    ) = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[Id, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)] | None
    ) = None
    seed: Seed | None = None
    random_seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    allowed_token_ids: (
        Annotated[list[Id], Field(min_length=1, max_length=2**18, fail_fast=True)] | None
    ) = None
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1024)]],
            Field(max_length=1024, fail_fast=True),
        ]
        | None
    ) = None
    ignore_eos: bool | None = None
    repetition_detection: RepetitionDetection | None = None
    n: int | None = Field(None, ge=1, le=16)
    best_of: int | None = Field(None, ge=1, le=1)
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    cache_salt: str | None = Field(None, pattern=r"^[\w.-]{1,64}$")
    return_token_ids: bool | None = False
    include_stop_str_in_output: bool | None = False
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, llm: LLM) -> dict[str, Any]:
        """Arguments for `LLM.chat` and `LLM.complete`; what is not given stays the model's own."""
        # Of the same name and meaning; those that are spelt in another way follow.
        same = Sampling.model_fields.keys() & {"n", *(one.name for one in fields(SamplingParams))}
        given = {name: v for name in same if (v := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)  # -1 is vLLM's value for off
        if self.top_n_sigma is not None:
            given["top_n_sigma"] = max(self.top_n_sigma, 0.0)
        if self.dry_multiplier and self.dry_penalty_last_n == 0:  # llama.cpp's value for off
            given["dry_multiplier"] = 0.0
        elif self.dry_multiplier:
            given["dry_window"] = max(self.dry_penalty_last_n or 0, 0)
            breakers = self.dry_sequence_breakers
            breakers = DRY_BREAKERS if breakers is None else tuple(breakers)
            given["dry_breakers"] = _ids_with(llm.tokenizer, breakers)
        if (seed := self.seed if self.seed is not None else self.random_seed) is not None:
            given["seed"] = seed
        if self.repetition_detection is not None:
            given["repetition_detection"] = self.repetition_detection.params()
        if self.stop_token_ids:
            given["stop_ids"] = frozenset(self.stop_token_ids)
        if self.allowed_token_ids is not None:
            given["allowed_ids"] = frozenset(self.allowed_token_ids)
            if max(self.allowed_token_ids) >= (n := llm.engine.vocab_size):
                raise InvalidRequest(f"allowed_token_ids: names an id outside 0 to {n - 1}")
        if self.bad_words is not None:  # as vLLM does: alone, and behind a space
            words = [start + w.lstrip() for w in self.bad_words for start in ("", " ")]
            encoded = {tuple(llm.tokenizer.encode(word)) for word in words}
            given["bad_words"] = tuple(ids for ids in encoded if ids)
        own = structured_outputs(self.structured_outputs), response_format(self.response_format)
        return given | {"stop": tuple(self.stop or ()), "format": self.format(*own)}


@lru_cache(maxsize=32)
def _ids_with(tokenizer: Tokenizer, texts: tuple[str, ...]) -> frozenset[int]:
    """Ids of the tokens that contain one of the texts."""
    wanted = [text.encode() for text in texts]
    meanings = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return frozenset(id for id, own in enumerate(meanings) if any(text in own for text in wanted))


class ChatRequest(Sampling):
    """POST /v1/chat/completions, of OpenAI, Mistral and vLLM."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = True
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    safe_prompt: bool | None = False
    continue_final_message: bool | None = False
    add_generation_prompt: bool | None = True
    echo: bool | None = False
    thinking_token_budget: int | None = Field(None, ge=1, lt=2**31)  # as vLLM spells it

    def arguments(self, llm: LLM) -> dict[str, Any]:
        """Arguments for `LLM.chat`."""
        messages = list(self.messages)
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise InvalidRequest("add_generation_prompt: false needs continue_final_message: true")
        if self.continue_final_message and messages[-1].get("role") == "assistant":
            messages[-1] = {**messages[-1], "prefix": True}
        if self.safe_prompt:
            messages.insert(0, {"role": "system", "content": SAFE_PROMPT})
        given = self.sampling(llm)
        if self.max_completion_tokens:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs: true")
        effort = (self.model_extra or {}).get("reasoning_effort")
        if "reasoning_effort" in llm.tokenizer.settings:
            given["settings"] = {"reasoning_effort": effort}
        return given | {
            "messages": messages,
            "tools": self.tools or None,
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "thinking_budget": self.thinking_token_budget,
        }

    def applied(self, llm: LLM) -> frozenset[str]:
        return frozenset({"reasoning_effort"} & {*llm.tokenizer.settings})

    def is_mistral(self) -> bool:
        """Whether one of Mistral's clients seems to have sent it."""
        return bool(self.model_fields_set & {"random_seed", "safe_prompt"}) or (
            self.tool_choice == "any"
        )

    def prefix(self) -> str:
        """The text that an answer repeats: Mistral's `prefix: true` does, vLLM's `echo`, too."""
        last = self.messages[-1]
        wanted = last.get("prefix") or (self.continue_final_message and self.echo)
        content = last.get("content")
        is_text = last.get("role") == "assistant" and isinstance(content, str)
        return str(content) if wanted and is_text else ""


class CompletionRequest(Sampling):
    """POST /v1/completions, of OpenAI and vLLM."""

    prompt: (
        Annotated[list[Id], Field(fail_fast=True)]
        | Annotated[
            list[str | Annotated[list[Id], Field(fail_fast=True)]],
            Field(max_length=64, fail_fast=True),
        ]
        | str
    )
    suffix: str | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    add_special_tokens: bool | None = True
    truncate_prompt_tokens: int | None = Field(None, ge=1, lt=2**31)

    def ids(self, prompt: str | list[int], llm: LLM) -> list[int]:
        """One of the prompts as the model gets it."""
        if isinstance(prompt, str):
            bare = self.add_special_tokens is False
            if self.truncate_prompt_tokens is None:
                llm.check_room([prompt])
            prompt = llm.tokenizer.encode(prompt) if bare else llm.encode(prompt)
        return prompt[-(self.truncate_prompt_tokens or 0) :]

    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequest("prompt: is empty")
        return [prompt] if isinstance(prompt[0], int) else prompt  # pyright: ignore[reportReturnType]

    def arguments(self, llm: LLM) -> dict[str, Any]:
        """Arguments for `LLM.complete`, except the prompt."""
        if self.suffix:
            raise InvalidRequest("suffix: this model was not trained to fill in the middle")
        given = self.sampling(llm)
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo:
                given.setdefault("prompt_logprobs", self.logprobs)
        if self.max_tokens == 0:  # only the prompt's own log-probabilities are wanted
            given["max_tokens"] = 1
        return given


class Unnamed(Body):
    """A body that may leave out the model."""

    model: Annotated[str, Field(max_length=256)] | None = None  # pyright: ignore


class TokenizeRequest(Unnamed):
    """POST /tokenize, of vLLM: a text or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Unnamed):
    """POST /detokenize, of vLLM."""

    tokens: Annotated[list[Id], Field(fail_fast=True)]


class AdapterRequest(Unnamed):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter, of vLLM."""

    lora_name: str = Field(pattern=r"^[\w.:/-]{1,128}$")
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
