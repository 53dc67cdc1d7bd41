"""A thread that runs steps, and small calls between two of them.

The engine itself is free of threads: tests and batch jobs call `step`. `start` puts one thread
around it for servers and `LLM`. `call` may be used from any thread at any time.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from opennemo.errors import OpenNemoError

log = logging.getLogger(__name__)


class Loop(ABC):
    """Runs steps until there is nothing to do, and again when there is.

    Attributes:
        failed: the thread ended without `stop`.
    """

    def __init__(self) -> None:
        self.failed = self._stopping = False
        self._calls: deque[Callable[[], None]] = deque()  # calls to run before the next step
        self._step_began: float | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def _step(self) -> bool:
        """Move all requests forward; False when nothing is left to do."""

    @abstractmethod
    def _give_up(self, error: str | None = None) -> None:
        """End all work, because of an error or of `stop`."""

    def call(self, function: Callable[[], None]) -> None:
        """Run a short call between two steps, on the thread of the steps. Thread-safe."""
        with self._wake:
            if self._stopping:
                raise OpenNemoError("the engine has stopped")
            self._calls.append(function)
            self._wake.notify()

    def step(self) -> bool:
        """Run the calls that wait and one step; False when there is nothing to do."""
        self._step_began = time.monotonic()
        try:
            self._run_calls()
            return self._step() or bool(self._calls)
        finally:
            self._step_began = None

    @property
    def seconds_in_step(self) -> float:
        """How long the step in progress has taken; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def start(self) -> None:
        """Run steps on a thread of their own until `stop`."""
        assert self._thread is None, "the engine is running already"
        self._stopping = self.failed = False
        self._thread = threading.Thread(target=self._run, name="opennemo-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress; unfinished requests are cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._run_calls()
        self._give_up()

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except BaseException:  # even an exit in a library must not leave a request waiting
            log.critical("the engine's thread has ended", exc_info=True)
            with self._wake:
                self.failed = self._stopping = True  # from now on `call` refuses
            self._run_calls()
            self._give_up("the engine has ended; its log has the reason")

    def _step_until_stopped(self) -> None:
        while not self._stopping:
            try:
                busy = self.step()
            except Exception:  # a defect of ours: no request may be left waiting for an answer
                log.exception("a step failed")
                self._give_up("the engine failed; its log has the reason")
                busy = True
            if not busy:
                with self._wake:
                    self._wake.wait_for(lambda: self._calls or self._stopping)

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):  # calls added meanwhile wait for the next step
            self._calls.popleft()()
