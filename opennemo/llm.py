"""Text in, text out: a tokenizer and an engine, and what lies between text and ids.

`LLM.load(model)` takes a folder, a `.gguf` file or a Hugging Face id; `chat` and `complete` return
a `Reply` at once and the words follow as they are chosen. Between ids and words stand whole
UTF-8 characters, stop strings (which may lie across tokens) and, in a chat, the reply's message.
This module knows neither HTTP nor the terminal.
"""

import queue
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opennemo.engine import Engine, EngineConfig, Event, SamplingParams
from opennemo.errors import OpenNemoError
from opennemo.model.checkpoint import load
from opennemo.model.companions import read_generation_config
from opennemo.model.hub import locate
from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.chat import Message, encode_chat, parse_reply

# What NeMo's model card asks for ("requires smaller temperatures"), and a good choice for small
# models, too. A model whose generation config names another gets that.
DEFAULT_TEMPERATURE = 0.3


class LLM:
    """A model that is ready to answer. Safe to use from many threads; `close` when done.

    >>> with LLM.load("smollm2-135m-instruct") as llm:
    ...     reply = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
    ...     print(reply.text)
    The capital of France is Paris.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, engine: Engine, defaults: SamplingParams):
        """Takes a running engine; `defaults` are the model's own sampling settings."""
        self.name, self.tokenizer, self.engine, self.defaults = name, tokenizer, engine, defaults

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
    ) -> "LLM":
        """Load a model and start its engine.

        Args:
            model: a folder, a `.gguf` file, or a Hugging Face id such as
                `mistralai/Mistral-Nemo-Instruct-2407`.
            device: "cpu" or "cuda"; by default CUDA where there is one.
            dtype: of weights and KV cache; by default bfloat16 on CUDA and float32 on a CPU.

        Raises:
            CheckpointError: there is no such model, or it cannot be used.
        """
        path = locate(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        tokenizer = load_tokenizer(path)
        said = read_generation_config(path)
        defaults = SamplingParams(
            temperature=said.get("temperature", DEFAULT_TEMPERATURE),
            top_p=said.get("top_p", 1.0),
            top_k=said.get("top_k", 0),
        )
        eos_ids = {tokenizer.eos_id, *said.get("eos_token_ids", ())}
        engine = Engine(load(path, device=device, dtype=dtype), eos_ids, config)
        engine.start()
        return cls(_name(path, model), tokenizer, engine, defaults)

    def close(self) -> None:
        """Stop the engine; answers that are not finished are cancelled."""
        self.engine.stop()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chat(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        stop: tuple[str, ...] = (),
        **sampling: Any,
    ) -> "Reply":
        """Answer a conversation of OpenAI messages; `sampling` are fields of SamplingParams.

        Raises:
            InvalidRequest: a message, tool or setting that the model's chat layout cannot take.
            ContextTooLong: the conversation leaves no room for an answer.
        """
        return self._submit(encode_chat(self.tokenizer, messages, tools), stop, sampling)

    def complete(
        self, prompt: str | list[int], *, stop: tuple[str, ...] = (), **sampling: Any
    ) -> "Reply":
        """Continue a text, after BOS, or a list of ids exactly as given."""
        ids = prompt
        if isinstance(ids, str):
            ids = [self.tokenizer.bos_id, *self.tokenizer.encode(ids)]
        return self._submit(ids, stop, sampling)

    def _submit(
        self, ids: list[int], stop: tuple[str, ...], sampling: Mapping[str, Any]
    ) -> "Reply":
        params = replace(self.defaults, **sampling)
        return Reply(self.tokenizer, self.engine, ids, params, stop)


class Reply:
    """An answer on its way: iterate for its text, piece by piece; the whole is there afterwards.

    Attributes:
        ids: token ids so far, EOS included.
        n_prompt_tokens, n_cached_tokens: size of the prompt, and how much of it was in the cache.
        finish_reason: "stop", "length" or "cancelled" once the answer has ended.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Engine,
        prompt_ids: list[int],
        params: SamplingParams,
        stop: tuple[str, ...] = (),
    ):
        self.ids: list[int] = []
        self.n_prompt_tokens, self.n_cached_tokens = len(prompt_ids), 0
        self.finish_reason: str | None = None
        self._tokenizer, self._engine = tokenizer, engine
        self._text = TextStream(tokenizer, stop)
        self._pieces: list[str] = []
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._id = engine.submit(prompt_ids, params, self._events.put)

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they come, never empty. Ends early at a stop string.

        Raises:
            OpenNemoError: the engine could not finish the answer.
        """
        while self.finish_reason is None:
            piece = self._take(self._events.get())
            if piece:
                self._pieces.append(piece)
                yield piece

    def _take(self, event: Event) -> str:
        self.n_cached_tokens = event.n_cached_tokens
        if event.error:
            self.finish_reason = "error"
            raise OpenNemoError(event.error)
        piece = ""
        if event.token is not None:
            self.ids.append(event.token)
            piece = self._text.push(event.token)
        if self._text.stopped:
            self.cancel()
            self.finish_reason = "stop"
        elif event.finish_reason:
            self.finish_reason = event.finish_reason
            piece += self._text.flush()
        return piece

    def cancel(self) -> None:
        """Give up: the engine stops at its next step, and the text so far is all there is."""
        self._engine.cancel(self._id)

    @property
    def text(self) -> str:
        """The whole text; waits for the end."""
        for _ in self:
            pass
        return "".join(self._pieces)

    @property
    def message(self) -> Message:
        """The whole answer as an OpenAI message, tool calls parsed; waits for the end."""
        text = self.text
        message = parse_reply(self._tokenizer, self.ids)
        return message if message.get("tool_calls") else {"role": "assistant", "content": text}


class TextStream:
    """Turns ids into text as they come, and ends it before the first stop string.

    Text that could be the beginning of a stop string is held back until it is decided.

    >>> stream = TextStream(tokenizer, stop=("END",))
    >>> [stream.push(id) for id in tokenizer.encode("the E of END.")]
    ['the', '', ' E of', ' ', '']
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.stopped = False
        self._stop = tuple(s for s in stop if s)
        self._stream = tokenizer.stream()
        self._held = ""

    def push(self, id: int) -> str:
        return self._release(self._stream.push(id))

    def flush(self) -> str:
        """What was still held back, at the end of the answer."""
        piece = self._release(self._stream.flush())
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _release(self, piece: str) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _name(path: Path, model: str) -> str:
    return path.stem if path.suffix == ".gguf" else model.rstrip("/").rsplit("/", 1)[-1]
