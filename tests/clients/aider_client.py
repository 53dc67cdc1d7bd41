# type: ignore  (runs where other versions of its packages are installed)
"""aider, which edits files by what a model writes: python aider_client.py URL KEY MODEL."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key, model = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "hello.py").write_text('print("Hello")\n')
    for more in (["--stream"], ["--no-stream"]):
        command = [
            str(Path(sys.executable).parent / "aider"), "--model", f"openai/{model}",
            "--openai-api-base", f"{url}/v1", "--openai-api-key", key, "--no-git", "--yes-always",
            "--no-check-update", "--no-analytics", "--no-show-model-warnings", "--no-pretty",
            "--no-auto-lint", "--no-suggest-shell-commands", "--no-detect-urls",
            "--map-tokens", "0", "--edit-format", "ask", *more,
            "--message", "What does this file print?", "hello.py",
        ]  # fmt: skip
        env = {**os.environ, "HOME": folder, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=env, timeout=500,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0 and "Tokens:" in said, said[-3000:]
        # Without a network it says that it could not fetch prices, which is no failure.
        assert "litellm." not in said and "Traceback" not in said, said[-3000:]
print("ok: a conversation about a file, streamed and whole")
