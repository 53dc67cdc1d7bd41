"""The one loop: batches in, a model out, for every objective, and for one process or many.

Resuming is exact because a step is a function of the seed, its number and the state: its rows, its
learning rate and its random numbers (set from the seed and the number) all are, and a checkpoint
holds the state. So a killed run ends with the same bits as an uninterrupted one. The gradient of a
step is the sum of its losses over the number of its units, however they are divided into passes and
over ranks.

It does not know files of models (`run.py`), nor the engine: samples, and answers to learn from,
come from functions that the caller passes in. It installs no signal handlers either: a command line
calls `stop`.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.model.parallel import data_rank, make_mesh, shard_
from opennemo.model.quantization import observers, set_qat_
from opennemo.model.transformer import Transformer
from opennemo.progress import Bar, progress
from opennemo.tokenizer.tokenizer import Tokenizer
from opennemo.train.checkpoints import Checkpoints
from opennemo.train.conversations import Task
from opennemo.train.metrics import Log, matmul_flops, note, step_flops
from opennemo.train.objectives import next_token, objective
from opennemo.train.optim import clip, optimizers, rate, set_rate
from opennemo.train.packing import (
    IGNORED,
    Batch,
    ExampleRows,
    PackedRows,
    collate,
    step_rows,
)
from opennemo.train.practice import Practice, Rollout, TaskRows
from opennemo.train.references import kept_log_probs
from opennemo.train.scales import settle_scales
from opennemo.train.setup import Setup

if TYPE_CHECKING:  # pydantic is only needed for reading recipes
    from opennemo.train.config import Recipe

Sample = Callable[[Transformer, Tokenizer], list[dict[str, Any]]]
LINE_EVERY = 10.0  # seconds between lines where there is no terminal
MAX_SKIPPED = 20  # steps in a row with a gradient that is not finite


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


class Trainer:
    """One run: make one, call `train`."""

    def __init__(
        self, recipe: "Recipe", run: Path, setup: Setup, device: torch.device, *,
        sample: Sample | None = None, rollout: Rollout | None = None, quiet: bool = False,
    ):  # fmt: skip
        """Continue the run in this folder from its last checkpoint, or begin it.

        Args:
            sample: makes answers for the log at evaluations.
            rollout: draws the answers to learn from, if the recipe needs any.
        """
        self.recipe, self.run, self.setup, self.sample = recipe, run, setup, sample
        self.rank, self.n_ranks = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        if sample is not None and self.n_ranks > 1:
            raise InvalidRequest("evaluation.prompts: samples are drawn by one process alone")
        self.model, self.device, parallel = setup.model, device, recipe.parallel
        self.mesh = make_mesh(
            device.type,
            data_parallel_replicate=parallel.data_parallel_replicate,
            data_parallel_shard=parallel.data_parallel_shard,
            tensor_parallel=parallel.tensor_parallel,
            context_parallel=parallel.context_parallel,
        )
        self.data_rank, self.n_data_ranks = data_rank(self.mesh)
        if recipe.data.rows % self.n_data_ranks:
            raise InvalidRequest(
                f"data.rows is {recipe.data.rows}, which {self.n_data_ranks} ranks cannot share"
            )
        if self.mesh is None:
            self.model.to(device)
        shard_(
            self.model, self.mesh, compile=parallel.compile,
            activation_checkpointing=parallel.activation_checkpointing,
            compute_dtype=torch.bfloat16 if device.type == "cuda" else None,
        )  # fmt: skip
        self.quiet = quiet or self.rank > 0
        self.objective = objective(recipe, setup.teacher, self.mesh)
        self.practice = None
        if recipe.draws:
            if rollout is None:
                raise InvalidRequest(f"objective {recipe.objective}: nothing draws answers")
            window = self.model.config.sliding_window
            self.practice = Practice(recipe, setup.tokenizer, rollout, setup.judge, window)
        self.optimizers = optimizers(self.model, recipe.optim)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.seen = np.zeros(self.model.config.vocab_size, bool)  # ids that occurred
        self.n_skipped = 0
        self._stopping = False
        self.references: dict[int, np.ndarray] = {}  # by id of rows
        self.checkpoints = Checkpoints(run / "checkpoints", keep=recipe.saving.keep)
        self.step = 0
        if self.checkpoints.latest() is not None:
            self.step = self._load()

    def stop(self) -> None:
        """End `train` after the present step; a signal handler or another thread may call this."""
        self._stopping = True

    def train(self) -> None:
        """Run to the last step, saving and evaluating on the way; nothing if that is reached.

        Raises:
            Stopped: `stop` was called; the same run can be resumed from there.
            OpenNemoError: the gradient is not finite any more; a reward failed.
        """
        if self.step >= self.recipe.steps:
            return
        if self.recipe.objective == "preference":
            self._compute_references()
        log = None if self.rank else Log(self.run, self.step)
        peak = matmul_flops(self.device, self._dtype)
        skipped_in_a_row = 0
        display = self._progress("Training", self.recipe.steps, self.step)
        with display as bar, ThreadPoolExecutor(1) as loader:
            coming = loader.submit(self._work, self.step)
            for step in range(self.step, self.recipe.steps):
                started = time.perf_counter()
                work = coming.result()
                waited = time.perf_counter() - started
                coming = loader.submit(self._work, step + 1)
                if self.practice is None:
                    batches, values = work, self.update(step, work)
                else:
                    batches, values = self.practise(step, work)
                skipped_in_a_row = skipped_in_a_row + 1 if values["skipped"] else 0
                self.step = step + 1
                seconds = time.perf_counter() - started
                n_tokens = sum(len(batch.tokens) for batch in batches)
                values["tokens_per_second"] = self.n_data_ranks * n_tokens / seconds
                share = self.n_data_ranks / self.n_ranks  # of a rank in what its group computes
                values["mfu"] = step_flops(self.model, batches) * share / seconds / peak
                values["waited_for_data"] = waited / seconds
                try:
                    if self._is_due(self.recipe.evaluation.every) and self.setup.valid is not None:
                        values |= self.evaluate(self.setup.valid)
                finally:  # the step was made, though a reward may have failed afterwards
                    if log is not None:
                        log.write(step, values)
                bar.update(self.step, note=note(values))
                if skipped_in_a_row > MAX_SKIPPED:
                    raise OpenNemoError(
                        f"step {step}: {skipped_in_a_row} steps in a row with a gradient that is "
                        "not finite; start again with a lower optim.lr or a longer optim.warmup"
                    )
                self._report(bar, step, values)
                stop = self._agreed_to_stop()
                if stop or self._is_due(self.recipe.saving.every):
                    self.checkpoints.save(self.step, self._state(), wait=stop)
                if stop and self.step < self.recipe.steps:
                    raise Stopped(f"stopped after step {self.step:,}, which is saved")
            self.checkpoints.wait()
        if log is not None:
            log.close()

    def update(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """One update of the weights; returns its metrics."""
        self._begin(step)
        return self._learn(step, batches)

    def practise(self, step: int, tasks: list[Task]) -> tuple[list[Batch], dict[str, float]]:
        """Draw answers to tasks and learn from them; returns the batches and the step's metrics.

        Raises:
            OpenNemoError: a reward failed, here or on another rank; the state is saved.
        """
        assert self.practice is not None
        self._begin(step)
        first = step * self.recipe.data.rows + self.data_rank * len(tasks)
        seeds = [_mix(self.recipe.seed, step, first + i) for i in range(len(tasks))]
        started = time.perf_counter()
        practice = self.practice
        lesson = self._agreed(lambda: practice.draw(self.model, tasks, seeds))
        seconds = time.perf_counter() - started
        updates = [self._as_many(batches, lesson.filler) for batches in lesson.updates]
        learned = [self._learn(step, batches) for batches in updates]
        done = [batch for batches in updates for batch in batches]
        for batch in done:
            self.seen[batch.tokens.numpy()] = True
        every = self.recipe.evaluation.every
        if step + 1 == self.recipe.steps or (every and (step + 1) % every == 0):
            self._log_samples(step, lesson.samples)
        sums = {k: float(self._sum(torch.tensor(v))) for k, v in lesson.values.items()}
        values = {k: v / self.n_ranks for k, v in sums.items()}
        for key in dict.fromkeys(key for one in learned for key in one):
            values[key] = sum(one.get(key, 0.0) for one in learned) / len(learned)
        skipped = float(all(one["skipped"] for one in learned))
        return done, values | {"skipped": skipped, "seconds_drawing": seconds}

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """A function's result, unless it raises on any rank; then the state is saved first."""
        error, result = None, None
        try:
            result = work()
        except OpenNemoError as raised:
            error = raised
        if self._sum(torch.tensor(float(error is not None))) > 0:
            if self.checkpoints.latest() != self.step:
                self.checkpoints.save(self.step, self._state(), wait=True)
            kept = f"(the run is saved after {self.step:,} steps, and the same command resumes)"
            raise OpenNemoError(f"{error or 'another rank could not draw answers'} {kept}")
        return result

    def _as_many(self, batches: list[Batch], filler: Batch) -> list[Batch]:
        """As many batches as every rank has, since ranks gather weights together."""
        most = torch.tensor(float(len(batches))).to(self.device)
        if self.n_ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return batches + [filler] * (int(most) - len(batches))

    def _begin(self, step: int) -> None:
        """Set the state that a step's computation depends on."""
        recipe = self.recipe
        torch.manual_seed(_mix(recipe.seed, step, self.rank))
        if recipe.qat is not None:
            share = step / recipe.steps
            set_qat_(
                self.model, rounds=share >= recipe.qat.start, observe=share < recipe.qat.freeze
            )
        self.model.train()

    def _learn(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Take the gradient of some batches' loss, and one step of the optimizers."""
        recipe = self.recipe
        # Ranks that divide sequences among them see the same units.
        units = float(self._sum(torch.tensor(float(sum(b.n_units for b in batches)))))
        units *= self.n_data_ranks / self.n_ranks
        lr = rate(step, recipe.steps, recipe.optim)
        if not units:  # no group of answers had a spread
            return {"loss": 0.0, "lr": lr, "grad_norm": 0.0, "skipped": 0.0}
        totals: dict[str, Tensor] = {}
        for batch in batches:
            batch = batch.to(self.device)
            with self._precision():
                loss, sums = self.objective(self.model, batch)
            if not batch.n_units:  # another rank's passes are as many
                loss, sums = 0 * loss, {name: 0 * value for name, value in sums.items()}
            (loss / units).backward()
            for name, value in {"loss": loss, **sums}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        norm = clip(self.parameters, recipe.optim.clip)
        values = {name: float(self._sum(total)) / units for name, total in totals.items()}
        skipped = not (math.isfinite(float(norm)) and math.isfinite(values["loss"]))
        if skipped:
            self.n_skipped += 1
        else:
            set_rate(self.optimizers, lr)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if recipe.qat is not None and step / recipe.steps < recipe.qat.freeze:
            settle_scales(self.model, self.n_ranks)
        return {**values, "lr": lr, "grad_norm": float(norm), "skipped": float(skipped)}

    @torch.no_grad()
    def evaluate(self, rows: PackedRows | TaskRows) -> dict[str, float]:
        """Losses on held-out rows, named `valid_...`."""
        model, recipe = self.model.eval(), self.recipe
        if isinstance(rows, TaskRows):
            return self._examine(rows)
        n_rows = min(recipe.data.valid_rows, getattr(rows, "__len__", lambda: 1 << 30)())
        copies = self.n_ranks // self.n_data_ranks  # of each row
        totals: dict[str, float] = {}
        # All ranks take the same number of rows, since they gather weights together.
        for index in range(self.data_rank, max(1, n_rows // self.n_data_ranks) * self.n_data_ranks,
                           self.n_data_ranks):  # fmt: skip
            batch = self._collate(rows, [index]).to(self.device)
            with self._precision():
                loss, sums = (
                    self.objective(model, batch)
                    if recipe.objective == "preference"
                    else next_token(model, batch, self.mesh)
                )
            targets = batch.targets[batch.targets != IGNORED].cpu().numpy()
            parts = {"loss": loss, **sums, "units": batch.n_units / copies}
            parts["bytes"] = int(self.setup.token_bytes[targets].sum()) / copies
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        self._part_weights()
        totals = {name: float(self._sum(torch.tensor(v).double())) for name, v in totals.items()}
        units, n_bytes = totals.pop("units"), totals.pop("bytes")
        values = {f"valid_{name}": value / units for name, value in totals.items()}
        if recipe.objective != "preference" and n_bytes:
            values["valid_bits_per_byte"] = totals["loss"] / n_bytes / math.log(2)
        return values

    def _examine(self, rows: TaskRows) -> dict[str, float]:
        """The rewards of the likeliest answers to held-out tasks."""
        assert self.practice is not None
        practice, n_rows = self.practice, min(self.recipe.data.valid_rows, len(rows))
        n_each = max(1, n_rows // self.n_data_ranks)
        tasks = [rows[self.data_rank + i * self.n_data_ranks] for i in range(n_each)]
        totals = self._agreed(lambda: practice.examine(self.model, tasks))
        totals = {k: float(self._sum(torch.tensor(v).double())) for k, v in totals.items()}
        units = totals.pop("units")
        return {f"valid_{name}": value / units for name, value in totals.items()}

    def unseen(self) -> list[int]:
        """Ids of the vocabulary, control tokens left out, that have not occurred so far."""
        tokenizer = self.setup.tokenizer
        ids = np.flatnonzero(~self.seen[: tokenizer.vocab_size]).tolist()
        return [id for id in ids if id not in tokenizer.control_names]

    def _work(self, step: int) -> Any:
        """What this rank computes in a step: one batch a pass, or tasks to answer first."""
        data = self.recipe.data
        rows = step_rows(step, data.rows, self.data_rank, self.n_data_ranks)
        if isinstance(self.setup.train, TaskRows):
            return [self.setup.train[i] for i in rows]
        size = min(data.micro_rows, len(rows))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        batches = [self._collate(self.setup.train, part) for part in parts]
        for batch in batches:
            self.seen[batch.tokens.numpy()] = True
        return batches

    def _collate(self, rows: PackedRows, indices: Any) -> Batch:
        window = self.model.config.sliding_window
        return collate([rows[i] for i in indices], window, self.references.get(id(rows)))

    def _compute_references(self) -> None:
        """Log-probabilities of each pair that the run will use, from before training."""
        self.model.eval()
        if self.recipe.qat is not None:
            set_qat_(self.model, rounds=False, observe=False)
        data = self.recipe.data
        named = {
            "train": (self.setup.train, self.recipe.steps * data.rows),
            "valid": (self.setup.valid, data.valid_rows),
        }
        for name, (rows, n_visited) in named.items():
            if not isinstance(rows, ExampleRows):
                continue
            if not self.recipe.preference.has_reference:
                self.references[id(rows)] = np.zeros((len(rows.units), 2), np.float32)
                continue
            file = self.run / f"reference-{name}.npy"
            if self.step and not file.exists():
                raise OpenNemoError(f"{file} is missing, and the model has changed since")
            n_rows = min(len(rows), n_visited)
            with self._precision(), self._progress("Reference log-probabilities", n_rows) as bar:
                self.references[id(rows)] = kept_log_probs(
                    file, self.model, rows, n_rows, writes=not self.rank, show=bar.update
                )
        self._part_weights()

    def _part_weights(self) -> None:
        """Free weights gathered for a forward pass that no backward pass followed."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _state(self) -> dict[str, Any]:
        """All that a checkpoint holds, as references to the present objects."""
        model = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        options = StateDictOptions(ignore_frozen_params=True)
        return {
            "model": model | observers(self.model),
            "optim": get_optimizer_state_dict(self.model, self.optimizers, options=options),
            "seen": torch.from_numpy(self.seen),
            "trainer": {"step": self.step, "skipped": self.n_skipped},
        }

    def _load(self) -> int:
        state = self._state()
        step = self.checkpoints.load(state)
        options = StateDictOptions(ignore_frozen_params=True)
        set_optimizer_state_dict(self.model, self.optimizers, state["optim"], options=options)
        self.n_skipped = state["trainer"]["skipped"]
        return step

    def _progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        return progress(what, total, done=done, seconds=LINE_EVERY, quiet=self.quiet)

    def _report(self, bar: Bar, step: int, values: dict[str, float]) -> None:
        """Print events that need a line of their own, and draw samples."""
        if values["skipped"]:
            bar.say(f"step {step}: the gradient is not finite; the step is skipped")
        held_out = {k: v for k, v in values.items() if k.startswith("valid_")}
        if held_out:
            losses = "  ".join(f"{k.removeprefix('valid_')} {v:.4f}" for k, v in held_out.items())
            bar.say(f"step {self.step:,}  held out: {losses}")
        if self.sample is not None and self._is_due(self.recipe.evaluation.every):
            self._log_samples(step, self.sample(self.model, self.setup.tokenizer))
        if self.step == self.recipe.steps and (unseen := self.unseen()):
            shown = ", ".join(repr(self.setup.tokenizer.token_bytes(id)) for id in unseen[:5])
            bar.say(
                f"{len(unseen):,} of {self.setup.tokenizer.vocab_size:,} ids never occurred, so "
                f"their rows are as they were at first: {shown}{' ...' * (len(unseen) > 5)}"
            )

    def _log_samples(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        if self.rank:
            return
        with (self.run / "samples.jsonl").open("a", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n")

    def _is_due(self, every: int) -> bool:
        return self.step == self.recipe.steps or bool(every and self.step % every == 0)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def _precision(self) -> Any:
        """bf16 on a GPU, unless weights are gathered in it; float32 on a CPU, which emulates it."""
        if self.device.type == "cuda" and self.mesh is None:
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _sum(self, value: Tensor) -> Tensor:
        """Over all ranks."""
        if self.n_ranks > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value

    def _agreed_to_stop(self) -> bool:
        return bool(self._sum(torch.tensor(float(self._stopping))) > 0)


def _mix(*numbers: int) -> int:
    """One seed of several."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
