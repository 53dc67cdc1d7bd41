"""A run's settings: one TOML file, one strict tree of frozen dataclasses.

Everything that a recipe may contain is here, with its default and its bounds. An unknown key or a
value of the wrong type is an error that names the key (`optim.lr`); `--set optim.lr=3e-4` is the
only way to override a file. The resolved tree is saved with the run, and a run is only resumed
under the tree that it began with. The modules that get the settings define what they do.
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from opennemo.errors import InvalidRequest, named_problems
from opennemo.model.formats import names
from opennemo.model.transformer import PRESETS, ModelConfig

STRICT = ConfigDict(extra="forbid", strict=True)
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Every field of a model's shape may be given, with its type.
Shape = dataclass(ModelConfig, frozen=True, kw_only=True, config=STRICT)


def _trained_format(name: str) -> str:
    if name not in names("train"):
        raise ValueError(f"allowed are {', '.join(names('train'))}")
    return name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """What is trained: an existing model (`path`), or a new one of a `shape`."""

    path: str | None = None  # a folder, a .gguf file or a Hugging Face id
    # A name of PRESETS, or the fields of a shape.
    shape: str | Shape | None = None  # pyright: ignore[reportInvalidTypeForm]
    tokenizer: str | None = None  # for a new model: a folder or file
    # For a longer context than the model had: a slower rotation, a higher limit.
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    max_position_embeddings: Positive | None = None  # tokens

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.path is None) == (self.shape is None):
            raise ValueError("give model.path or model.shape, one of the two")
        if isinstance(self.shape, str) and self.shape not in PRESETS:
            names = ", ".join(PRESETS)
            raise ValueError(f"model.shape is {self.shape!r}, allowed are {names}")
        if self.shape is not None and self.tokenizer is None:
            raise ValueError("model.tokenizer is missing: a new model needs one")
        return self

    @property
    def new_shape(self) -> ModelConfig | None:
        """The shape of a new model."""
        if isinstance(self.shape, str):
            return PRESETS[self.shape]
        return None if self.shape is None else ModelConfig(**vars(self.shape))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """A folder of shards that `opennemo tokenize` wrote, or a file of conversations or pairs.

    A conversation to draw answers to ends with a question, or with a reference answer.
    """

    path: Path  # that folder or file
    weight: Annotated[float, Field(gt=0)] = 1.0  # share of the tokens drawn; of shards alone


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingData:
    """The training data, and how it is divided into steps."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]  # the training data
    valid: tuple[Source, ...] = ()  # data for the held-out loss
    # Tokens of a row, into which documents or conversations are packed; of a prompt and one answer.
    window: Positive = 1024
    rows: Positive = 8  # of a step, over all ranks; where answers are drawn, prompts
    micro_rows: Positive = 8  # computed at once on a rank; less memory, the same result
    skip_bad: bool = False  # leave out lines that cannot be used, rather than stop
    valid_rows: Positive = 32  # of an evaluation

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.rows % self.micro_rows and self.micro_rows < self.rows:
            raise ValueError(
                f"data.rows is {self.rows}, which is not a multiple of data.micro_rows, "
                f"{self.micro_rows}"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optim:
    """AdamW (arXiv:1711.05101), or Muon for the matrices of blocks and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"  # the optimiser
    lr: Annotated[float, Field(gt=0, le=10)] = 3e-4  # the highest learning rate
    schedule: Literal["wsd", "cosine"] = "wsd"  # warm up, stay, decay (arXiv:2404.06395)
    warmup: Share = 0.02  # of all steps
    decay: Share = 0.2  # of all steps, for wsd
    final: Share = 0.0  # of lr, where the decay ends
    betas: tuple[Share, Share] = (0.9, 0.95)  # decay of both averages of gradients
    eps: Number = 1e-8  # added to the divisor of AdamW
    weight_decay: Number = 0.1  # of matrices
    clip: Number = 1.0  # of the gradient's norm; 0 for none


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Qat:
    """Learn as if rounded already, so that export loses nothing."""

    format: Annotated[str, AfterValidator(_trained_format)] = "fp8-static"  # of weights and inputs
    kv: bool = False  # queries, keys and values in FP8, too
    start: Share = 0.0  # of all steps; before, the run is in full precision
    freeze: Share = 0.9  # of all steps, after which static scales stay


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lora:
    rank: Annotated[int, Field(gt=0, le=1024)] = 16  # of the low-rank part
    alpha: Annotated[float, Field(gt=0)] = 32.0  # that part is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of inputs left out
    layers: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # layers that get one
    start: str | None = None  # an adapter's folder to continue from: this rank, these layers
    # The type of the frozen weights and of products; auto: as they are stored on a GPU; on a CPU
    # float32, or the blocks of a GGUF file.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Preference:
    """Direct preference optimisation (arXiv:2305.18290), its usual amendments, and its successors.

    "ipo" (arXiv:2310.12036) aims at a margin and "apo-zero" (2408.06266) at answers likelier and
    less likely than before; "simpo" (2405.14734) and "orpo" (2403.07691) need no reference model.
    """

    loss: Literal["dpo", "ipo", "apo-zero", "simpo", "orpo"] = "dpo"  # of each pair
    beta: Annotated[float, Field(gt=0)] = 0.1  # the larger, the closer to the reference model
    margin: Number = 0.0  # by which the chosen answer is to be ahead; simpo's gamma
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # conservative DPO
    sft: Number = 0.0  # weight of the chosen answer's own loss per token (arXiv:2404.19733)
    length_normalized: bool = False  # compare log-probabilities per token (arXiv:2411.15124)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        used = {"margin": ("dpo", "simpo"), "label_smoothing": ("dpo", "simpo")}
        for name, losses in used.items():
            if getattr(self, name) and self.loss not in losses:
                raise ValueError(
                    f"preference.{name}: not of {self.loss}, of {' and '.join(losses)}"
                )
        return self

    @property
    def has_reference(self) -> bool:
        """Whether the loss uses the model's log-probabilities from before training."""
        return self.loss not in ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Distil:
    """Another model's probabilities: of a text's next ids, or of ids that the student drew."""

    teacher: str | None = None  # of the same vocabulary; by default `model.path` as it was
    on_policy: bool = False  # reverse KL on the student's own answers (arXiv:2306.13649)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Drawing:
    """Answers that the model draws to learn from, at temperature 1 from the whole vocabulary."""

    answers: Annotated[int, Field(gt=0, le=1024)] = 8  # to each prompt
    max_tokens: Positive = 256  # of an answer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reward:
    """A reward for answers: a function of rewards.py, or the user's own, and its weight."""

    name: str  # "module:function" or "file.py:function" for one of your own
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0  # in the sum
    pattern: str | None = None  # only of `format`: the whole answer matches it


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reinforcement:
    """GRPO (arXiv:2402.03300) as DAPO (2503.14476) and Dr. GRPO (2503.20783) corrected it.

    A loss is a mean over tokens, gains are not divided by their spread or by lengths, and groups
    whose answers all have the same reward are left out.
    """

    rewards: tuple[Reward, ...] = ()  # what is summed
    updates: Positive = 1  # of a step, among which its prompts are divided
    epochs: Positive = 1  # passes over them
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2  # how far an update may lower a token ...
    clip_high: Annotated[float, Field(gt=0)] = 0.28  # ... or raise it, as shares
    kl: Number = 0.0  # weight of the divergence from the first model, per token
    timeout: Annotated[float, Field(gt=0)] = 30.0  # seconds that a reward may take for an answer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Saving:
    every: Count = 100  # steps; 0 for only the last one
    keep: Positive = 2  # checkpoints, the newest


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    every: Count = 100  # steps; 0 for only the last one
    prompts: Path | None = None  # JSON lines of messages, answered for the log
    max_tokens: Positive = 64  # of such an answer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Parallel:
    """How the ranks divide the work; their product is the number of ranks."""

    data_parallel_replicate: Positive = 1  # groups that each hold a whole model
    data_parallel_shard: Annotated[int, Field(ge=-1)] = -1  # that divide weights; -1: the rest
    tensor_parallel: Positive = 1  # ranks that divide every matrix
    context_parallel: Positive = 1  # ranks that divide the tokens of a row
    activation_checkpointing: bool = False  # compute again rather than keep: less memory
    compile: bool = False  # by torch.compile


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A run, whole."""

    objective: Literal["text", "chat", "preference", "distil", "rl"] = "text"  # docs/training.md
    steps: Positive  # of the optimiser
    seed: Count = 0  # of new weights and of the order of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    licence: str = ""  # of the result, for its model card
    model: Model
    data: TrainingData
    optim: Optim = Optim()
    qat: Qat | None = None
    lora: Lora | None = None
    preference: Preference = Preference()
    distil: Distil = Distil()
    drawing: Drawing = Drawing()
    rl: Reinforcement = Reinforcement()
    saving: Saving = Saving()
    evaluation: Evaluation = Evaluation()
    parallel: Parallel = Parallel()

    @model_validator(mode="after")
    def _can_be_adapted(self) -> Self:
        if self.lora and self.model.path is None:
            raise ValueError("lora adapts a model that is there: give model.path")
        return self

    @property
    def draws(self) -> bool:
        """Whether the model learns from answers that it draws itself."""
        return self.objective == "rl" or (self.objective == "distil" and self.distil.on_policy)

    @model_validator(mode="after")
    def _can_draw(self) -> Self:
        if not self.draws:
            return self
        if self.lora and self.lora.dropout:
            raise ValueError("lora.dropout: must be 0 where the model learns from its own answers")
        if self.drawing.max_tokens >= self.data.window:
            raise ValueError("data.window has no room for a prompt beside drawing.max_tokens")
        if self.objective == "rl":
            if not self.rl.rewards:
                raise ValueError("rl.rewards: name at least one, such as [{name = 'exact_call'}]")
            if self.drawing.answers < 2:
                raise ValueError("drawing.answers: rl compares answers, so there must be 2 or more")
            if self.data.rows % self.rl.updates:
                raise ValueError(f"rl.updates: must divide data.rows, {self.data.rows}")
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A TOML file as a recipe; `overrides` are `key.key=value`, the value in TOML or a bare word.

    Relative paths in the file are relative to the working directory, as in a shell script.

    Raises:
        InvalidRequest: not there, not TOML, an unknown key, a wrong type, a value out of bounds;
            the key is named.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number without end
        raise InvalidRequest(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """A tree of plain values as a recipe."""
    try:
        # As JSON, in which a strict tree takes tables for dataclasses and arrays for tuples.
        return TypeAdapter(Recipe).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        problems = named_problems(error.errors(include_url=False), _keys(Recipe))
        raise InvalidRequest(f"{where}: {problems}") from None


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, with dots."""
    if is_dataclass(kind):
        for name, type in get_type_hints(kind).items():
            yield f"{prefix}{name}"
            yield from _keys(type, f"{prefix}{name}.")
    elif get_origin(kind) is not tuple:  # a list's own keys are named by their places
        for part in get_args(kind):
            yield from _keys(part, prefix)


def to_json(recipe: Recipe) -> str:
    """The whole tree, as it is saved with a run."""
    tree = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def differences(a: Recipe, b: Recipe) -> list[str]:
    """The keys in which two recipes differ, each with both values."""
    trees = [TypeAdapter(Recipe).dump_python(recipe, mode="json") for recipe in (a, b)]
    flat = [dict(_leaves(tree)) for tree in trees]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    pairs = {key: (flat[0].get(key), flat[1].get(key)) for key in keys}
    return [f"{key} was {x!r} and is {y!r}" for key, (x, y) in pairs.items() if x != y]


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [
        leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}".strip("."))
    ]


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InvalidRequest(f"--set {override}: write key=value, such as optim.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word, as a shell leaves it
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InvalidRequest(f"--set {override}: {parent} is a value, and has no {last}")
    tree[last] = value
