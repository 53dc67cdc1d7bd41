"""The machines that a run is planned for: cards, and how many there are."""

import re
import time
from dataclasses import dataclass
from typing import Any

from opennemo.errors import InvalidRequest

GB, GIB = 1e9, 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    memory: float  # bytes, as the driver reports
    flops: float  # a second, dense, bf16 with sums in float32
    link: float = 0.0  # bytes a second to the other cards of a node, one way
    network: float = 0.0  # to other nodes, for each card
    overhead: float = 2 * GIB  # CUDA's context, NCCL's buffers, workspaces, fragments
    bytes: int = 2  # of a number while computing


# From NVIDIA's data sheets, where "with sparsity" is twice as much. Networks are those that such
# machines are sold with: 400 Gb/s for each card, A100s 200; cards without NVLink have PCIe 4.0.
CARDS = {
    "h100": Card(memory=79.6 * GIB, flops=989e12, link=450 * GB, network=50 * GB),
    "h200": Card(memory=140.4 * GIB, flops=989e12, link=450 * GB, network=50 * GB),
    "b200": Card(memory=179.0 * GIB, flops=2250e12, link=900 * GB, network=50 * GB),
    "a100-80": Card(memory=79.2 * GIB, flops=312e12, link=300 * GB, network=25 * GB),
    "l40s": Card(memory=45.0 * GIB, flops=362e12, link=32 * GB, network=25 * GB),
    "4090": Card(memory=24.0 * GIB, flops=165e12, link=32 * GB, network=12.5 * GB),
}
CPU: dict[str, Any] = {"overhead": 0.7 * GIB, "bytes": 4}


def read_bandwidth() -> float:
    """Bytes a second that this machine reads from memory, the best of some tries; half a second."""
    import torch

    block, seconds = torch.ones(1 << 26), []
    # Which of them is bound by memory alone depends on the processor.
    for read in 5 * (block.sum, lambda: torch.dot(block, block)):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return block.nbytes / min(seconds)


@dataclass(frozen=True)
class Machines:
    name: str
    card: Card
    gpus: int  # of a node
    nodes: int

    @property
    def n_ranks(self) -> int:
        return self.gpus * self.nodes


def this_machine(device: str, ranks: int = 1, nodes: int = 1) -> Machines:
    """What is free here for each of so many ranks on "cpu" or "cuda"; speeds are not measured.

    Other nodes and GPUs are as these are.
    """
    if device == "cpu":
        from opennemo.model.memory import available_memory

        memory, kind = available_memory()["cpu"] / ranks, CPU
    else:
        import torch

        # Only this process's own GPU: querying another takes some hundred MB of it.
        memory, kind = torch.cuda.mem_get_info()[0], {}
    card = Card(memory=memory, flops=1, link=1, network=1, **kind)
    return Machines(device, card, ranks, nodes)


def parse_machines(gpus: str, nodes: int) -> Machines:
    """`8xH100` and a number of nodes; `1xcpu` is this machine, measured.

    Raises:
        InvalidRequest: no such card.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", gpus.lower())
    n, name = (int(match[1] or 1), match[2]) if match else (0, gpus)
    if name == "cpu":
        import torch

        from opennemo.model.memory import machine_memory
        from opennemo.train.metrics import matmul_flops

        flops = matmul_flops(torch.device("cpu"), torch.float32)
        memory = float(machine_memory()["cpu"])
        return Machines(name, Card(memory=memory, flops=flops, **CPU), 1, 1)
    if name not in CARDS or n < 1:
        cards = ", ".join(name.upper() for name in CARDS)
        raise InvalidRequest(f"--gpus is {gpus}: write a number and a card, 8xH100; known: {cards}")
    return Machines(name.upper(), CARDS[name], n, nodes)
