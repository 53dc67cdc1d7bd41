"""Run every client against one server, each in an environment of its own: `make clients`.

`run.py llm` runs those whose script's name holds the word. Environments lie in .venv/clients and
are kept. A client whose packages cannot be fetched is
skipped, with the reason; one that fails makes this fail.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
HOME = HERE.parents[1] / ".venv" / "clients"
MODEL = "smollm2-135m-instruct"
KEY, PORT = "a-key-for-clients", "8137"
# Each script with what it needs; the version of the first package is shown.
CLIENTS = [
    ("openai_client.py", ["openai>=3,<4"]),
    ("openai_client.mjs", ["openai", "zod"]),
    ("openai_agents_client.py", ["openai-agents"]),
    ("mistral_client.py", ["mistralai==3.7.0"]),
    ("mistral_client.py", ["mistralai==1.12.4"]),
    ("mistral_2024_client.py", ["mistralai==0.4.2"]),
    ("mistral_client.mjs", ["@mistralai/mistralai", "zod"]),
    ("anthropic_client.py", ["anthropic>=2,<3"]),
    (
        "ai_sdk_client.mjs",
        [
            "ai",
            "@ai-sdk/mistral",
            "@ai-sdk/openai",
            "@ai-sdk/openai-compatible",
            "@ai-sdk/anthropic",
        ],
    ),
    ("litellm_client.py", ["litellm!=1.82.7,!=1.82.8"]),  # two that were malicious
    ("langchain_client.py", ["langchain-openai", "langchain-mistralai"]),
    ("llama_index_client.py", ["llama-index-llms-openai-like"]),
    ("pydantic_ai_client.py", ["pydantic-ai-slim[openai,mistral,anthropic]"]),
    ("instructor_client.py", ["instructor"]),
    ("aider_client.py", ["aider-chat"]),
    ("llm_client.py", ["llm"]),
]


def environment(script: str, packages: list[str]) -> tuple[list[str], str]:
    """Install a client's packages -> the command that runs its script, the version it has."""
    name = re.match(r"@?[\w./-]+", packages[0])[0]  # pyright: ignore[reportOptionalSubscript]
    folder = HOME / "".join(c if c.isalnum() else "_" for c in f"{script}_{packages[0]}")
    if script.endswith(".mjs"):
        if not (folder / "node_modules").exists():
            folder.mkdir(parents=True, exist_ok=True)
            options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            run(["npm", "install", *options, *packages])
        copy = folder / script  # packages are looked for beside the script
        copy.write_bytes((HERE / script).read_bytes())
        about = folder / "node_modules" / name / "package.json"
        return ["node", str(copy)], f"{name} {json.loads(about.read_text('utf-8'))['version']}"
    if not (folder / "installed").exists():
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(folder / "bin" / "pip"), "install", "-q", "--retries", "1", *packages])
        (folder / "installed").touch()
    python = str(folder / "bin" / "python")
    asked = f"from importlib.metadata import version; print(version({name!r}))"
    return [python, str(HERE / script)], f"{name} {run([python, '-c', asked]).strip()}"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise OSError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout


def main(only: str = "") -> int:
    """Run the clients whose script's name holds `only`."""
    url = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "opennemo.cli", "serve", MODEL, "--port", PORT]
    command += ["--api-key", KEY, "--served-model-name", "nemo"]
    command += ["--override-generation-config", '{"temperature": 0.7}']
    state = tempfile.TemporaryDirectory()  # or it would go on with batches of whoever runs this
    server = subprocess.Popen(
        command, env={**os.environ, "OPENNEMO_STATE_DIR": state.name}, stderr=subprocess.DEVNULL
    )
    failed = 0
    try:
        import httpx2

        for _ in range(600):
            time.sleep(0.2)
            try:
                if httpx2.get(f"{url}/health").is_success:
                    break
            except httpx2.TransportError:
                assert server.poll() is None, "the server did not start"
        for script, packages in CLIENTS:
            if only not in script:
                continue
            try:
                command, version = environment(script, packages)
            except (OSError, subprocess.SubprocessError) as error:
                print(f"skipped  {packages[0]:32} cannot be installed: {str(error)[:200]}")
                continue
            done = subprocess.run(
                [*command, url, KEY, "nemo"], capture_output=True, text=True, timeout=900
            )
            *_, said = done.stdout.splitlines() or [""]
            good = done.returncode == 0 and said.startswith("ok: ")
            print(f"{'passed' if good else 'FAILED'}   {version:32} {said[4:] * good}", flush=True)
            if not good:
                failed += 1
                print(done.stdout[-2000:], done.stderr[-4000:])
    finally:
        server.terminate()
        server.wait(60)
        state.cleanup()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
