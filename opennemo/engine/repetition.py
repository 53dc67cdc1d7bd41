"""Detects that an answer only repeats itself."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from opennemo.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Ends an answer whose last tokens are one pattern over and over, with vLLM's names.

    Raises:
        InvalidRequest: a number out of bounds, naming the field and what is allowed.
    """

    max_pattern_size: int  # tokens of the longest pattern that is searched for
    min_pattern_size: int = 1
    min_count: int = 2  # how often it must occur at the end, in a row

    def __post_init__(self) -> None:
        bounds = {"max_pattern_size": (1, 2048), "min_count": (2, 2**20)}
        bounds["min_pattern_size"] = (1, self.max_pattern_size)
        for name, (low, high) in bounds.items():
            if not low <= (value := getattr(self, name)) <= high:
                wrong = f"repetition_detection.{name} is {value}, allowed is {low} to {high:,}"
                raise InvalidRequest(wrong)

    @classmethod
    def of(cls, given: Any) -> "Repetition | None":
        """Itself, or made of an object with these fields. Raises: InvalidRequest."""
        if given is None or isinstance(given, cls):
            return given
        names = [field.name for field in fields(cls)]
        whole = isinstance(given, Mapping) and all(type(value) is int for value in given.values())
        if not whole or names[0] not in given or {*given} - {*names}:
            raise InvalidRequest(
                f"repetition_detection is {given!r}, allowed is an object of whole numbers: "
                + ", ".join(names)
            )
        return cls(**given)


class Runs:
    """An answer's tokens as they come, and for each size of a pattern how long it has repeated.

    A token continues a pattern of `n` tokens if it equals the token `n` places before it. The
    answer ends in `min_count` whole patterns once `n * (min_count - 1)` tokens in a row did so.
    """

    def __init__(self, wanted: Repetition):
        self._sizes = np.arange(wanted.min_pattern_size, wanted.max_pattern_size + 1)
        self._wanted = self._sizes * (wanted.min_count - 1)
        self._runs = np.zeros_like(self._sizes)
        self._n = wanted.max_pattern_size  # places before the answer equal no token
        self._tokens = np.full(2 * self._n, -1, np.int64)

    def add(self, token: int) -> bool:
        """Take the next token. Whether the answer ends in such a repetition now."""
        if self._n == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.full_like(self._tokens, -1)])
        self._runs = (self._runs + 1) * (self._tokens[self._n - self._sizes] == token)
        self._tokens[self._n] = token
        self._n += 1
        return bool((self._runs >= self._wanted).any())
