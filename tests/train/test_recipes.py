"""The recipe from text to a model that answers, as anyone would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from opennemo.llm import LLM

ROOT = Path(__file__).parents[2]


def test_nano_goes_from_text_to_an_answer_and_goes_on_where_it_was(tmp_path, chats):
    texts = tmp_path / "texts.jsonl"
    paragraphs = [
        paragraph
        for file in sorted((ROOT / "docs").glob("*.md"))
        for paragraph in file.read_text("utf-8").split("\n\n")
        if len(paragraph) > 100
    ]
    lines = (json.dumps({"text": p, "lang": "en", "licence": "Apache-2.0"}) for p in paragraphs)
    texts.write_text("\n".join(lines) + "\n", "utf-8")
    out = tmp_path / "nano"
    environment = {
        **os.environ, "TEXTS": str(texts), "CHATS": str(chats), "HOME": str(tmp_path),
        "PYTHON": sys.executable, "OPENNEMO": str(Path(sys.executable).with_name("opennemo")),
    }  # fmt: skip
    command = ["bash", "recipes/nano.sh", str(out), "toy"]
    settings = ["--set", "steps=2", "--set", "data.rows=2", "--set", "data.micro_rows=2"]
    done = subprocess.run(
        [*command, *settings, "--set", "data.window=256"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for stage in ("base", "instruct"):
        stored = json.loads((out / stage / "fp8-static" / "config.json").read_text())
        assert stored["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
        assert len((out / stage / "metrics.jsonl").read_text().splitlines()) == 2
        assert "| seed | 0 |" in (out / stage / "fp8-static" / "README.md").read_text()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The script asked it a question; what two steps teach may be to say nothing, so it has to here.
    with LLM.load(str(out / "instruct" / "fp8-static")) as llm:
        reply = llm.complete("Is it raining in Paris?", max_tokens=8, ignore_eos=True)
        assert len(reply.finish().ids) == 8
