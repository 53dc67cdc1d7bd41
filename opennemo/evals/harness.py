"""Our engine as a model of lm-evaluation-harness, whose tasks define what published numbers mean.

The harness hands over all requests of all tasks at once, and `LLM.score` computes what
they share once. Everything that decides a score (cutting a text into context and continuation,
stop strings, the default of 256 tokens) is done as the harness's own `hf` model does it, so that
the choices are the same; tests compare the two.

Importing this registers `opennemo`; `python -m opennemo.evals` is the harness's command line.
"""

import re
from functools import lru_cache
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from opennemo.errors import ContextTooLong, InvalidRequest, OpenNemoError
from opennemo.evals.runs import Note, Run, digest, remembered, score_all
from opennemo.llm import LLM
from opennemo.tokenizer.chat import encode_chat

MAX_ANSWER = 256  # tokens, where a task does not say; the harness's default
IN_FLIGHT = 512  # answers requested at once


class OpenNemoLM(TemplateLM):
    """A loaded model, and perhaps a run that remembers its answers.

    Attributes:
        cut: contexts of requests that were cut on the left because the model's is shorter.
    """

    def __init__(
        self, pretrained: str | LLM, dtype: str | None = None, device: str | None = None,
        format: str | None = None, run: Run | None = None, batch_size: Any = None,
        max_batch_size: Any = None,
    ):  # fmt: skip
        """A model by name, as `LLM.load` takes it, or loaded; the engine makes its own batches."""
        super().__init__()
        if isinstance(pretrained, str):
            if not torch.cuda.is_available():  # "cuda" is the harness's default
                device = None
            pretrained = LLM.load(pretrained, device=device, dtype=dtype, format=format or "auto")
        self.llm, self.run = pretrained, run
        self.llm.tokenizer.expect_corpus()
        self.cut: set[str] = set()
        self.max_length = self.llm.engine.max_context
        self._laid_out = False  # whether requests are texts that `apply_chat_template` made
        self._encode = lru_cache(4096)(self._encode_once)  # contexts come once for each choice

    @property
    def eot_token_id(self) -> int:
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.llm.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, after BOS where the model uses one."""
        return list(self._encode(string, add_special_tokens is not False))

    def _encode_once(self, text: str, with_bos: bool) -> list[int]:
        tokenizer = self.llm.tokenizer
        ids: list[int] = []
        if self._laid_out:  # only then are names of control tokens more than text
            names = "|".join(map(re.escape, sorted(tokenizer.control, key=len, reverse=True)))
            for piece in re.split(f"({names})", text):
                id = tokenizer.control.get(piece)
                ids += [id] if id is not None else tokenizer.encode(piece) if piece else []
        else:
            ids = tokenizer.encode(text)
        begins = with_bos and tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]
        return [tokenizer.bos_id] * begins + ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that `tok_encode` turns into the ids of the model's layout."""
        messages: list[dict[str, Any]] = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["prefix"] = True
        ids, tokenizer = encode_chat(self.llm.tokenizer, messages), self.llm.tokenizer
        text, self._laid_out = tokenizer.decode(ids, show_control=True), True
        self._encode.cache_clear()
        if self.tok_encode(text) != ids:
            raise InvalidRequest(f"{self.llm.name}: its chat layout cannot be written as a text")
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.llm.tokenizer.chat_template or self.llm.tokenizer.instruct_version or ""

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ContextTooLong(len(continuation) + 1, self.max_length + 1)
            if len(context) > room and texts:
                self.cut.add(texts[0])
            pairs.append((context[-room:], continuation))
        return score_all(self.llm, pairs, self.run)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context."""
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            counts.append(len(windows))
        scores = [logprob for logprob, _ in self._loglikelihood_tokens(windows)]
        return [sum(scores[start:end]) for start, end in zip([0, *counts], counts, strict=False)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        asked = []
        for request in requests:
            text, given = request.arguments
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_ANSWER))
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ContextTooLong(settings["max_gen_toks"] + 1, self.max_length)
            ids = self.tok_encode(text)
            if len(ids) > room:
                self.cut.add(text)
            asked.append((ids[-room:], settings))

        def answer_rest(todo: list[int], note: Note) -> None:
            todo.sort(key=lambda i: asked[i][0])  # neighbours share the beginning of their prompts
            step = IN_FLIGHT * (self.run.n_engines if self.run else 1)
            for start in range(0, len(todo), step):
                replies = {i: self._answer(*asked[i]) for i in todo[start : start + step]}
                for i, reply in replies.items():
                    note(i, reply.text)

        keys = [digest("answer", question) for question in asked]
        return remembered("Answering", keys, self.run, answer_rest)

    def _answer(self, ids: list[int], settings: dict[str, Any]) -> Any:
        settings = dict(settings)
        stop = handle_stop_sequences(settings.pop("until"), eos=None)
        sampling = {"max_tokens": settings.pop("max_gen_toks"), "temperature": 0.0}
        if settings.pop("do_sample"):
            sampling |= {"temperature": settings.get("temperature", 1.0), "seed": 0}
        settings.pop("temperature", None)
        sampling |= {name: settings.pop(name) for name in ("top_p", "top_k") if name in settings}
        if settings:
            raise OpenNemoError(f"a task asks for {', '.join(settings)}, which is not supported")
        return self.llm.complete(ids, stop=tuple(stop), **sampling)


register_model("opennemo")(OpenNemoLM)
