"""Models that answer conversations: in this process, or behind OpenAI's chat completions API.

Both answer `ask(messages, ...)` with a message, from many threads at once, and both raise an
OpenNemoError with the reason if no answer comes: that is counted, never treated as an empty one.
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
RETRIES = 2  # retries, for no connection, a busy server, a timeout


@dataclass(frozen=True)
class LocalModel:
    """A model in this process."""

    llm: LLM

    @property
    def name(self) -> str:
        """As in reports, and in the keys of remembered answers."""
        return self.llm.name

    def ask(
        self, messages: list[Message], tools: Tools = None, grammar: bool = True, **sampling: Any
    ) -> Message:
        """The answer; without `grammar` nothing restricts it to the tools and their arguments."""
        if grammar:
            return self.llm.chat(messages, tools=tools, **sampling).message
        ids = encode_chat(self.llm.tokenizer, messages, tools)
        return parse_reply(self.llm.tokenizer, self.llm.complete(ids, **sampling).finish().ids)


@dataclass(frozen=True)
class RemoteModel:
    """A model at a server, by the address that ends in /v1; without a name, the server's first."""

    url: str
    name: str
    key: str = "none"
    timeout: float = 600  # seconds
    tokenizer: Tokenizer | None = None  # the model's own; needed without a grammar

    @classmethod
    def connect(cls, url: str, name: str | None, key: str, tokenizer: Tokenizer | None = None):
        """The server's model of this name, or its first; raises OpenNemoError if it has none."""
        server = cls(url, name or "", key, tokenizer=tokenizer)
        return server if name else replace(server, name=server._call("/models", "data", "id"))

    def ask(
        self, messages: list[Message], tools: Tools = None, grammar: bool = True, **sampling: Any
    ) -> Message:
        """The answer, as of a LocalModel."""
        body: dict[str, Any] = {"model": self.name, **sampling}
        if grammar:
            body |= {"messages": messages} | ({"tools": tools} if tools else {})
            return self._call("/chat/completions", "choices", "message", body)
        if self.tokenizer is None:
            raise InvalidRequest("without a grammar the server's tokenizer is needed: --tokenizer")
        body |= {"prompt": encode_chat(self.tokenizer, messages, tools), "return_token_ids": True}
        return parse_reply(self.tokenizer, self._call("/completions", "choices", "token_ids", body))

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI

        settings: Any = {"timeout": self.timeout, "max_retries": RETRIES}
        return OpenAI(base_url=self.url, api_key=self.key, **settings)

    def _call(self, path: str, group: str, part: str, body: dict[str, Any] | None = None) -> Any:
        """A part of the first item of a group in the answer to a POST, or a GET without a body."""
        import openai

        try:
            if body is None:
                content = self._client.get(path, cast_to=object)
            else:
                content = self._client.post(path, body=body, cast_to=object)
            return content[group][0][part]
        except openai.APIStatusError as error:
            text = " ".join(error.response.text[:300].split())
            why = f"HTTP {error.status_code}: {text}"
        except openai.APITimeoutError:
            why = f"no answer in {self.timeout:g} s"
        except openai.APIConnectionError as error:
            why = str(error.__cause__ or error)
        except ValueError:
            why = "the answer is not JSON"
        except (LookupError, TypeError):
            why = f"the answer has no {group}"
        raise OpenNemoError(f"{self.url}: {why}")


ChatModel = LocalModel | RemoteModel


def is_server(model: str) -> bool:
    """Whether a model's name is the address of a server."""
    return model.startswith(("http://", "https://"))


@contextmanager
def open_model(
    model: str, name: str | None, key: str, tokenizer: str | None, load: Callable[[], LLM]
) -> Iterator[ChatModel]:
    """The model at an address, or the one that `load` returns, while the block runs."""
    if is_server(model):
        own = load_tokenizer(locate(tokenizer)) if tokenizer else None
        yield RemoteModel.connect(model, name, key, own)
    else:
        with load() as llm:
            yield LocalModel(llm)
