"""The suites by name: the module of each, its own options, what it gets and returns.

A new suite is an entry of `SUITES` and a module with a function `measure(model, request, run)`,
which returns an `Outcome`, and perhaps `prepare(request)`, which raises InvalidRequest where
something that the suite needs is missing, before a model is loaded. The command line makes its
options from the fields here, so this module imports nothing slow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from opennemo.errors import InvalidRequest
from opennemo.evals.rows import ResultRow


@dataclass(frozen=True)
class Option:
    """What the command line needs to know about a field of a suite's options."""

    help: str
    at_least: int | None = None
    weights: bool = False  # it names a model, whose files decide what the run is called
    env: str | None = None  # a secret, in this variable of the environment by default


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of suites that need none."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Options of the suite `chat`."""

    judge: Annotated[str | None, Option("a model, or a server's URL.", weights=True)] = None
    judge_name: Annotated[str | None, Option("its name at that server.")] = None
    judge_key: Annotated[str, Option("the variable with its key.", env="JUDGE_API_KEY")] = "none"
    repeats: Annotated[int, Option("judgements of each answer.", at_least=1)] = 1
    against: Annotated[Path | None, Option("a run of another model, judged in both orders.")] = None
    agreement: Annotated[Path | None, Option("marked answers, to compare the judge with.")] = None
    references: Annotated[str, Option("gpt-4 or gpt-4-0125-preview.")] = "gpt-4"


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Options of the suite `tools`."""

    grammar: Annotated[bool, Option("restrict answers to valid calls.")] = True
    required: Annotated[bool, Option("every answer must be a call.")] = False


@dataclass(frozen=True, kw_only=True)
class Haystacks:
    """Options of the suite `long`."""

    lengths: Annotated[tuple[int, ...], Option("tokens, commas between.")] = (
        4096, 8192, 16384, 32768, 65536, 131072,
    )  # fmt: skip
    depths: Annotated[tuple[float, ...], Option("0 to 1, commas between.")] = (
        0.0, 0.25, 0.5, 0.75, 1.0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Options of the suite `code`."""

    run_code: Annotated[bool, Option("run what the model wrote, on this machine.")] = False


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Options of the suite `ppl`."""

    texts: Annotated[tuple[Path, ...], Option(".jsonl, .txt; repeatable.")] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A suite of questions to a model."""

    model: str  # a folder, a .gguf, an id of the hub, or the address of a server
    suite: str
    options: Any = None  # the suite's own; None: its defaults
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    data: Path | None = None
    output: Path | None = None
    device: str | None = None
    chat: bool = False  # prompts are laid out as conversations, as instruct models are used
    model_name: str | None = None  # at a server
    key: str = "none"
    tokenizer: str | None = None  # of a server's model
    kv_format: str | None = None
    kv_scale: float | None = None

    def chosen(self, names: Sequence[str], default: Sequence[str] | None = None) -> Sequence[str]:
        """The requested tasks, each one of the names; else the default ones, else all."""
        if unknown := [task for task in self.tasks if task not in names]:
            raise InvalidRequest(f"--tasks {', '.join(unknown)}: there are {', '.join(names)}")
        return self.tasks or default or names


@dataclass(frozen=True)
class Outcome:
    """What a suite measured."""

    rows: list[ResultRow]
    items: list[dict[str, Any]] = field(default_factory=list)  # the answers one by one
    notes: list[str] = field(default_factory=list)  # notes that belong beside the rows


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite; `servers`: whether it accepts a model at a server, as a ChatModel."""

    module: str
    options: type = NoOptions
    servers: bool = False
    heat_map: bool = False  # drawn by depth and length, instead of bars

    def prepare(self, request: Request) -> None:
        """Raises InvalidRequest if what the suite needs is missing."""
        check = getattr(self._module(), "prepare", None)
        if check:
            check(request)

    def measure(self, model: Any, request: Request, run: Any) -> Outcome:
        """Call the module's function; model is an LLM, or a ChatModel if `servers`."""
        return self._module().measure(model, request, run)

    def _module(self) -> Any:
        return import_module(f"opennemo.evals.{self.module}")


SUITES = {
    "table1": Suite(module="tables"),
    "multilingual": Suite(module="tables"),
    "instructions": Suite(module="tables"),
    "reasoning": Suite(module="tables"),
    "code": Suite(module="coding", options=Programs),
    "chat": Suite(module="judging", options=Judges, servers=True),
    "tools": Suite(module="functions", options=Calls, servers=True),
    "long": Suite(module="long_context", options=Haystacks, heat_map=True),
    "ppl": Suite(module="perplexity", options=TextFiles),
}


def find_suite(name: str) -> Suite:
    """The suite of a name; raises InvalidRequest if there is none."""
    if name not in SUITES:
        raise InvalidRequest(f"--suite {name}: there are {', '.join(SUITES)}")
    return SUITES[name]


def options_of(suite: Suite) -> Iterator[tuple[str, Any, Any, Option]]:
    """Name, type, default and description of each of a suite's own options."""
    hints = get_type_hints(suite.options, include_extras=True)
    for each in fields(suite.options):
        kind, option = get_args(hints[each.name])
        yield each.name, kind, each.default, option
