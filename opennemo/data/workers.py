"""Work spread over processes of this machine, its results in order.

Workers are spawned, not forked, since the caller may have threads: a script that uses them does so
under `if __name__ == "__main__"`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """A function's results for each item, in order; one worker means this process itself.

    Items are taken as they are needed, so that they do not pile up.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_follow_parent) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _follow_parent() -> None:
    """Let a worker, a process of its own, end with the process that started it.

    This changes signal handlers and the environment of the worker alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
