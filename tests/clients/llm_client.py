# type: ignore  (runs where other versions of its packages are installed)
"""`llm`, a command line: python llm_client.py URL KEY MODEL."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key, model = sys.argv[1:]
folder = tempfile.TemporaryDirectory()
(Path(folder.name) / "extra-openai-models.yaml").write_text(f"""\
- model_id: nemo
  model_name: {model}
  api_base: {url}/v1
  api_key_name: nemo
  supports_tools: true
  supports_schema: true
""")


def llm(*arguments):
    command = [sys.executable, "-m", "llm", *arguments]
    env = {**os.environ, "LLM_USER_PATH": folder.name}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


llm("keys", "set", "nemo", "--value", key)
ask = ("prompt", "-m", "nemo", "-o", "max_tokens", "60", "-o", "temperature", "0", "Hello")
assert llm(*ask) == llm(*ask, "--no-stream") != ""
for more in ((), ("--no-stream",)):
    answer = llm(*ask, "--schema", "n int", *more)
    assert isinstance(json.loads(answer)["n"], int)
function = "def add(n: int) -> str:\n    'Add to a number.'\n    return '4'\n"
for more in ((), ("--no-stream",)):
    llm(*ask, "--functions", function, "--chain-limit", "3", *more)
last = json.loads(llm("logs", "list", "--json", "-n", "1"))[0]
assert last["tools"][0]["name"] == "add"
folder.cleanup()
print("ok: text, schemas and tools, whole and streamed")
