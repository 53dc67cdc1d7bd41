"""What a recipe will need before it is run: memory of a rank, tokens a second, days.

Arithmetic over the shape of a model, written out so that anyone can check it: each line says what
it counts and multiplies. Nothing is loaded. Activations are counted as PyTorch keeps them for the
backward pass, tensor by tensor; tests compare that with what it keeps, and a model of NeMo's width
with the memory that its step takes. Assumptions are printed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from opennemo.engine.sizes import SAMPLE_CONTEXT, SAMPLES
from opennemo.errors import InvalidRequest
from opennemo.model.formats import by_name, names
from opennemo.model.transformer import PRESETS, ModelConfig
from opennemo.planning.machines import GB, GIB, Machines
from opennemo.train.config import Recipe
from opennemo.train.objectives import CHUNK

# While computing, without and with compilation: what torchtitan reached with Llama 3.1 8B on 8 and
# on 128 H100s (docs/performance.md there).
SHARE_OF_PEAK = {False: 0.33, True: 0.39}
SEQUENCES = 64  # that are drawn side by side; see rollouts.py
PLAIN = "bf16"  # weights that are not stored in codes
BLOCKS = "blocks"  # of a GGUF file, of whatever types


class Base(NamedTuple):
    """The model that a recipe begins with."""

    config: ModelConfig
    stored: str  # a number format, PLAIN or BLOCKS
    # Of a model whose blocks stay: the bytes of what stays so, and how many weights those are.
    in_blocks: tuple[int, int] = (0, 0)


@dataclass
class Plan:
    """The arithmetic: lines of what, how, and bytes; of speed; and the problems."""

    memory: list[tuple[str, str, float]] = field(default_factory=list)
    speed: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tokens_per_second: float = 0.0
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(size for _, _, size in self.memory)


def resolve_shape(recipe: Recipe, shape: str | None, stored: str | None) -> Base:
    """The shape of a recipe's model and how its weights are stored, `PLAIN` if not in codes.

    A model that does not exist yet has the shape that is named.

    Raises:
        InvalidRequest: it does not exist, and no shape is named; or there is no such shape.
    """
    config = recipe.model.new_shape
    if shape is not None:
        if shape not in PRESETS:
            raise InvalidRequest(f"--shape is {shape}, allowed are {', '.join(PRESETS)}")
        config = PRESETS[shape]
    if config is None:
        from opennemo.model.checkpoint import open_checkpoint
        from opennemo.model.hub import BUILT_IN, locate
        from opennemo.train.setup import form_of_base

        path = recipe.model.path or ""
        if path not in BUILT_IN and not Path(path).expanduser().exists():
            # The hub's files are not fetched for arithmetic.
            raise InvalidRequest(f"model.path {path} is not there: name its shape with --shape")
        checkpoint = open_checkpoint(locate(path))
        config, stored = checkpoint.config, stored or checkpoint.format
        lora = recipe.lora if recipe.qat is None and stored is None else None
        if checkpoint.in_blocks and lora is not None and lora.dtype == "auto":
            form, sizes = form_of_base(recipe, checkpoint, None), checkpoint.shapes
            rows = {name: checkpoint.runs_in(name, form) for name in sizes}
            kept = {name: sizes[name] for name, row in rows.items() if row.in_codes}
            n_bytes = sum(rows[name].nbytes(*shape) for name, shape in kept.items())
            return Base(config, BLOCKS, (n_bytes, sum(map(math.prod, kept.values()))))
    stored = stored or PLAIN
    if stored not in (allowed := (PLAIN, *names("store"))):
        raise InvalidRequest(f"--stored is {stored}, allowed are {', '.join(allowed)}")
    if stored != PLAIN and recipe.lora is None:
        raise InvalidRequest(f"weights stored as {stored} cannot learn: add a [lora] table")
    return Base(config, stored)


def plan(
    recipe: Recipe, config: ModelConfig, machines: Machines, *, stored: str = PLAIN,
    in_blocks: tuple[int, int] = (0, 0), share_of_peak: float | None = None,
) -> Plan:  # fmt: skip
    """What a run of the recipe takes on these machines.

    Args:
        stored, in_blocks: of the frozen weights, as `Base` has them.
        share_of_peak: of the card's operations a second, while computing; see above.
    """
    made, work = Plan(), Work(recipe, config, machines, in_blocks)
    made.problems += work.problems()
    if work.n_data < 1:
        return made
    _count_memory(made, work, stored)
    room = machines.card.memory
    if made.total > room:
        made.problems.append(
            f"a rank needs {made.total / GIB:.1f} GiB and has {room / GIB:.1f}"
            + _remedy(work, stored)
        )
    _count_time(made, work, share_of_peak or SHARE_OF_PEAK[recipe.parallel.compile])
    return made


class Work:
    """How the ranks divide a recipe's work, and the sizes of its parts."""

    def __init__(
        self, recipe: Recipe, config: ModelConfig, machines: Machines,
        in_blocks: tuple[int, int] = (0, 0),
    ):  # fmt: skip
        self.recipe, self.config, self.machines = recipe, config, machines
        self.in_blocks = in_blocks
        parallel, data = recipe.parallel, recipe.data
        self.tp, self.cp = parallel.tensor_parallel, parallel.context_parallel
        self.replicate = parallel.data_parallel_replicate
        others = self.replicate * self.tp * self.cp
        shard = parallel.data_parallel_shard
        self.shard = machines.n_ranks // others if shard == -1 else shard
        self.n_data = self.replicate * self.shard  # ranks that see different windows
        self.fsdp = self.shard * self.cp  # ranks over which weights are divided, in addition to tp
        self.rows = max(1, data.rows // max(1, self.n_data))  # of a step, on a rank
        self.micro_rows = min(data.micro_rows, self.rows)
        self.passes = -(-self.rows // self.micro_rows)
        # Of a row; where answers are drawn, a prompt and all answers to it at their longest.
        drawing, self.width = recipe.drawing, data.window
        if recipe.draws:
            self.width += (drawing.answers - 1) * drawing.max_tokens
        self.tokens = self.micro_rows * self.width // self.cp  # of a pass, on a rank
        c = config
        self.q, self.kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.matrices = {
            "wq": (self.q, c.dim), "wk": (self.kv, c.dim), "wv": (self.kv, c.dim),
            "wo": (c.dim, self.q), "w1": (c.hidden_dim, c.dim), "w2": (c.dim, c.hidden_dim),
            "w3": (c.hidden_dim, c.dim),
        }  # fmt: skip
        self.block = sum(o * i for o, i in self.matrices.values())
        self.table = c.vocab_size * c.dim  # an embedding, or a head
        self.n_tables = 1 if c.tied_embeddings else 2
        self.norms = (2 * c.n_layers + 1) * c.dim
        self.n_weights = c.n_layers * self.block + self.n_tables * self.table + self.norms
        lora = recipe.lora
        adapted = [self.matrices[name] for name in lora.layers] if lora else []
        self.rank = lora.rank if lora else 0
        self.n_adapters = c.n_layers * self.rank * sum(o + i for o, i in adapted)

    def optimizer_states(self) -> float:
        """Bytes, over all ranks."""
        learning = self.n_adapters if self.recipe.lora else self.n_weights
        if self.recipe.optim.name == "adamw":
            return 8 * learning
        # Muon has one number for each of the blocks' matrices, and AdamW two for the rest.
        return 8 * learning - 4 * (
            learning if self.recipe.lora else self.config.n_layers * self.block
        )

    def problems(self) -> Iterator[str]:
        c, data = self.config, self.recipe.data
        n = self.replicate * self.shard * self.cp * self.tp
        if n != self.machines.n_ranks:
            yield (
                f"replicate {self.replicate} x shard {self.shard} x context {self.cp} x tensor "
                f"{self.tp} is {n:,} ranks, and there are {self.machines.n_ranks:,}"
            )
        elif data.rows % self.n_data:
            near = max(1, round(data.rows / self.n_data)) * self.n_data
            yield (
                f"data.rows {data.rows:,} does not divide by the {self.n_data:,} ranks that see "
                f"different rows; {near:,} would"
            )
        for name in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size"):
            if getattr(c, name) % self.tp:
                yield f"tensor_parallel {self.tp} does not divide {name} {getattr(c, name):,}"
        if data.window % (2 * self.cp * self.tp if self.cp > 1 else self.tp):
            yield f"data.window {data.window:,} does not divide by the ranks that share it"
        if self.tp > self.machines.gpus:
            yield f"tensor_parallel {self.tp} reaches over nodes of {self.machines.gpus}"


def _count_memory(made: Plan, work: Work, stored: str) -> None:
    recipe, config, machines = work.recipe, work.config, work.machines
    many, tp, number = machines.n_ranks > 1, work.tp, machines.card.bytes
    ranks = work.fsdp * tp
    over = f" / {ranks:,} ranks" if ranks > 1 else ""
    add = lambda what, how, size: made.memory.append((what, how, size))  # noqa: E731
    learning = work.n_adapters if recipe.lora else work.n_weights
    kind = "adapters" if recipe.lora else "weights"
    add(kind, f"{learning:,} x 4 B (float32){over}", 4 * learning / ranks)
    add("gradients", f"{learning:,} x 4 B{over}", 4 * learning / ranks)
    how = f"{learning:,} x 8 B (AdamW's two moments){over}"
    if recipe.optim.name == "muon":
        matrices = learning if recipe.lora else config.n_layers * work.block
        how = f"{matrices:,} x 4 B (Muon) + {learning - matrices:,} x 8 B (AdamW){over}"
    add("optimizer", how, work.optimizer_states() / ranks)
    if recipe.lora:
        _count_base(add, work, stored, over)
    if many:
        two = 2 * work.block / tp * number
        add("gathered blocks", f"2 x {work.block:,} x {number} B{_by(tp)}", two)
        add("gathered head", f"{work.table:,} x {number} B", work.table * number)
        if not recipe.lora:
            size = work.block / tp * (number + 4) + work.table * number
            how = f"{work.block:,} x {number + 4} B{_by(tp)} + {work.table:,} x {number} B"
            add("whole gradients", how, size)
    elif number < 4 and not recipe.lora:
        add("copies in bf16", f"{work.n_weights:,} x 2 B", 2 * work.n_weights)
    before = made.total
    _count_activations(add, work)
    if recipe.evaluation.prompts is not None:  # answered when a step's activations are gone
        of_token = 2 * config.n_layers * work.kv * (number if recipe.lora else 4)
        n_tokens = SAMPLES * min(config.max_position_embeddings, SAMPLE_CONTEXT)
        if (more := n_tokens * of_token - (room := made.total - before)) > 0:
            how = f"{n_tokens:,} tokens x {of_token:,} B, less {room / GIB:.2f} GiB of a step's"
            add("keys, values of samples", how, more)
    first = recipe.objective == "rl" and recipe.rl.kl and not recipe.lora
    if recipe.objective == "distil" or first:
        add("teacher", f"{work.n_weights:,} x {number} B", work.n_weights * number)
    if recipe.draws:
        _count_drawing(add, work, stored)
    overhead = machines.card.overhead
    add("everything else", "PyTorch, its libraries' buffers, fragments (assumed)", overhead)


def _count_drawing(add, work: Work, stored: str) -> None:
    """The engine that draws answers: the model as it is served, and its cache."""
    recipe, number = work.recipe, work.machines.card.bytes
    if stored == PLAIN:
        # Codes of a model that learns under rounding are fewer bytes; they are made one by one.
        size = work.n_weights * number
        add("weights to draw with", f"{work.n_weights:,} x {number} B", size)
    n = min(SEQUENCES, work.rows * recipe.drawing.answers)
    of_token = 2 * work.config.n_layers * work.kv * number
    how = f"{n} answers x {recipe.data.window:,} tokens x {of_token:,} B"
    add("their keys and values", how, n * recipe.data.window * of_token)


def _count_base(add, work: Work, stored: str, over: str) -> None:
    """The frozen model below adapters. Codes are not divided over ranks."""
    lora = work.recipe.lora
    number = {"float32": 4, "bfloat16": 2}.get(lora.dtype if lora else "", work.machines.card.bytes)
    rest = work.n_tables * work.table + work.norms
    matrices = work.config.n_layers * work.block
    ranks = work.fsdp * work.tp
    if stored == PLAIN:
        how = f"{matrices + rest:,} x {number} B{over}"
        add("frozen weights", how, (matrices + rest) * number / ranks)
        return
    largest = max(o * i for o, i in work.matrices.values())
    if stored == BLOCKS:
        n_bytes, n_weights = work.in_blocks
        rest += matrices - n_weights
        add("frozen blocks", f"{n_weights:,} weights in the file's own types", n_bytes)
        add("frozen tables", f"{rest:,} x {number} B{over}", rest * number / ranks)
        # Decoded to float32 first, and computed with in the type of the activations.
        size = 4 + number % 4
        add("one matrix unpacked", f"{largest:,} x {size} B", largest * size)
        return
    weights = by_name(stored).weights
    size = weights.bits / 8
    n_scales = sum(o * weights.scales_in_row(i) for o, i in work.matrices.values())
    of_rows = 4 * work.config.n_layers * n_scales
    how = f"{matrices:,} x {size:g} B ({stored}) + {of_rows / GIB:.2f} GiB of scales"
    add("frozen blocks", how, matrices * size + of_rows)
    add("frozen tables", f"{rest:,} x {number} B{over}", rest * number / ranks)
    add("one matrix unpacked", f"{largest:,} x {8 + number} B", largest * (8 + number))


def activations(work: Work) -> dict[str, float]:
    """Numbers a token that one block keeps for its backward pass, by what they are."""
    c, tp, qat, number = work.config, work.tp, work.recipe.qat, work.machines.card.bytes
    numbers = {
        "residuals": 2 * c.dim / tp,
        "normed": 2 * c.dim,
        "queries, keys, values and their mixture": 2 * (work.q + work.kv) / tp,
        "feed-forward": 4 * c.hidden_dim / tp,
        # Of attention's and the norms' rows, in float32.
        "sums": (c.n_heads / tp + 2) * 4 / number,
    }
    if work.recipe.lora:
        numbers["adapters"] = len(work.recipe.lora.layers) * work.rank
    else:  # norms that learn keep their normalised input
        numbers["norms"] = 2 * c.dim / tp
    if qat is not None:
        # Each layer rounds for itself, and keeps what it rounded: wq, wk, wv; w1, w3; wo; w2.
        numbers["rounded inputs"] = 5 * c.dim + work.q / tp - 2 * c.dim
        inputs = 5 * c.dim + (work.q + c.hidden_dim) / tp
        if by_name(qat.format).static:  # one byte each for which were clipped
            numbers["which were clipped"] = inputs / number
    return numbers


def _count_activations(add, work: Work) -> None:
    recipe, config, number = work.recipe, work.config, work.machines.card.bytes
    numbers = sum(activations(work).values())
    n, layers = work.tokens, config.n_layers
    of_block = n * numbers * number
    rounded = work.block / work.tp * number if recipe.qat else 0.0
    again = 0.0
    if recipe.parallel.activation_checkpointing:
        how = f"{layers} x {n:,} tokens x {config.dim:,} x {number} B{_by(work.tp)}"
        add("inputs of blocks", how, layers * n * config.dim * number / work.tp)
        layers, again = 1, of_block
    else:
        how = f"{layers} x {n:,} tokens x {numbers:,.0f} x {number} B"
        add("activations", how, layers * of_block)
    if rounded:
        how = f"{layers} x {work.block:,} x {number} B{_by(work.tp)}"
        add("rounded weights", how, layers * rounded)
    # First the head computes and goes back, then block after block does: the larger counts.
    width = (2 * config.hidden_dim + config.dim) / work.tp
    block = again + n * width * number
    logits, states = CHUNK * config.vocab_size * 4, 3 * n * config.dim / work.tp * number
    summed = 0 if recipe.lora or work.machines.n_ranks > 1 else 4 * work.table
    head = logits + states + summed
    if head > block:
        how = f"{CHUNK} x {config.vocab_size:,} x 4 B logits + {states / GIB:.2f} GiB into and out"
        also = f" + {work.table:,} x 4 B while gradients are summed" if summed else ""
        add("the head's way back", how + also, head)
        return
    then = f"(the head's before: {head / GIB:.2f} GiB)"
    if again:
        add("one block again", f"{n:,} tokens x {numbers:,.0f} x {number} B", again)
    add("a block's way back", f"{n:,} tokens x {width:,.0f} x {number} B {then}", block - again)


def _count_time(made: Plan, work: Work, share_of_peak: float) -> None:
    recipe, c, machines = work.recipe, work.config, work.machines
    card, data = machines.card, recipe.data
    say = lambda what, how: made.speed.append((what, how))  # noqa: E731
    blocks, head = 2 * c.n_layers * work.block + 2 * work.n_adapters, 2 * work.table
    attention = 2 * c.n_layers * work.q * data.window  # causal: half of 4 x width x window
    forward = blocks + head + attention
    backward = forward + attention + (2 * work.n_adapters if recipe.lora else blocks + head)
    again = blocks + attention if recipe.parallel.activation_checkpointing else 0
    total = forward + backward + again
    parts = f"{blocks / 1e9:.2f} blocks + {head / 1e9:.2f} head + {attention / 1e9:.2f} attention"
    say("operations a token, forward", f"{parts} = {forward / 1e9:.2f} G")
    and_again = f" + {again / 1e9:.2f} blocks again" if again else ""
    say(
        "in all",
        f"{forward / 1e9:.2f} + {backward / 1e9:.2f} backward{and_again} = {total / 1e9:.2f} G",
    )
    n = work.passes * work.tokens
    seconds = n / work.tp * total / (card.flops * share_of_peak)
    say(
        "a step computes",
        f"{n:,} tokens{_by(work.tp)} x {total / 1e9:.2f} G / ({card.flops / 1e12:,.3g} T a second "
        f"x {share_of_peak:.0%}, assumed) = {seconds:,.2f} s",
    )
    if machines.n_ranks > 1:
        # Weights are sent during the computation; for activations it waits.
        weights, activations = _count_communication(made, work)
        seconds = max(weights, seconds + activations)
    if recipe.draws:
        n_answers = data.rows * recipe.drawing.answers
        say("drawing", f"{n_answers:,} answers a step; the time it takes is not counted")
    n_tokens = data.rows * work.width
    made.tokens_per_second, made.seconds = n_tokens / seconds, recipe.steps * seconds
    say(
        "tokens a second",
        f"{data.rows:,} rows x {work.width:,} / {seconds:,.2f} s = {made.tokens_per_second:,.0f}, "
        f"{made.tokens_per_second / machines.n_ranks:,.0f} a rank",
    )
    say(
        "the run",
        f"{recipe.steps:,} steps, {recipe.steps * n_tokens:,} tokens: {made.seconds / 86400:,.2f} "
        f"days, {made.seconds / 3600 * machines.n_ranks:,.0f} hours of a rank",
    )
    learning = work.n_adapters if recipe.lora else work.n_weights
    size = 4 * learning + work.optimizer_states()
    say("a checkpoint", f"{size / GB:,.1f} GB, {recipe.saving.keep} kept")


def _count_communication(made: Plan, work: Work) -> tuple[float, float]:
    """Seconds that a step needs to send weights and gradients, and activations."""
    c, card, number, gpus = (
        work.config,
        work.machines.card,
        work.machines.card.bytes,
        work.machines.gpus,
    )
    weights = c.n_layers * work.block + work.n_tables * work.table
    learning = work.n_adapters if work.recipe.lora else weights
    moved = work.passes * (2 * number * weights + 4 * learning) / work.tp
    in_node = work.fsdp * work.tp <= gpus
    rate = card.link if in_node else card.network
    seconds = moved / rate
    made.speed.append(
        (
            "meanwhile weights, gradients",
            f"{moved / GB:,.1f} GB at {rate / GB:g} GB/s {'within' if in_node else 'between'} "
            f"nodes = {seconds:,.2f} s",
        )
    )
    again = 1.5 if work.recipe.parallel.activation_checkpointing else 1.0
    n = work.passes * work.tokens * c.n_layers * number * again
    # Gathered before, and scattered after, attention and feed-forward, in both directions.
    tensor = 8 * n * c.dim * (work.tp - 1) / work.tp / card.link if work.tp > 1 else 0.0
    rate = card.link if work.cp * work.tp <= gpus else card.network
    context = 4 * n * work.kv / work.tp * (work.cp - 1) / rate if work.cp > 1 else 0.0
    if work.tp * work.cp > 1:
        how = f"{tensor:,.2f} s for tensor parallel, {context:,.2f} s for context parallel"
        made.speed.append(("besides, activations", how))
    return seconds, tensor + context


def _remedy(work: Work, stored: str) -> str:
    """The first settings, each on top of those before it, with which a rank has room."""
    recipe, config, machines, in_blocks = work.recipe, work.config, work.machines, work.in_blocks
    changed: list[str] = []
    for table, name, value in _changes(recipe, machines):
        if getattr(getattr(recipe, table), name) == value:
            continue
        recipe = replace(recipe, **{table: replace(getattr(recipe, table), **{name: value})})
        work = Work(recipe, config, machines, in_blocks)
        if list(work.problems()):
            continue
        changed = [c for c in changed if not c.startswith(f"{table}.{name} ")]
        changed.append(f"{table}.{name} = {str(value).lower()}")
        made = Plan()
        _count_memory(made, work, stored)
        if made.total <= machines.card.memory:
            return f"; with {', '.join(changed)} it is {made.total / GIB:.1f}"
    if not recipe.lora:
        return "; no division of the work makes it fit: take more or larger cards, or adapt: [lora]"
    for smaller in _smaller(stored):
        made = Plan()
        _count_memory(made, Work(recipe, config, machines), smaller)
        if made.total <= machines.card.memory:
            also = "".join(f", {change}" for change in changed)
            return f"; over weights stored as {smaller}{also} it is {made.total / GIB:.1f}"
    return "; no division of the work makes it fit: take more or larger cards"


def _smaller(stored: str) -> Iterator[str]:
    """Formats of fewer bits that need no calibration, one of each size."""
    if stored == BLOCKS:
        return
    bits = by_name(stored).weights.bits
    for name in names("store"):
        if not by_name(name).static and by_name(name).weights.bits < bits:
            bits = by_name(name).weights.bits
            yield name


def _changes(recipe: Recipe, machines: Machines) -> Iterator[tuple[str, str, object]]:
    yield "parallel", "activation_checkpointing", True
    yield "data", "micro_rows", 1
    yield "parallel", "data_parallel_replicate", 1
    yield "parallel", "data_parallel_shard", -1
    for name in ("tensor_parallel", "context_parallel"):
        degree = 2 * getattr(recipe.parallel, name)
        while degree <= min(machines.gpus, 8):
            yield "parallel", name, degree
            degree *= 2


def _by(degree: int) -> str:
    return f" / {degree}" if degree > 1 else ""
