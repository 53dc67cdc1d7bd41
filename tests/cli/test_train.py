"""`opennemo train` and `plan` on the command line: what cannot fit is refused before it begins."""

import json

import pytest

from opennemo.cli import app
from opennemo.errors import InvalidRequest
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
