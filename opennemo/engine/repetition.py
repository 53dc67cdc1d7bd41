"""Detects that an answer only repeats itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from opennemo.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Ends an answer whose last tokens are one pattern over and over, with vLLM's names.

    Raises:
        InvalidRequest: a number out of bounds, naming the field and what is allowed.
    """

    max_pattern_size: int  # tokens of the longest pattern that is looked for
    min_pattern_size: int = 1
    min_count: int = 2  # how often it must stand at the end, in a row

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

    def ends(self, tokens: Sequence[int], start: int) -> bool:
        """Whether the tokens from `start` on end in such a repetition."""
        longest = min(self.max_pattern_size, (len(tokens) - start) // self.min_count)
        last = tokens[-1] if tokens else None
        for size in range(self.min_pattern_size, longest + 1):
            if tokens[-1 - size] != last:  # nearly all sizes
                continue
            whole = tokens[-size * self.min_count :]
            if whole[size:] == whole[:-size]:
                return True
        return False
