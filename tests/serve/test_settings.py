"""Settings: command line over NIM_PASSTHROUGH_ARGS over environment over file over defaults."""

import pytest

from opennemo.errors import InvalidRequest
from opennemo.model.formats import FORMATS
from opennemo.model.quantization import QuantizedLinear
from opennemo.serve.auth import Limits, hash_key, read_clients
from opennemo.serve.loading import load_model
from opennemo.serve.settings import read_settings


def test_precedence(monkeypatch, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmodel = "file"\nmax_num_seqs = 7\n')
    monkeypatch.setenv("OPENNEMO_CONFIG", str(file))
    assert read_settings([]).port == 1
    monkeypatch.setenv("NIM_SERVER_PORT", "2")
    monkeypatch.setenv("NIM_SERVED_MODEL_NAME", "a,b")
    assert read_settings([]).port == 2
    monkeypatch.setenv("OPENNEMO_PORT", "3")
    assert read_settings([]).port == 3
    monkeypatch.setenv("NIM_PASSTHROUGH_ARGS", "--port 4 --max-model-len 99")
    assert read_settings([]).port == 4
    settings = read_settings(["mine", "--port", "5", "--api-key", "k" * 9, "--api-key", "l" * 9])
    assert (settings.port, settings.model, settings.max_num_seqs) == (5, "mine", 7)
    assert settings.max_model_len == 99 and settings.served_model_name == ["a", "b"]
    assert settings.api_key == ["k" * 9, "l" * 9] and settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port: .*65535"),
        (["--host", "0.0.0.0"], "needs --api-key, or --insecure"),
        (["--api-key", "short"], "at least 8"),
        (["--nonsense"], "--nonsense"),
        (["--config", "/no/such.toml"], "does not exist"),
        (["--dtype", "int3"], "--dtype"),
        (["--tool-call-parser", "hermes"], "tool-call-parser"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_settings(arguments)
    assert "\n" not in str(caught.value)


def test_listening_elsewhere_needs_a_key_or_courage():
    assert read_settings(["--host", "0.0.0.0", "--insecure"]).host == "0.0.0.0"
    assert read_settings(["--host", "0.0.0.0", "--api-key", "x" * 10]).api_key


def test_key_files_hold_hashes_and_limits(tmp_path):
    file = tmp_path / "keys"
    digest = hash_key("secret").hex()
    file.write_text(f"# comment\nalice {digest} requests_per_minute=5\nbob {digest.upper()}\n")
    alice, bob = read_clients([], file, Limits(max_concurrent=3))
    assert alice.limits == Limits(requests_per_minute=5, max_concurrent=3) and alice.name == "alice"
    assert bob.limits == Limits(max_concurrent=3) and bob.digest == hash_key("secret")
    for line in ("eve", f"eve {digest[:-1]}", f"eve {digest} speed=5", f"eve {digest} x"):
        file.write_text(line)
        with pytest.raises(InvalidRequest, match="line 1"):
            read_clients([], file, Limits())


def test_weights_are_rounded_as_they_are_loaded(folder):
    with load_model(read_settings([str(folder), "--quantization", "fp8"])) as llm:
        modules = dict(llm.engine.runner.model.named_modules())
        layers = {n: m for n, m in modules.items() if n.endswith((".wq", ".w2"))}
        assert layers
        for layer in layers.values():
            assert isinstance(layer, QuantizedLinear) and layer.format == FORMATS["fp8"]
