"""Settings: command line over NIM_PASSTHROUGH_ARGS over environment over file over defaults."""

import pytest

from opennemo.errors import InvalidRequest
from opennemo.serve.settings import read_settings, without_effect


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
        (["--config", "/no/such.toml"], "--config /no/such.toml: No such file"),
        (["--dtype", "int3"], "--dtype"),
        (["--tool-call-parser", "hermes"], "tool-call-parser"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--log-format", "xml"], "--log-format"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_settings(arguments)
    assert "\n" not in str(caught.value)


def test_listening_elsewhere_needs_a_key_or_courage():
    assert read_settings(["--host", "0.0.0.0", "--insecure"]).host == "0.0.0.0"
    assert read_settings(["--host", "0.0.0.0", "--api-key", "x" * 10]).api_key


@pytest.mark.parametrize(
    ("level", "ours"),
    [
        ("DEFAULT", "info"), ("TRACE", "debug"), ("DEBUG", "debug"), ("INFO", "info"),
        ("WARNING", "warning"), ("ERROR", "error"), ("CRITICAL", "critical"),
    ],
)  # fmt: skip
def test_every_log_level_of_nims(monkeypatch, level, ours):
    monkeypatch.setenv("NIM_LOG_LEVEL", level)
    assert read_settings([]).log_level == ours


def test_nims_choice_of_log_lines(monkeypatch):
    assert read_settings([]).log_format == "auto"
    for value, ours in (("true", "json"), ("1", "json"), ("False", "text")):
        monkeypatch.setenv("NIM_JSONL_LOGGING", value)
        assert read_settings([]).log_format == ours
        assert read_settings([]).is_talking == (ours == "text")


def test_tls_that_nim_would_ask_clients_for_is_refused(monkeypatch):
    monkeypatch.setenv("NIM_SSL_MODE", "TLS")
    assert "NIM_SSL_MODE" not in without_effect()
    monkeypatch.setenv("NIM_SSL_MODE", "MTLS")
    with pytest.raises(InvalidRequest, match="NIM_SSL_MODE is MTLS"):
        read_settings([])


def test_nims_values_start_and_what_has_no_effect_is_named(monkeypatch):
    monkeypatch.setenv("NIM_MODEL_PATH", "hf://mistralai/Mistral-Nemo-Instruct-2407")
    monkeypatch.setenv("NIM_DRAFT_MODEL_PATH", "hf://mistralai/small")
    monkeypatch.setenv("NIM_TENSOR_PARALLEL_SIZE", "2")
    monkeypatch.setenv("NIM_HEALTH_PORT", "8001")
    monkeypatch.setenv(
        "NIM_PASSTHROUGH_ARGS",
        "--gpu-memory-utilization 0.9 --max-num-seqs 7 --no-enable-chunked-prefill --swap-space=4",
    )
    settings = read_settings([])
    assert settings.model == "mistralai/Mistral-Nemo-Instruct-2407"
    assert settings.draft == "mistralai/small"
    assert (settings.tensor_parallel_size, settings.max_num_seqs) == (2, 7)
    flags = ("--gpu-memory-utilization", "--no-enable-chunked-prefill", "--swap-space=4")
    named = without_effect()
    assert named == ["NIM_HEALTH_PORT", *(f"NIM_PASSTHROUGH_ARGS: {flag}" for flag in flags)]
    for wrong in ("--max-num-seq 7", "--pipeline-parallel-size 2", "'"):
        monkeypatch.setenv("NIM_PASSTHROUGH_ARGS", wrong)
        with pytest.raises(InvalidRequest):
            read_settings([])
