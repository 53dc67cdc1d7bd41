"""The server's log on standard error: one JSON object a line, or in a terminal a line of text.

`configure_logs` changes the whole process, so only programs call it: commands, and workers that Ray
starts for one purpose.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from opennemo.serve.error_bodies import dumps


class LogStream:
    """Standard error; a full disk ends no request, and is reported when it has room again."""

    def __init__(self) -> None:
        self._file, self._failure = sys.stderr, None

    def write(self, text: str) -> None:
        try:
            if self._failure:
                lost = {"event": "lines of log are missing", "why": str(self._failure)}
                self._file.write(f"{dumps(lost)}\n")
            self._file.write(text)
            self._file.flush()
            self._failure = None
        except OSError as error:
            self._failure = error

    def flush(self) -> None:
        """Nothing is held back."""


def configure_logs(level: str, *, text: bool = False) -> None:
    """A line for each event, on standard error; strings are escaped, so nothing can forge one."""
    number, stream = logging.getLevelName(level.upper()), LogStream()
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(message)s")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
            structlog.processors.format_exc_info,
            _line if text else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(stream),  # pyright: ignore[reportArgumentType]
    )


def _line(_: Any, __: str, fields: MutableMapping[str, Any]) -> str:
    """An event as a person reads it."""
    time, level, event = (fields.pop(name) for name in ("timestamp", "level", "event"))
    return f"{time} {level}: {event}" + "".join(f"  {name}={v!r}" for name, v in fields.items())
