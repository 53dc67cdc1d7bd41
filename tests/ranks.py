"""Run a function on several ranks: processes of this machine that talk over gloo.

They are forked from a server that has imported PyTorch once, which saves seconds for each.
"""

import io
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "opennemo.model.checkpoint",
]


def run_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(*args)` returns on each of n ranks; it must stand in a module under tests/."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # where the processes look for the function's module
    context = multiprocessing.get_context("forkserver")
    older = [name for name in ("tests.older_pytorch",) if name in sys.modules]
    context.set_forkserver_preload(older + PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(n):
            ours, theirs = context.Pipe()
            arguments = (theirs, f"file://{folder}/store", rank, n, function, args)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            answers = []
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(timeout), f"rank {rank} has not answered in {timeout} seconds"
                answers.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
            failed = [f"rank {i}:\n{said}" for i, (ok, said) in enumerate(answers) if not ok]
            assert not failed, "\n".join(failed)
        finally:
            for process in processes:
                process.join(0 if sys.exc_info()[0] else 30)
                process.kill()
    return [result for _, result in answers]


def _rank(pipe: Any, store: str, rank: int, n: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n)
        answer = True, function(*args)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  the test reports whatever it was
        answer = False, traceback.format_exc()
    # By value: a tensor that is sent as it is lies in memory of this process, which ends here.
    file = io.BytesIO()
    torch.save(answer, file)
    pipe.send_bytes(file.getvalue())
