"""Chat templates from model folders: Jinja in a sandbox, and text that cannot forge a turn.

A template returns one string in which control tokens are spelled out, so text that a user typed has
to be distinguished from what the template wrote. Before rendering, a sentinel character that occurs
nowhere in the conversation is put behind the first character of everything that looks like a
control token or the beginning of one. No control token can then start inside a user's text, however
the template trims, cuts and joins; once the result is split at control tokens, the sentinel is
taken out again. (A template that itself writes half a control token, as in ``'<' + name + '>'``,
must mean it.)

Conventions: Hugging Face's chat templates. chat.py validates messages and knows Mistral's own
layouts.
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.tokenizer.calls import TAGS
from opennemo.tokenizer.chat_layouts import LAYOUTS, Segment, segments
from opennemo.tokenizer.tokenizer import Tokenizer

MAX_RENDERED = 1 << 24  # characters; a million tokens of prose are about 5 million
# Conversations that show how a template lays out turns. Not every template has a place for system.
PROBES = tuple(
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        (("user", "xone"), ("assistant", "xtwo"), ("user", "xthree")),
        (("system", "xzero"), ("user", "xone"), ("assistant", "xtwo"), ("user", "xthree")),
        (("user", "xone"),),
    )
)
MARK = re.compile(r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]")  # the form of names of control tokens
RAISED_BY_TEMPLATES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A conversation in normal form together with the template that renders it.

    Raises:
        InvalidRequest: the model has no template.
        CheckpointError: the template is not valid Jinja, or does what the sandbox forbids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[dict],
        tools: Sequence[dict],
        settings: Mapping[str, Any] | None = None,
    ):
        source = tokenizer.chat_template
        if source is None:
            raise InvalidRequest(
                f"messages: chat layout {tokenizer.instruct_version} of this model is not supported"
                if tokenizer.instruct_version
                else "messages: this model has no chat template, it only completes text"
            )
        self._template, knows_tools, _ = _compile(source)
        lay_out = _with_blocks if takes_blocks(source) else _with_reasoning
        self._control = tokenizer.control
        self._control_tokens, look_alikes = _patterns(tuple(tokenizer.control))
        messages = [lay_out(message) if "parts" in message else message for message in messages]
        try:
            if not knows_tools:
                messages, tools = _spell_out_tools(messages, tools), []
            used = set(json.dumps([messages, tools, settings], ensure_ascii=False) + source)
            self._sentinel = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in used)
            guard = rf"\g<0>{self._sentinel}"
            self._messages = _map_strings(messages, lambda text: look_alikes.sub(guard, text))
            tools, settings = _map_strings(
                [tools, settings or {}], lambda text: look_alikes.sub(guard, text)
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"tools or arguments: cannot be written as JSON: {error}"
            ) from None
        names = tokenizer.control_names
        self._variables = {
            **(settings or {}),
            "tools": tools or None,
            "bos_token": names.get(tokenizer.bos_id, ""),
            "eos_token": names.get(tokenizer.eos_id, ""),
        }

    def prompt(self) -> list[Segment]:
        """Everything up to where the answer begins, or continues a `prefix` message."""
        *earlier, last = self._messages
        if not last.get("prefix"):
            return self._split(self._render(self._messages, add_generation_prompt=True))
        prompt = self._render(earlier, add_generation_prompt=True)
        thinks = last.get("reasoning_content") or not isinstance(last["content"], str)
        if thinks or prompt.rstrip().endswith("<think>"):
            raise InvalidRequest(
                "messages: an answer that thinks cannot be continued with this model's template"
            )
        return self._split(prompt + last["content"].rstrip(" "))

    def lesson(self) -> list[Segment]:
        """The whole conversation, trained where the assistant speaks, its end of turn included.

        The words of a turn are what rendering it adds to rendering the messages before it with
        the generation prompt, so the trained part starts exactly where a served prompt stops.

        Raises:
            InvalidRequest: the template changes a turn once others follow it.
        """
        whole = self._render(self._messages)
        segments, done = [], 0
        for i, message in enumerate(self._messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            through = self._render(self._messages[: i + 1])
            if i and i > (self._messages[0]["role"] == "system"):
                before = self._render(self._messages[:i], add_generation_prompt=True)
            else:  # there is nothing to answer, and templates may add a system text
                words = _first_words(message["content"])
                before = through[: max(0, through.rfind(words))]
            if not (through.startswith(before) and whole.startswith(through)):
                raise InvalidRequest(
                    "messages: this model's chat template changes an assistant message once "
                    "others follow it, so only the last one can be trained; set `weight: 0` on "
                    "the others"
                )
            end = len(before) + self._end_of_turn(through[len(before) :])
            segments += self._split(whole[done : len(before)])
            segments += self._split(whole[len(before) : end], trained=True)
            done = end
        return segments + self._split(whole[done:])

    def _end_of_turn(self, text: str) -> int:
        """Behind the last control token, unless words follow it: then behind those."""
        ends = [match.end() for match in self._control_tokens.finditer(text)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _split(self, text: str, *, trained: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        for i, piece in enumerate(self._control_tokens.split(text)):
            value = self._control[piece] if i % 2 else piece.replace(self._sentinel, "")
            if value != "":
                segments.append((value, trained))
        return segments

    def _render(self, messages: Sequence[dict], *, add_generation_prompt: bool = False) -> str:
        variables = self._variables | {"add_generation_prompt": add_generation_prompt}
        pieces, n_chars = [], 0
        try:
            for piece in self._template.generate(messages=messages, **variables):
                pieces.append(piece)
                n_chars += len(piece)
                if n_chars > MAX_RENDERED:
                    raise InvalidRequest(
                        f"messages: the chat template renders more than {MAX_RENDERED:,} characters"
                    )
        except SecurityError as error:
            raise CheckpointError(f"chat template: the sandbox forbids it: {error}") from None
        except RAISED_BY_TEMPLATES as error:
            raise InvalidRequest(f"messages: the model's chat template says: {error}") from None
        return "".join(pieces)


def names_written_by(source: str, names: Container[str], added: Sequence[str]) -> set[str]:
    """The tokens that a template writes as control, whatever the vocabulary marks them as.

    Args:
        names: of all tokens; one counts if it looks like a mark.
        added: names of tokens that text never encodes to; they count without looking like a mark.
    """
    try:
        template, _, written = _compile(source)
    except CheckpointError:  # `ChatTemplate` reports it
        return set()
    for messages in PROBES:
        variables = {"bos_token": "", "eos_token": "", "add_generation_prompt": True}
        with suppress(SecurityError, *RAISED_BY_TEMPLATES):
            written += "\0" + "".join(template.generate(messages=messages, **variables))
    marks = {name for name in MARK.findall(written) if name in names}
    # Blanks and signs that are tokens of their own are text, though a template writes them, too.
    words = (n for n in added if len(n) > 3 and not n.isalnum() and any(map(str.isalpha, n)))
    return marks | {name for name in words if name in written}


def is_layout(tokenizer: Tokenizer, version: str) -> bool:
    """Whether a model's own template lays out conversations as one of Mistral's layouts does."""
    layout, n_alike = LAYOUTS[version], 0
    if tokenizer.chat_template == layout.template_with(tokenizer.settings):
        return True

    def texts(pieces: Iterable[Segment]) -> list[int | str]:
        joined: list[int | str] = []
        words = ""
        for value, _ in pieces:
            if isinstance(value, str):
                words += value
            else:
                joined, words = [*joined, words, value], ""
        joined.append(words)
        # SentencePiece puts a space before every text, which templates have to write.
        space = " " if tokenizer.dummy_prefix else "\0"
        return [piece.replace(space, "") if isinstance(piece, str) else piece for piece in joined]

    for messages in PROBES:
        try:
            theirs = texts(ChatTemplate(tokenizer, messages, [], tokenizer.defaults).prompt())
        except InvalidRequest:
            continue
        except CheckpointError:
            return False
        if theirs != texts(segments(layout, tokenizer, messages, [], tokenizer.defaults)):
            return False
        n_alike += 1
    return n_alike > 0


def follow_own_template(tokenizer: Tokenizer) -> None:
    """Use the model's own template if it differs from the layout of its vocabulary."""
    version = tokenizer.instruct_version
    if tokenizer.chat_template is None or version is None:
        return
    if version not in LAYOUTS or not is_layout(tokenizer, version):
        tokenizer.instruct_version = None


def turn_end(tokenizer: Tokenizer) -> int | str | None:
    """What a template writes after the assistant's words: a control token, or else a mark.

    None if the template writes neither, or is not usable.
    """
    for messages in PROBES[:2]:
        try:
            values = iter([value for value, _ in ChatTemplate(tokenizer, messages, []).prompt()])
        except CheckpointError:
            return None
        except InvalidRequest:
            continue
        said = next((v for v in values if isinstance(v, str) and "xtwo" in v), "")
        behind = said.partition("xtwo")[2].lstrip()
        if mark := MARK.match(behind):
            return mark[0]
        following = next(values, None)
        return following if isinstance(following, int) and "xthree" not in behind else None
    return None


def takes_blocks(source: str) -> bool:
    """Whether a template looks for thinking in blocks of the content, as Mistral's own do.

    They write `[THINK]` around a block whose type is `thinking`, some in system messages, too.
    """
    try:
        texts = _compile(source)[2].split("\0")
    except CheckpointError:  # `ChatTemplate` reports it
        return False
    return "thinking" in texts and any("[THINK]" in text for text in texts)


def _with_blocks(message: dict) -> dict:
    """A message whose content is its thinking followed by its text."""
    kinds = (("thinking" if part.thinking else "text", part.text) for part in message["parts"])
    blocks = [{"type": kind, kind: text} for kind, text in kinds]
    return {key: value for key, value in message.items() if key != "parts"} | {"content": blocks}


def _with_reasoning(message: dict) -> dict:
    """A message whose thinking is where templates look for it, if they do."""
    thinking = "".join(part.text for part in message["parts"] if part.thinking)
    rest = {key: value for key, value in message.items() if key != "parts"}
    return rest | {"reasoning_content": thinking}


def _spell_out_tools(messages: Sequence[dict], tools: Sequence[dict]) -> list[dict]:
    """The conversation for a template that has no place for tools, in the tags that Hermes began.

    Definitions join the system text, calls become text, and results join the user's turn.
    """
    turns: list[dict] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        calls = "".join(TAGS.write(message.get("tool_calls", [])))
        content = "\n".join(filter(None, (content, calls)))
        if role == "user" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += f"\n{content}"
        else:
            kept = ("prefix", "weight", "reasoning_content")
            marks = {key: message[key] for key in kept if key in message}
            turns.append({"role": role, "content": content, **marks})
    if tools:
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": ""})
        definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        about_tools = (
            f"These functions can be called:\n<tools>\n{definitions}\n</tools>\n"
            "A call is written as its name and arguments in JSON:\n"
        ) + TAGS.call.replace("$name", '"..."').replace("$arguments", "{...}")
        turns[0]["content"] = f"{turns[0]['content']}\n\n{about_tools}".lstrip("\n")
    return turns


def _first_words(content: str | list[dict]) -> str:
    """The first part of a message in its rendering."""
    if isinstance(content, str):
        return content.strip()
    opening = "[THINK]" if content[0]["type"] == "thinking" else ""
    return opening + content[0][content[0]["type"]].strip()


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(str(k)): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


@lru_cache(maxsize=8)
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """One pattern to split at control tokens, and one for the first character of look-alikes.

    A look-alike is the name of a control token anywhere, or the beginning of one where a text
    ends (or would, trimmed), so that the next text cannot complete it.
    """
    names = tuple(name for name in names if len(name) > 1)
    first = [
        f"{re.escape(head)}(?=(?:{_any_of(tails)})|(?:{_any_of(tails, unfinished=True)})\\s*\\Z)"
        for head, tails in _by_first_character(names).items()
    ]
    return re.compile(f"({_any_of(names) or '(?!)'})"), re.compile("|".join(first) or "(?!)")


def _any_of(names: Sequence[str], *, unfinished: bool = False) -> str:
    """A regular expression for any of the names, the longest that fits; or for how one begins.

    It branches character by character, since NeMo has a thousand names and a list of a thousand
    alternatives would be tried one by one at every `<`.
    """
    branches = [
        re.escape(head) + _any_of(tails, unfinished=unfinished)
        for head, tails in _by_first_character(names).items()
    ]
    optional = unfinished or "" in names
    if len(branches) == 1 and not optional:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if optional else ''}" if branches else ""


def _by_first_character(names: Sequence[str]) -> dict[str, list[str]]:
    tails: dict[str, list[str]] = {}
    for name in filter(None, names):
        tails.setdefault(name[0], []).append(name[1:])
    return tails


@lru_cache(maxsize=8)
def _compile(source: str) -> tuple[jinja2.Template, bool, str]:
    """The template, whether it has a place for tools, and all texts that are in it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's own, which is bounded
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    try:
        parsed = environment.parse(source)
        knows_tools = "tools" in meta.find_undeclared_variables(parsed)
        texts = [data.data for data in parsed.find_all(nodes.TemplateData)]
        texts += [const.value for const in parsed.find_all(nodes.Const)]
        written = "\0".join(text for text in texts if isinstance(text, str))
        return environment.from_string(source), knows_tools, written
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template, line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise CheckpointError("chat template: nested too deeply") from None


class _Generation(Extension):
    """Lets templates mark the assistant's words; this file finds them itself, in any template."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
