"""`opennemo train` and `plan` on the command line: what cannot fit is refused before it begins."""

import json

import pytest

from opennemo.cli import app
from opennemo.errors import InvalidRequest
from opennemo.model.transformer import ModelConfig
from opennemo.planning.estimate import PLAIN, Base
from tests.cli.conftest import needs_smollm2

RECIPE = 'objective = "chat"\nsteps = 1\nmodel = {{ path = "{model}" }}\ndata = {{ {data} }}\n'


@pytest.fixture
def write(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")

    def write(model) -> str:
        data = f'train = [{{ path = "{tmp_path}/chats.jsonl" }}]'
        (tmp_path / "recipe.toml").write_text(RECIPE.format(model=model, data=data))
        return str(tmp_path / "recipe.toml")

    return write


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.window=99999999", "a step needs about .*, and .* are free: .*99,999,999"),
        ("data.window=1025", "data.window is 1,025, and the model has 1,024 positions"),
    ],
)
def test_a_window_that_cannot_be_is_refused_at_once(write, folder, tmp_path, setting, message):
    arguments = ["train", write(folder), "--out", str(tmp_path / "run"), "--set", setting]
    with pytest.raises(InvalidRequest, match=message):
        app(arguments, standalone_mode=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


@needs_smollm2
def test_plan_takes_what_train_takes(write, tmp_path, capsys):
    recipe = write("smollm2-135m-instruct")  # no path, but a name
    settings = ["--set", "data.window=64", "--set", "data.micro_rows=1", "--set", "lora.rank=4"]
    app(["plan", recipe, "--out", str(tmp_path / "run"), *settings], standalone_mode=False)
    assert "a rank needs" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("here", "nodes", "fits"), [(1, 1, False), (1, 64, True), (2, 1, False)])
def test_memory_is_counted_with_the_ranks_of_all_nodes(
    write, folder, tmp_path, monkeypatch, here, nodes, fits
):
    """Weights are divided over all of them, those of other nodes as well."""

    def begin(*_: object, **__: object) -> None:
        raise InvalidRequest("it began")

    config = ModelConfig(
        dim=1024, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=4096,
        vocab_size=1024, max_position_embeddings=1024,
    )  # fmt: skip
    free = {"cpu": here * 1.5 * 2**30}
    monkeypatch.setattr("opennemo.model.memory.available_memory", lambda: free)
    monkeypatch.setattr("opennemo.planning.estimate.resolve_shape", lambda *_: Base(config, PLAIN))
    monkeypatch.setattr("opennemo.train.run.begin", begin)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("WORLD_SIZE", str(here * nodes))
    arguments = ["train", write(folder), "--out", str(tmp_path / "run")]
    for setting in ("data.window=8", "data.rows=64", "data.micro_rows=1"):
        arguments += ["--set", setting]
    with pytest.raises(InvalidRequest, match="it began" if fits else "a step needs about"):
        app(arguments, standalone_mode=False)
