"""Models that answer conversations: in this process, or behind OpenAI's chat completions API.

Both answer `ask(messages, ...)` with a message, from many threads at once, and both raise an
OpenNemoError with the reason where no answer came: that is counted, never taken for an empty one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.llm import LLM
from opennemo.model.hub import locate
from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.chat import Message, encode_chat, parse_reply

Tools = list[dict[str, Any]] | None
RETRIES = 2  # where they can help: no connection, a busy server, a timeout


@dataclass(frozen=True)
class LocalModel:
    """A model in this process."""

    llm: LLM

    @property
    def name(self) -> str:
        """In reports, and in the keys of remembered answers."""
        return self.llm.name

    def ask(
        self, messages: list[Message], tools: Tools = None, grammar: bool = True, **sampling: Any
    ) -> Message:
        """The answer; without `grammar` nothing holds it to the tools and their arguments."""
        if grammar:
            return self.llm.chat(messages, tools=tools, **sampling).message
        ids = encode_chat(self.llm.tokenizer, messages, tools)
        return parse_reply(self.llm.tokenizer, self.llm.complete(ids, **sampling).finish().ids)


@dataclass(frozen=True)
class RemoteModel:
    """A model at a server, by the address that ends in /v1."""

    url: str
    model: str
    key: str = "none"
    timeout: float = 600  # seconds
    tokenizer: Tokenizer | None = None  # the model's own; needed without a grammar

    @property
    def name(self) -> str:
        """As of a LocalModel."""
        return self.model

    @classmethod
    def connect(cls, url: str, model: str | None, key: str, tokenizer: Tokenizer | None = None):
        """The server's model of this name, or its first.

        Raises:
            OpenNemoError: there is no such server.
        """
        server = cls(url, model or "", key, tokenizer=tokenizer)
        try:
            return server if model else replace(server, model=server._call()["data"][0]["id"])
        except (LookupError, TypeError):
            raise OpenNemoError(f"{url}: names no model") from None

    def ask(
        self, messages: list[Message], tools: Tools = None, grammar: bool = True, **sampling: Any
    ) -> Message:
        """The answer, as of a LocalModel."""
        body: dict[str, Any] = {"model": self.model, **sampling}
        if grammar:
            body |= {"messages": messages} | ({"tools": tools} if tools else {})
            return self._choice("/chat/completions", body, "message")
        if self.tokenizer is None:
            raise InvalidRequest("without a grammar the server's tokenizer is needed: --tokenizer")
        body |= {"prompt": encode_chat(self.tokenizer, messages, tools), "return_token_ids": True}
        return parse_reply(self.tokenizer, self._choice("/completions", body, "token_ids"))

    def _choice(self, path: str, body: dict[str, Any], part: str) -> Any:
        try:
            return self._call(path, body)["choices"][0][part]
        except (LookupError, TypeError):
            raise OpenNemoError(f"{self.url}: the answer is not a completion") from None

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI

        settings: Any = {"timeout": self.timeout, "max_retries": RETRIES}
        return OpenAI(base_url=self.url, api_key=self.key, **settings)

    def _call(self, path: str = "/models", body: dict[str, Any] | None = None) -> Any:
        """The server's JSON: of a POST where there is a body, else of a GET."""
        import openai

        try:
            if body is None:
                return self._client.get(path, cast_to=object)
            return self._client.post(path, body=body, cast_to=object)
        except openai.APIStatusError as error:
            text = " ".join(error.response.text[:300].split())
            raise OpenNemoError(f"{self.url}: HTTP {error.status_code}: {text}") from None
        except openai.APITimeoutError:
            raise OpenNemoError(f"{self.url}: no answer in {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise OpenNemoError(f"{self.url}: {error.__cause__ or error}") from None
        except ValueError:
            raise OpenNemoError(f"{self.url}: the answer is not JSON") from None


ChatModel = LocalModel | RemoteModel


def is_server(model: str) -> bool:
    """Whether a model's name is the address of a server."""
    return model.startswith(("http://", "https://"))


@contextmanager
def open_model(
    model: str, name: str | None, key: str, tokenizer: str | None, load: Callable[[], LLM]
) -> Iterator[ChatModel]:
    """The model at an address, or the one that `load` makes, while the block runs."""
    if is_server(model):
        own = load_tokenizer(locate(tokenizer)) if tokenizer else None
        yield RemoteModel.connect(model, name, key, own)
    else:
        with load() as llm:
            yield LocalModel(llm)
