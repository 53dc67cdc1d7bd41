"""Every command, where nothing is installed but what the package itself needs: it works, or one
line names what is missing and how to get it, before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import opennemo.cli

# Each command: its arguments, and the extra that it cannot do without.
CASES = {
    "chat": ("{model} --max-tokens 2", None),
    "generate": ("{model} Hi --max-tokens 2", None),
    "serve": ("{model} --port 0", "serve"),
    "batch": ("{in}/lines.jsonl -o out {model}", "serve"),
    "info": ("{model}", None),
    "convert": ("{model} out --to mistral", None),
    "quantize": ("{model} out --format int8", None),
    "merge": ("{model} {in} out", None),
    "train": ("{in}/recipe.toml --out out", "train"),
    "plot": ("{in}/run -o out.png", "train"),
    "plan": ("{in}/recipe.toml", None),
    "tokenize": ("{in}/texts.jsonl --tokenizer {model} --out out --clean all", "train"),
    "validate-data": ("{in}/chats.jsonl --model {model}", None),
    "tokenizer show": ("{model} Hi", None),
    "tokenizer compare": ("{model} --texts {in}/texts.jsonl --csv out.csv --plot out.png", "train"),
    "tokenizer train": ("{in}/texts.jsonl -o out --vocab-size 1300", None),
    "eval run": ("{model} --suite table1 -o out", "eval"),
    "eval compare": ("{in}/run {in}/run", None),
}
# What one process does with all of them: each in a child, in a folder of its own.
RUNNER = """
import importlib.abc, json, os, sys
import torch, opennemo.cli, opennemo.llm, opennemo.terminal

blocked, cases = json.load(sys.stdin)

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in list(sys.modules):
    if name.partition(".")[0] in blocked:
        del sys.modules[name]
sys.meta_path.insert(0, Without())
for i, (command, arguments, folder) in enumerate(cases):
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        with open(f"{folder}.code", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
        continue
    os.makedirs(folder)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}.{name}", os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.environ["QUESTION"], os.O_RDONLY), 0)
    sys.stdin = open(0)
    sys.argv = ["opennemo", *command.split(), *arguments.split()]
    code = 1
    try:
        opennemo.cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
"""


def commands(app: typer.Typer) -> set[str]:
    """The names of all commands, those of groups with their group's."""
    top: Any = typer.main.get_command(app)
    groups = {name: getattr(command, "commands", None) for name, command in top.commands.items()}
    return {f"{name} {inner}".strip() for name, group in groups.items() for inner in group or ("",)}


def of_extras() -> list[str]:
    """Modules that come with extras alone."""
    from importlib.metadata import packages_distributions, requires

    from opennemo.cli.options import extra_of

    core = {line.split(";")[0] for line in requires("opennemo") or () if "extra" not in line}
    assert not any("fastapi" in line for line in core)
    return [name for name in packages_distributions() if extra_of(name)]


@pytest.fixture(scope="module")
def ended(folder, tmp_path_factory) -> dict[str, tuple[int, str, str, list[str]]]:
    """Of each command: its exit code, what it wrote to either stream, and files it left."""
    if sys.platform == "win32":
        pytest.skip("there is no fork")
    given, work = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("work")
    (given / "texts.jsonl").write_text('{"text": "one two three"}\n' * 40)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (given / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (given / "recipe.toml").write_text(
        f'objective = "chat"\nsteps = 1\nmodel = {{ path = "{folder}" }}\n'
        f'data = {{ train = [{{ path = "{given}/chats.jsonl" }}], window = 64, rows = 1 }}\n'
    )
    (given / "question").write_text("Hi")
    (given / "lines.jsonl").write_text("{}\n")
    (given / "run").mkdir()
    (given / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "lr": 0.1}\n')
    cases = [
        (name, arguments.replace("{model}", str(folder)).replace("{in}", str(given)),
         str(work / name.replace(" ", "-")))
        for name, (arguments, _) in CASES.items()
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([of_extras(), cases]), text=True,
        capture_output=True, timeout=1800,
        env=os.environ | {"QUESTION": str(given / "question"), "XDG_STATE_HOME": str(work)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        name: (
            int(Path(f"{at}.code").read_text()), Path(f"{at}.stdout").read_text(),
            Path(f"{at}.stderr").read_text(), sorted(path.name for path in Path(at).iterdir()),
        )
        for name, _, at in cases
    }  # fmt: skip


def test_every_command_is_here():
    assert commands(opennemo.cli.app) == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_missing_extra_is_one_line_before_work_begins(name, ended):
    wanted = CASES[name][1]
    code, _, err, files = ended[name]
    assert "Traceback" not in err, err
    if wanted is None:
        assert "is missing" not in err or "pip install" not in err, err
        return
    assert code == 2 and err.count("\n") == 1, err
    assert f"pip install -e '.[{wanted}]'" in err and "is missing" in err
    assert files == []
