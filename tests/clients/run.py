"""Run every client against one server, each in an environment of its own: `make clients`.

Environments lie in .venv/clients and are kept. A client whose packages cannot be fetched is
skipped, with the reason; one that fails makes this fail.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
HOME = HERE.parents[1] / ".venv" / "clients"
KEY, PORT = "a-key-for-clients", "8137"
CLIENTS = [
    ("openai_client.py", ["openai>=3,<4"]),
    ("mistral_client.py", ["mistralai>=3,<4"]),
    ("mistral_client.py", ["mistralai==1.12.4"]),
    ("mistral_2024_client.py", ["mistralai==0.4.2"]),
    ("anthropic_client.py", ["anthropic>=2,<3"]),
    ("openai_client.mjs", ["openai"]),
    ("mistral_client.mjs", ["@mistralai/mistralai"]),
    ("ai_sdk_client.mjs", ["@ai-sdk/mistral", "ai"]),
]


def environment(script: str, packages: list[str]) -> list[str]:
    """Install a client's packages -> the command that runs its script."""
    folder = HOME / "".join(c if c.isalnum() else "_" for c in f"{script}_{packages[0]}")
    if script.endswith(".mjs"):
        if not (folder / "node_modules").exists():
            folder.mkdir(parents=True, exist_ok=True)
            options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            run(["npm", "install", *options, *packages])
        copy = folder / script  # packages are looked for beside the script
        copy.write_bytes((HERE / script).read_bytes())
        return ["node", str(copy)]
    if not (folder / "installed").exists():
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(folder / "bin" / "pip"), "install", "-q", "--retries", "1", *packages])
        (folder / "installed").touch()
    return [str(folder / "bin" / "python"), str(HERE / script)]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError((done.stderr or done.stdout).strip().splitlines()[-1])


def main(model: str) -> int:
    url = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "opennemo.cli", "serve", model, "--port", PORT]
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
            name = f"{script:24} {packages[0]:24}"
            try:
                command = environment(script, packages)
            except (OSError, subprocess.TimeoutExpired) as error:
                print(f"skipped  {name} cannot be installed: {str(error)[:200]}")
                continue
            done = subprocess.run(
                [*command, url, KEY, "nemo"], capture_output=True, text=True, timeout=600
            )
            good = done.returncode == 0 and done.stdout.strip().endswith("ok")
            print(f"{'passed' if good else 'FAILED'}   {name}", flush=True)
            if not good:
                failed += 1
                print(done.stdout[-2000:], done.stderr[-4000:])
    finally:
        server.terminate()
        server.wait(60)
        state.cleanup()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or ["smollm2-135m-instruct"]))
