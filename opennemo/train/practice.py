"""Answers that a model draws to learn from: drawn, judged, and laid out as batches.

A step takes some tasks, has each answered several times by a function that the caller passes in
(`Rollout`; the trainer does not know the engine), and makes batches of the answers. An answer's
gain is its reward minus the mean of its group. Seeds follow from the run's seed, the step and the
task, so answers depend on those and on the weights alone. The prompt of a group is computed once
(`Forked`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from opennemo.errors import InvalidRequest
from opennemo.model.positions import Window
from opennemo.model.quantization import fake_kv, observers
from opennemo.model.transformer import Transformer
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.chat import call_syntax, parse_reply, turn_end
from opennemo.train.conversations import Example, Task
from opennemo.train.packing import Batch, collate, pack
from opennemo.train.rewards import Attempt, Judge

if TYPE_CHECKING:  # pydantic is only needed for reading recipes
    from opennemo.train.config import Recipe

SHOWN = 2  # groups of a step that go into the log of samples


class Drawn(NamedTuple):
    """An answer."""

    ids: list[int]  # including the one that ended it
    log_probs: list[float]  # of each, under the model that drew it
    whole: bool  # it ended by itself


class Rollout(Protocol):
    """Draws answers from a model with its present weights, and does not change it."""

    def __call__(
        self,
        model: Transformer,
        prompts: Sequence[list[int]],
        *,
        n: int,
        max_tokens: int,
        seeds: Sequence[int],
        greedy: bool = False,
    ) -> list[list[Drawn]]:
        """`n` answers to each prompt, at temperature 1 or the likeliest.

        The same arguments and weights give the same answers, bit for bit.
        """  # fmt: skip
        ...


class TaskRows:
    """An endless list of tasks, every epoch in a new order; its length is that of an epoch."""

    def __init__(self, tasks: Sequence[Task], seed: int):
        self.tasks, self.seed = tasks, seed

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        epoch, place = divmod(index, len(self.tasks))
        order = np.random.default_rng((self.seed, epoch, len(self))).permutation(len(self))
        return self.tasks[order[place]]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The result of a step's answers."""

    updates: list[list[Batch]]  # for each update its batches, one for each pass
    filler: Batch  # nothing to learn, for ranks that must make as many passes as others
    values: dict[str, float]  # means over the answers
    samples: list[dict[str, Any]]  # some of the answers


class Practice:
    """Draws and judges answers as a recipe says."""

    def __init__(
        self, recipe: "Recipe", tokenizer: Tokenizer, rollout: Rollout, judge: Judge | None,
        window: Window,
    ):  # fmt: skip
        """Without a judge every answer is learned from.

        Raises:
            InvalidRequest: the model's turns end in a text that is not a token.
        """
        if isinstance(end := turn_end(tokenizer), str):
            raise InvalidRequest(
                f"objective {recipe.objective}: turns of this model end in the text {end!r}, "
                "which is not a token, so that no answer could end"
            )
        self.recipe, self.tokenizer, self.rollout = recipe, tokenizer, rollout
        self.judge, self.window = judge, window
        self.weights = judge.weights if judge else np.zeros(0)

    def draw(self, model: Transformer, tasks: Sequence[Task], seeds: Sequence[int]) -> Lesson:
        """Answers to tasks, as batches to learn from.

        Raises:
            OpenNemoError: a reward failed.
        """
        drawing, rl = self.recipe.drawing, self.recipe.rl
        self._find_scales(model, tasks)
        groups = self.rollout(
            model, [task.ids for task in tasks], n=drawing.answers, max_tokens=drawing.max_tokens,
            seeds=seeds,
        )  # fmt: skip
        parts = self._judge(tasks, groups)
        worth = parts @ self.weights
        gains = worth - worth.mean(1, keepdims=True)
        # Where all answers have the same reward there is nothing to prefer.
        kept = [i for i in range(len(tasks)) if self.judge is None or np.ptp(worth[i]) > 0]
        n_updates, n_epochs = (rl.updates, rl.epochs) if self.judge else (1, 1)
        size = self.recipe.data.micro_rows
        updates = []
        for part in np.array_split(np.arange(len(tasks)), n_updates):
            chosen = [i for i in part.tolist() if i in kept]
            starts = range(0, len(chosen), size)
            updates.append(
                [self._batch(tasks, groups, gains, chosen[s : s + size]) for s in starts]
            )
        return Lesson(
            updates=updates * n_epochs,
            filler=replace(self._batch(tasks, groups, gains, [0]), n_units=0),
            values=self._describe(groups, parts),
            samples=self._samples(tasks, groups, parts),
        )

    def examine(self, model: Transformer, tasks: Sequence[Task]) -> dict[str, float]:
        """Sums of the rewards of the likeliest answers to tasks, and the number of tasks."""
        n = self.recipe.drawing.max_tokens
        groups = self.rollout(
            model, [task.ids for task in tasks], n=1, max_tokens=n, seeds=[0] * len(tasks),
            greedy=True,
        )  # fmt: skip
        values = self._describe(groups, self._judge(tasks, groups))
        kept = ("reward", "cut", "answer_tokens")
        found = {k: v * len(tasks) for k, v in values.items() if k.startswith(kept)}
        return {**found, "units": float(len(tasks))}

    def _find_scales(self, model: Transformer, tasks: Sequence[Task]) -> None:
        """Measure the inputs of a model with fixed scales before its first answers."""
        if all(largest.any() for largest in observers(model).values()):
            return
        batch = collate([pack([[_example(task.ids, ())] for task in tasks])], self.window)
        with torch.no_grad():
            batch = batch.to(model.norm.weight.device)
            model(batch.tokens, fake_kv(model, batch.attend()))

    def _judge(self, tasks: Sequence[Task], groups: Sequence[Sequence[Drawn]]) -> np.ndarray:
        """Rewards (tasks, answers, rewards) of the answers; the last size is 0 without a judge."""
        n = len(groups[0])
        if self.judge is None:
            return np.zeros((len(tasks), n, 0))
        attempts = [
            self._attempt(t, d) for t, group in zip(tasks, groups, strict=True) for d in group
        ]
        return self.judge(attempts).reshape(len(tasks), n, -1)

    def _attempt(self, task: Task, drawn: Drawn) -> Attempt:
        ids = drawn.ids[:-1] if drawn.whole else drawn.ids
        reply = parse_reply(self.tokenizer, ids)
        text = reply.get("content") or ""
        mark = call_syntax(self.tokenizer).marks[0]
        begun = mark in text or self.tokenizer.control.get(mark) in ids
        broken = begun and not reply.get("tool_calls")
        return Attempt(task=task, reply=reply, text=text, whole=drawn.whole, broken=broken)

    def _describe(self, groups: Sequence[Sequence[Drawn]], parts: np.ndarray) -> dict[str, float]:
        """Numbers for the record: means over the answers."""
        drawn = [answer for group in groups for answer in group]
        values = {
            "answer_tokens": float(np.mean([len(d.ids) for d in drawn])),
            "cut": float(np.mean([not d.whole for d in drawn])),
            "surprise": -float(np.mean([x for d in drawn for x in d.log_probs])),
        }
        if self.judge is not None:
            worth = parts @ self.weights
            values["reward"] = float(worth.mean())
            values["spread"] = float((np.ptp(worth, axis=1) > 0).mean())  # share of groups
            means = parts.mean((0, 1)).tolist()
            values |= {f"reward_{n}": x for n, x in zip(self.judge.names, means, strict=True)}
        return values

    def _samples(
        self, tasks: Sequence[Task], groups: Sequence[Sequence[Drawn]], parts: np.ndarray
    ) -> list[dict[str, Any]]:
        """The answers of some groups, for the log."""
        found = []
        for task, group, worth in list(zip(tasks, groups, parts, strict=True))[:SHOWN]:
            for answer, row in zip(group, worth, strict=True):
                text = self.tokenizer.decode(answer.ids, show_control=True)
                found.append({"messages": task.messages, "answer": text})
                if self.judge is not None:
                    named = dict(zip(self.judge.names, row.tolist(), strict=True))
                    found[-1] |= {"reward": float(row @ self.weights), "parts": named}
        return found

    def _batch(
        self, tasks: Sequence[Task], groups: Sequence[Sequence[Drawn]], gains: np.ndarray,
        chosen: Sequence[int],
    ) -> Batch:  # fmt: skip
        """Some groups as one batch, with a gain and a log-probability for each target."""
        row = pack([[_example(tasks[i].ids, d.ids) for d in groups[i]] for i in chosen])
        answers = [(d, gain) for i in chosen for d, gain in zip(groups[i], gains[i], strict=True)]
        drawn = [x for d, _ in answers for x in d.log_probs]
        gained = np.repeat([gain for _, gain in answers], [len(d.ids) for d, _ in answers])
        return replace(
            collate([row], self.window),
            drawn=torch.tensor(drawn, dtype=torch.float32),
            gains=torch.from_numpy(gained).float(),
        )


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Example(np.array([*prompt, *answer], np.uint32), mask)
