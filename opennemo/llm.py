"""Text in, text out: a tokenizer and an engine, and the steps between text and ids.

`LLM.load(model)` takes a folder, a `.gguf` file or a Hugging Face id; `chat` and `complete` return
a `Reply` at once (reply.py), whose text follows as tokens are chosen. On the way in, a conversation
becomes ids, and tools and formats become a grammar that the answer cannot leave. This module knows
neither HTTP nor the terminal.
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch

from opennemo.arguments import (
    Adapters,
    AnswerOptions,
    adapter_folders,
    answer_each,
    choose_tools,
    schema_setting,
    texts_in,
    torch_dtype,
)
from opennemo.engine import Engine, EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.grammar import GrammarCompiler
from opennemo.engine.lark import ANY_TEXT, Thinking
from opennemo.engine.params import Healing
from opennemo.engine.scoring import Pair, Score
from opennemo.engine.sizes import PAGE_SIZE, SAMPLE_CONTEXT, SAMPLES
from opennemo.errors import (
    CheckpointError,
    ContextTooLong,
    InvalidRequest,
    OpenNemoError,
    check_names,
)
from opennemo.model.hub import locate
from opennemo.model.transformer import Transformer
from opennemo.opening import open_model, text_side
from opennemo.reply import Reply, TextStream
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.calls import CallSyntax
from opennemo.tokenizer.chat import (
    Message,
    call_syntax,
    encode_chat,
    is_thinking,
    thinking_marks,
    turn_end,
)
from opennemo.tokenizer.load import difference_beside
from opennemo.tokenizer.messages import Tool

__all__ = ["LLM", "Reply", "TextStream"]

TAKEN_BACK = 8  # tokens at a prompt's end, at most: more than a superword has words
SLICE = 16 * 1024  # characters that are encoded at once to see whether a text can fit at all


class LLM:
    """A model that is ready to answer. Safe to use from many threads; `close` when done.

    >>> with LLM.load("smollm2-135m-instruct") as llm:
    ...     reply = llm.chat([{"role": "user", "content": "What is the capital of Germany?"}])
    ...     print(reply.text)
    The capital of Germany is Berlin.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, engine: Engine, defaults: SamplingParams):
        """Takes a running engine; `defaults` are the model's own sampling settings."""
        self.name, self.tokenizer, self.engine, self.defaults = name, tokenizer, engine, defaults

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        config: EngineConfig | None = None,
        format: str = "auto",
        adapters: Adapters = (),
        **sizes: Any,
    ) -> "LLM":
        """Load a model and start its engine.

        Args:
            model: a folder, a `.gguf` file, or a Hugging Face id such as
                `mistralai/Mistral-Nemo-Instruct-2407`.
            device: "cpu" or "cuda"; by default CUDA where there is one.
            dtype: "bfloat16", "float16" or "float32", or PyTorch's; for weights that are not in
                codes, and for the KV cache unless its format is named; replaces `format`.
            format: "auto", "stored" or one of FORMATS. "auto" keeps codes and 16 bits as they are
                stored, and rounds what does not fit into the memory that is available, matrix by
                matrix as it is read, to the best format that does. A line on standard error says
                so, as it does of a context shorter than the model's.
            adapters: folders of LoRA adapters, by the name that requests give; without names, each
                goes by the name of its folder.
            sizes: fields of EngineConfig such as `max_context`, which override `config`'s.

        Raises:
            CheckpointError: there is no such model, or it cannot be used.
            InvalidRequest: there is no such device; the model cannot run in this format; it or the
                context that `config` asks for does not fit, with the numbers, and what would; or
                the draft model has another vocabulary.
        """
        check_names("LLM.load", sizes, [field.name for field in fields(EngineConfig)])
        config, named = replace(config or EngineConfig(), **sizes), adapter_folders(adapters)
        config = replace(config, adapters=config.adapters or bool(named))
        llm = cls(*open_model(str(model), device, torch_dtype(dtype), config, format))
        try:
            for name, folder in named.items():
                llm.load_adapter(name, folder)
        except OpenNemoError:
            llm.close()
            raise
        return llm

    @classmethod
    def around(cls, model: str, engine: Engine) -> "LLM":
        """Only the text side of a model, around an engine that has the rest of it elsewhere.

        Raises:
            CheckpointError: there is no such model, or it has no tokenizer.
        """
        name, tokenizer, defaults, _ = text_side(locate(model), model)
        return cls(name, tokenizer, engine, defaults)

    def close(self) -> None:
        """Close the engine; answers that are not finished are cancelled."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def chat(
        self, messages: list[Message], params: SamplingParams | None = None, **options: Any
    ) -> Reply: ...

    @overload
    def chat(
        self, messages: list[list[Message]], params: SamplingParams | None = None, **options: Any
    ) -> list[Reply]: ...

    def chat(self, messages: Any, params: SamplingParams | None = None, **options: Any) -> Any:
        """Answer a conversation of OpenAI messages, or each of a list of them, side by side.

        Args:
            params: how tokens are chosen; by default as the model's own settings say.
            tools: that the answer may call, as in OpenAI's requests.
            tool_choice: "auto", "none", "required" (or "any"), or OpenAI's objects that name one
                tool or several. Calls are always to a declared tool, with valid arguments; what
                a grammar cannot enforce of a schema is left to the model with "auto" (`not_held` of
                the reply names it), and refused where a call is required or a tool is `strict`.
            parallel_tool_calls: whether an answer may make several calls.
            json_schema: of the answer's text; a JSON schema or a pydantic model.
            format: in its place, the kind of a grammar that the answer's text follows, and its
                source, as ("regex", "[0-9]+").
            stop: texts before which the answer ends.
            adapter: the name of one that was loaded.
            n: how many answers. Prompts share cached pages within the same `salt` only.
            settings: of the model itself, such as `reasoning_effort`, where it has any.
            thinking_budget: tokens of thinking after which the model's own closing token comes.
            options: fields of SamplingParams, which override those of `params`.

        Raises:
            InvalidRequest: a message, tool or setting that the model's chat layout cannot take.
            ContextTooLong: the conversation leaves no room for an answer.
        """
        if isinstance(messages, list) and messages and isinstance(messages[0], list):
            return answer_each(messages, lambda one: self._chat(one, params, **options))
        return self._chat(messages, params, **options)

    @overload
    def complete(
        self, prompt: str | list[int], params: SamplingParams | None = None, **options: Any
    ) -> Reply: ...

    @overload
    def complete(
        self,
        prompt: list[str] | list[list[int]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> list[Reply]: ...

    def complete(self, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Any:
        """Continue a text, after BOS, or ids exactly as given; or each of a list, side by side.

        `params` and `options` (json_schema, format, stop, adapter, n, salt) are those of `chat`.
        With `heal=True` the model may write the prompt's last tokens in another way, so that it
        does not matter where in a superword the prompt ends; a format excludes it.
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            return answer_each(prompt, lambda one: self._complete(one, params, **options))
        return self._complete(prompt, params, **options)

    def _chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        tools: list[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        settings: Mapping[str, Any] | None = None,
        thinking_budget: int | None = None,
        **options: Any,
    ) -> Reply:
        asked, sampling = AnswerOptions.among(options, "chat", self._chat)
        format, base = asked.grammar(), params or self.defaults
        allowed, required = choose_tools(tools or [], tool_choice)
        self.check_room(texts_in([messages, tools if allowed else None]))
        settings = dict(settings or {})
        if format is not None and "json_schema" in self.tokenizer.settings:
            settings |= schema_setting(*format)
        ids = encode_chat(self.tokenizer, messages, tools if allowed else None, settings)
        syntax = call_syntax(self.tokenizer)
        announcing_id = self.tokenizer.control.get(syntax.marks[0])
        left_out: tuple[str, ...] = ()
        marks = thinking_marks(self.tokenizer)
        if thinking_budget is not None and thinking_budget < 1:
            raise InvalidRequest(f"thinking_budget: {thinking_budget} is not a positive number")
        if thinking_budget is not None and marks is None:
            raise InvalidRequest("thinking_budget: this model has no marks around its thinking")
        thinking = marks and Thinking(*marks, is_thinking(self.tokenizer, ids), thinking_budget)
        words = format
        if thinking and thinking_budget is not None and words is None:
            words = ("regex", ANY_TEXT)
        if allowed:
            sampling["grammar"], left_out = self.grammars.compile_calls(
                syntax,
                allowed,
                required=required,
                format=format,
                parallel=parallel_tool_calls,
                thinking=thinking,
            )
        elif announcing_id is not None:
            bias = sampling.get("logit_bias", base.logit_bias)
            sampling["logit_bias"] = {**bias, announcing_id: -100.0}
        if words is not None and not allowed:
            sampling["grammar"] = (
                self.grammars.compile_after_thinking(*words, thinking)
                if thinking
                else self.grammars.compile(*words)
            )
        end = turn_end(self.tokenizer)
        stop = (*asked.stop, end) if isinstance(end, str) else asked.stop
        calls, chosen = syntax if allowed else None, replace(base, **sampling)
        reply = self._submit(ids, chosen, replace(asked, stop=stop), calls, marks)
        reply.not_held = left_out
        return reply

    def _complete(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        heal: bool = False,
        **options: Any,
    ) -> Reply:
        asked, sampling = AnswerOptions.among(options, "complete", self._complete)
        ids, known = self.encode(prompt) if isinstance(prompt, str) else prompt, b""
        if (format := asked.grammar()) is not None:
            if heal:
                raise InvalidRequest("heal: an answer that begins in the prompt follows no format")
            sampling["grammar"] = self.grammars.compile(*format)
        if heal:
            n_ids = min(self.tokenizer.vocab_size, self.engine.vocab_size)
            ids, sampling["healing"], known = _take_back(self.tokenizer, ids, n_ids)
        chosen = replace(params or self.defaults, **sampling)
        return self._submit(ids, chosen, asked, known=known)

    def score(
        self, pairs: Many[Pair], on_score: Callable[[int, Score], None] | None = None
    ) -> list[Score]:
        """How likely continuations are, each (ids of its context, its own ids); see `Engine`."""
        return self.engine.score(pairs, on_score)

    def load_adapter(self, name: str, folder: Path | str) -> None:
        """Load an adapter into the engine, to be asked for by name.

        Raises:
            CheckpointError: it is not for this model, or was taught with another tokenizer or chat
                template than the model's.
        """
        folder = Path(folder)
        if difference := difference_beside(folder, self.tokenizer):
            raise CheckpointError(
                f"{folder}: cannot be served beside this model, for {difference}; "
                "`opennemo merge` makes one model of both"
            )
        self.engine.load_adapter(name, folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, with BOS where the model uses one."""
        start = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        return start + self.tokenizer.encode(text)

    def check_room(self, texts: Iterable[str]) -> None:
        """Raise ContextTooLong for texts far too long for the model, without encoding it all."""
        room, texts = self.engine.max_context, list(texts)
        n_characters = sum(map(len, texts))
        if n_characters <= 8 * room:
            return
        if n_characters > 32 * room:  # no text has tokens that long, but runs of blanks
            raise ContextTooLong(room, room, more=True)
        n = 0
        for text in texts:
            for start in range(0, len(text), SLICE):
                n += len(self.tokenizer.encode(text[start : start + SLICE]))
                if n > 1.2 * room:  # words that a slice cuts in two count as more
                    raise ContextTooLong(n, room, more=True)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars for the vocabulary; built on first use (seconds, for NeMo)."""
        tokenizer, n_ids = self.tokenizer, self.engine.vocab_size
        tokens = [tokenizer.token_bytes(id) for id in range(min(tokenizer.vocab_size, n_ids))]
        # A model may have more rows than the vocabulary has tokens, or fewer.
        tokens += [b""] * (n_ids - len(tokens))
        control = {name: id for name, id in tokenizer.control.items() if id < n_ids}
        end = turn_end(tokenizer)
        eos_id = end if isinstance(end, int) else tokenizer.eos_id
        return GrammarCompiler(tokens, control, eos_id, tokenizer.encode)

    def _submit(
        self,
        ids: list[int],
        params: SamplingParams,
        asked: AnswerOptions,
        calls: CallSyntax | None = None,
        thinking: tuple[str, str] | None = None,
        known: bytes = b"",
    ) -> Reply:
        reply = Reply(self.tokenizer, self.engine, ids, asked.n, asked.stop, calls, thinking, known)
        reply.id = self.engine.submit(
            ids, params, reply.listen, n=asked.n, adapter=asked.adapter, salt=asked.salt
        )
        return reply


def answer_all(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Many[tuple[list[Message], list[Tool]]],
    **sampling: Any,
) -> list[Message]:
    """Answers of a model in memory, perhaps in training, side by side; it is not changed.

    PyTorch computes them: the weights are in memory once.
    """
    context = min(model.config.max_position_embeddings, SAMPLE_CONTEXT)
    config = EngineConfig(
        n_pages=SAMPLES * -(-context // PAGE_SIZE), page_size=PAGE_SIZE, max_context=context,
        kernels=False,
    )  # fmt: skip
    end = turn_end(tokenizer)
    eos_ids = {tokenizer.eos_id, *({end} if isinstance(end, int) else ())}
    engine = LocalEngine(model, eos_ids, config, n_tokens=tokenizer.vocab_size)
    engine.start()
    with LLM("", tokenizer, engine, SamplingParams(temperature=0.0)) as llm:
        replies = [llm.chat(m, tools=tools or None, **sampling) for m, tools in conversations]
        return [reply.message for reply in replies]


def _take_back(
    tokenizer: Tokenizer, ids: list[int], n_ids: int
) -> tuple[list[int], Healing | None, bytes]:
    """A prompt without its last tokens, how an answer may spell them, and their bytes.

    Takes back as many tokens as one token can begin with, at most `TAKEN_BACK`.
    """
    ways: list[tuple[bytes, frozenset[int]]] = []
    known = b""
    for last in reversed(ids[1:][-TAKEN_BACK:]):
        if not (data := tokenizer.token_bytes(last)):  # a control token, which nothing reaches over
            break
        known = data + known
        starts = frozenset(id for id in tokenizer.ids_beginning_with(known) if id < n_ids)
        ways.append((known, starts))
    n = max((i for i, (_, starts) in enumerate(ways, 1) if starts), default=0)
    if not n or (n == 1 and len(ways[0][1]) == 1):
        return ids, None, b""
    ends = tuple(starts for _, starts in reversed(ways[:n]))
    return ids[:-n], Healing(tuple(ids[-n:-1]), ends), ways[n - 1][0]
