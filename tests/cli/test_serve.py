"""`opennemo serve` as a person starts it: a line to click on, logs to read, errors at once."""

import json
import signal
import socket
import subprocess
import sys

import httpx2

from tests.cli.conftest import Terminal, needs_terminals, opennemo


@needs_terminals
def test_a_terminal_gets_an_address_to_click_on_and_no_json(folder, tmp_path):
    terminal = Terminal("serve", str(folder), "--port", "0", "--log-level", "info", cwd=tmp_path)
    try:
        terminal.expect("OpenNemo: loading")
        before = terminal.expect("OpenNemo: http://127.0.0.1:")
        port = int(terminal.expect(" has tiny, 1,024 tokens of context; Ctrl-C ends it"))
        assert "{" not in before and " info: ready  names=['tiny']" in before
        assert httpx2.get(f"http://127.0.0.1:{port}/health").is_success
        httpx2.get(f"http://127.0.0.1:{port}/%1b[2J")
        shown = terminal.expect("status=404")
        assert "\x1b" not in shown
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


def test_a_pipe_gets_one_json_object_a_line(folder, tmp_path):
    command = [sys.executable, "-m", "opennemo.cli", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        events = []
        while "ready" not in events:
            line = process.stderr.readline()
            events.append(json.loads(line)["event"])
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_what_cannot_be_listened_on_is_refused_before_the_model_loads(tmp_path):
    (tmp_path / "pem").write_text("no certificate")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (["--port", str(port)], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            (["--ssl-certfile", "none.pem"], "--ssl-certfile none.pem: No such file"),
            (["--ssl-certfile", "pem", "--ssl-keyfile", "key"], "--ssl-certfile pem with key: "),
            (["--ssl-keyfile", "key"], "--ssl-keyfile needs --ssl-certfile"),
        ):
            # There is no such model either, which would be said later.
            done = opennemo("serve", "no/such/folder.gguf", *arguments, cwd=tmp_path)
            assert done.returncode == 2
            *_, last = done.stderr.decode().splitlines()
            assert last.startswith("opennemo: ") and message in last
            assert b"Traceback" not in done.stderr
