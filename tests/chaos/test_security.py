"""The tests and hashes that docs/security.md names exist, and the tests of docs/models.md."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "docs" / "security.md").read_text("utf-8")
MODELS = (ROOT / "docs" / "models.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"tests/[\w/]+\.py::\w+", SECURITY + MODELS)))
SDKS = ("anthropic", "mistral-common", "mistralai", "openai")


@pytest.mark.parametrize("name", NAMED)
def test_the_tests_that_are_named_exist(name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_class_of_the_table_has_a_test():
    rows = [line for line in SECURITY.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 26))
    assert all("::test_" in row.split("|")[4] for row in rows)


def test_sdks_of_clients_are_for_tests_and_one_for_evaluation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    others = [*project["dependencies"], *(p for e in extras if e != "dev" for p in extras[e])]
    assert [p for p in others if re.match(rf"({'|'.join(SDKS)})\b", p)] == [
        p for p in extras["eval"] if p.startswith("openai")
    ]
    for path in set((ROOT / "opennemo").rglob("*.py")) - {ROOT / "opennemo/evals/endpoint.py"}:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"anthropic", "mistralai", "openai"}


def test_the_lock_has_a_hash_for_everything_and_names_no_place():
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    entries = re.split(r"\n(?=\S)", lock)
    packages = {e.split("==")[0]: e for e in entries if re.match(r"[\w.-]+(\[\w+\])?==", e)}
    assert len(packages) > 80 and {"fastapi", "hypothesis", "openai"} <= packages.keys()
    for name, entry in packages.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
    assert not {"torch", "triton"} & packages.keys()  # the Makefile says where they come from
    assert not re.search(r"https?://|file://|--(extra-)?index-url|--find-links|@ ", lock)
