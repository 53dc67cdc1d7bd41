"""Models that answer conversations: in this process, or behind OpenAI's chat completions API.

Both answer `ask(messages, ...)` with a message, from many threads at once, and both fail with an
OpenNemoError that says why: an answer that did not come is counted, never taken for an empty one.
"""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.llm import LLM
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.chat import Message, encode_chat, parse_reply

TRIES = 3


class ChatModel(Protocol):
    """A model that answers conversations."""

    @property
    def name(self) -> str:
        """In reports, and in the keys of remembered answers."""
        ...

    def ask(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None,
        grammar: bool = True, **sampling: Any,
    ) -> Message:  # fmt: skip
        """The answer; without `grammar` nothing holds it to the tools and their arguments."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A model in this process."""

    llm: LLM

    @property
    def name(self) -> str:
        return self.llm.name

    def ask(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None,
        grammar: bool = True, **sampling: Any,
    ) -> Message:  # fmt: skip
        if grammar:
            return self.llm.chat(messages, tools=tools, **sampling).message
        ids = encode_chat(self.llm.tokenizer, messages, tools)
        return parse_reply(self.llm.tokenizer, self.llm.complete(ids, **sampling).finish().ids)


@dataclass(frozen=True)
class RemoteModel:
    """A server, by the address that ends in /v1."""

    url: str
    model: str
    key: str = "none"
    timeout: float = 600  # seconds
    tokenizer: Tokenizer | None = None  # the model's own; needed without a grammar

    @property
    def name(self) -> str:
        return self.model

    def ask(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None,
        grammar: bool = True, **sampling: Any,
    ) -> Message:  # fmt: skip
        if grammar:
            given = {"tools": tools} if tools else {}
            choice = self._post("chat/completions", messages=messages, **given, **sampling)
            return choice["message"]
        if self.tokenizer is None:
            raise InvalidRequest("without a grammar the server's tokenizer is needed: --tokenizer")
        ids = encode_chat(self.tokenizer, messages, tools)
        choice = self._post("completions", prompt=ids, return_token_ids=True, **sampling)
        return parse_reply(self.tokenizer, choice["token_ids"])

    @classmethod
    def connect(cls, url: str, model: str | None, key: str, tokenizer: Tokenizer | None = None):
        """The server's model of this name, or its first.

        Raises:
            OpenNemoError: there is no such server.
        """
        found = cls(url, model or "", key, tokenizer=tokenizer)
        try:
            return found if model else replace(found, model=found._call("models")["data"][0]["id"])
        except (LookupError, TypeError):
            raise OpenNemoError(f"{url}: names no model") from None

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        """The first choice."""
        try:
            return self._call(path, json.dumps({"model": self.model, **body}).encode())["choices"][
                0
            ]
        except (LookupError, TypeError):
            raise OpenNemoError(f"{self.url}: the answer is not a completion") from None

    def _call(self, path: str, body: bytes | None = None) -> Any:
        """What the server answers. Tries again where that can help: no connection, busy."""
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}", body,
            {"content-type": "application/json", "authorization": f"Bearer {self.key}"},
        )  # fmt: skip
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code < 500 and error.code not in (408, 409, 429):
                    text = error.read(300).decode(errors="replace").strip()
                    raise OpenNemoError(f"{self.url}: {problem}: {text}") from None
            except OSError as error:
                reason = getattr(error, "reason", error)
                problem = str(reason)
                if isinstance(reason, TimeoutError):
                    problem = f"no answer in {self.timeout:g} s"
                    break  # another try would take as long
            except ValueError:
                raise OpenNemoError(f"{self.url}: the answer is not JSON") from None
            if attempt + 1 < TRIES:
                time.sleep(2**attempt)
        raise OpenNemoError(f"{self.url}: {problem}")
