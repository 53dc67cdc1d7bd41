"""Every error that a user can cause, as one small tree.

    OpenNemoError
    ├── InvalidRequest          the request is wrong: what, where, and what is allowed (HTTP 400)
    │   └── ContextTooLong      more tokens than the model has positions; names both numbers
    ├── Unavailable             the engine or replica is lost; ask again (HTTP 503)
    │   └── Overloaded          too much is waiting already; try again later (HTTP 503)
    └── CheckpointError         a model folder, or a file of one, cannot be used

The command line prints one as a single line and exits with code 2; the server answers with its
status. Anything else that escapes is a defect of ours and keeps its traceback.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


class OpenNemoError(Exception):
    """The root of the tree: catch this to catch everything a user can cause."""


class InvalidRequest(OpenNemoError):
    """A prompt, conversation or setting that cannot be served as it is."""


class ContextTooLong(InvalidRequest):
    """A prompt, with the tokens it asks for, does not fit the model's context."""

    def __init__(self, n_tokens: int, max_tokens: int, *, more: bool = False):
        """With `more`, `n_tokens` were counted when counting stopped."""
        super().__init__(
            f"the prompt needs {'more than ' * more}{n_tokens:,} tokens of context, "
            f"but this model has room for {max_tokens:,}"
        )
        self.n_tokens, self.max_tokens = n_tokens, max_tokens


class Unavailable(OpenNemoError):
    """What would answer is unavailable for now; the request itself is valid."""


class Overloaded(Unavailable):
    """The queue of requests is full."""


class CheckpointError(OpenNemoError):
    """A model folder is missing, incomplete, damaged, or of a kind that is not supported."""


def check_names(where: str, names: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse the first name that is not allowed, with the one that may have been meant.

    Raises:
        InvalidRequest: there is one.
    """
    for name in names:
        if name not in allowed:
            meant = _nearest(name, list(allowed)) or f"; allowed are {', '.join(allowed)}"
            raise InvalidRequest(f"{where}: there is no {name}{meant}")


def named_problems(problems: Sequence[Mapping[str, Any]], known: Iterable[str] = ()) -> str:
    """The first five problems that pydantic has with some settings, in one line, by key.

    A key that is not among `known` ones, written with dots, is answered with the nearest of them.
    """
    lines, known = [], list(known)
    for problem in problems[:5]:
        key, value = ".".join(map(str, problem["loc"])), problem["input"]
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"{key} is not a setting{_nearest(key, known)}")
        elif problem["type"] in ("missing", "missing_keyword_only_argument"):
            lines.append(f"{key} is missing")
        else:
            own = problem["type"] == "value_error"  # of a validator of ours
            text = str(problem["ctx"]["error"]) if own else problem["msg"]
            whole = own and not isinstance(value, str)  # it concerns several settings at once
            lines.append(text if whole else f"{key} is {value!r}: {text}")
    return "; ".join(lines)


def _nearest(key: str, known: list[str]) -> str:
    """The known key that this one is a slip of: of its own table, or of another."""
    by_name = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = get_close_matches(key, known, 1, 0.75)
    near = near or [by_name[n] for n in get_close_matches(key.rpartition(".")[2], by_name, 1, 0.75)]
    return f"; did you mean {near[0]}?" if near else ""
