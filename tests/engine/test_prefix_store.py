"""Prefixes on the disk: found after a restart, by their owners, never trusted blindly."""

import logging
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.prefix_store import fingerprint
from opennemo.errors import InvalidRequest
from opennemo.model.transformer import PRESETS, Transformer
from tests.engine.conftest import tiny_model
from tests.engine.stepping import prompts, run

EOS = 7
PARAMS = SamplingParams(max_tokens=20, logprobs=2, temperature=0.7, seed=3)
PROMPT = prompts(1, shared=100)[0]
N_PAGES = (len(PROMPT) - 1) // 16


@contextmanager
def engine_over(folder: Path | None, model: Transformer | None = None, **config):
    """An engine as after a start of the program; at the end of the block all is written."""
    config = EngineConfig(cache_dir=folder, **config)
    engine = LocalEngine(deepcopy(model or tiny_model()), [EOS], config)
    yield engine
    engine.close()


def answer(engine: LocalEngine, prompt=PROMPT, **kwargs) -> tuple[list, int]:
    """Tokens with their log-probabilities, and how many tokens of the prompt were cached."""
    events = run(engine, [(prompt, PARAMS)], **kwargs)[0]
    assert events[-1].finish_reason in ("stop", "length"), events[-1].error
    return [(e.id, e.logprobs) for e in events], events[-1].n_cached_tokens


def pages_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "fp8"])
def test_after_a_restart_a_prompt_is_there_and_its_logits_are_the_same(tmp_path, kv):
    formats = {"kv_format": kv, "kv_scale": 2**-7 if kv == "fp8" else None}
    with engine_over(None, **formats) as engine:
        want, _ = answer(engine)
    with engine_over(tmp_path / "a" / "b", **formats) as engine:
        assert answer(engine) == (want, 0)
    with engine_over(tmp_path / "a" / "b", **formats) as engine:
        assert answer(engine) == (want, 16 * N_PAGES)
        longer = PROMPT + [id for id, _ in want] + [5] * 9  # the next turn of a conversation
        assert answer(engine, longer)[1] >= len(PROMPT) // 16 * 16 + 16
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "a" / "b").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_draft_model_s_pages_come_back_with_the_model_s(tmp_path):
    n_kept = []
    for _ in range(2):
        config = EngineConfig(cache_dir=tmp_path, n_draft_tokens=3)
        engine = LocalEngine(tiny_model(), [EOS], config, draft=tiny_model())
        engine_answer = answer(engine)
        n_kept.append(engine.stats()["draft_tokens_kept"])
        engine.close()
    assert engine_answer[1] == 16 * N_PAGES and n_kept[0] == n_kept[1] > 0


def test_nothing_is_shared_with_other_keys_models_formats_and_folders(tmp_path):
    with engine_over(tmp_path) as engine:
        answer(engine, salt=b"alice/")
    other = tiny_model()
    other.layers[1].feed_forward.w2.weight[3, 5] += 1e-3  # type: ignore
    assert fingerprint(other) != fingerprint(tiny_model()) == fingerprint(tiny_model())
    with engine_over(tmp_path) as engine:
        assert answer(engine, salt=b"bob/")[1] == 0
        assert answer(engine, salt=b"")[1] == 0
    changes: list[dict] = [{"model": other}, {"kv_format": "int8"}, {"page_size": 8}]
    for changed in changes:
        with engine_over(tmp_path, **changed) as engine:
            assert answer(engine, salt=b"alice/")[1] == 0
    (tmp_path / "other").mkdir()
    for path in pages_in(tmp_path):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    with engine_over(tmp_path / "other") as engine:
        assert answer(engine, salt=b"alice/")[1] == 0
    with engine_over(tmp_path) as engine:
        assert answer(engine, salt=b"alice/")[1] == 16 * N_PAGES


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    ],
    ids=["short", "empty", "long", "magic", "values", "tokens", "checksum"],
)
def test_damaged_files_are_removed_with_one_line_each_and_computed(tmp_path, caplog, damage):
    with engine_over(tmp_path) as engine:
        want, _ = answer(engine)
    paths = pages_in(tmp_path)
    for path in paths:
        path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING), engine_over(tmp_path) as engine:
        assert answer(engine) == (want, 0)
    assert [r.getMessage().count("it is removed") for r in caplog.records] == [1]
    with engine_over(tmp_path) as engine:
        assert answer(engine)[0] == want


def test_a_page_under_another_s_name_is_not_believed(tmp_path):
    with engine_over(tmp_path) as engine:
        want, _ = answer(engine)
        answer(engine, [1] * 100)
    names = pages_in(tmp_path)
    content = [path.read_bytes() for path in names]
    for path, data in zip(names, content[1:] + content[:1], strict=True):
        path.write_bytes(data)
    with engine_over(tmp_path) as engine:
        assert answer(engine) == (want, 0)


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path):
    with engine_over(tmp_path) as engine:
        answer(engine)
    size, n = pages_in(tmp_path)[0].stat().st_size, len(pages_in(tmp_path))
    bound = size * (n + 3)
    with engine_over(tmp_path, max_cache_size=bound) as engine:
        for i in range(6):
            answer(engine, [i] * 40)
            assert answer(engine)[1] == 16 * N_PAGES  # asked for again and again
    assert sum(path.stat().st_size for path in pages_in(tmp_path)) <= bound
    with engine_over(tmp_path, max_cache_size=bound) as engine:
        assert answer(engine)[1] >= 16 * (N_PAGES - 1)
    with engine_over(tmp_path, max_cache_size=3 * size):
        pass
    assert len(pages_in(tmp_path)) <= 3
    with engine_over(tmp_path, max_cache_size=10) as engine:
        answer(engine, [9] * 40)
    assert not pages_in(tmp_path)


def test_a_reset_removes_files_and_sleep_does_not(tmp_path):
    with engine_over(tmp_path) as engine:
        answer(engine)
    with engine_over(tmp_path) as engine:
        engine.start()
        engine.sleep()
        engine.wake()
    assert pages_in(tmp_path)
    with engine_over(tmp_path) as engine:
        engine.reset_prefix_cache()
        engine.step()
    assert not pages_in(tmp_path)


def test_a_full_disk_breaks_no_answer_and_is_said_once(tmp_path, caplog):
    with engine_over(None) as engine:
        want, _ = answer(engine)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING), engine_over(tmp_path) as engine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # Python ignores the signal
        try:
            assert answer(engine)[0] == want
            engine.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r.getMessage().count("answers come without it") for r in caplog.records] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


WRITE_ON = textwrap.dedent("""
    import sys
    from pathlib import Path
    from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
    from tests.engine.conftest import tiny_model
    engine = LocalEngine(tiny_model(), [7], EngineConfig(cache_dir=Path(sys.argv[1])))
    for i in range(10_000):
        ids = [i % 320, i // 320] + [5] * 100
        engine.submit(ids, SamplingParams(max_tokens=2), lambda token: None)
        while engine.step():
            pass
        if i == 20:
            print("going", flush=True)
""")


def test_a_kill_while_writing_leaves_nothing_that_is_half_read(tmp_path, caplog):
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE_ON, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout and process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    (tmp_path / f".{'0' * 128}.kv.{process.pid}.partial").write_bytes(b"half")
    n = len(pages_in(tmp_path))
    with caplog.at_level(logging.WARNING), engine_over(tmp_path) as engine:
        assert answer(engine, [0, 0] + [5] * 100)[1] == 96
    assert not caplog.records and n > 6
    assert not list(tmp_path.glob(".*"))
    assert len(pages_in(tmp_path)) >= n


def test_a_damaged_secret_makes_a_new_one(tmp_path, caplog):
    with engine_over(tmp_path) as engine:
        want, _ = answer(engine)
    (tmp_path / "secret").write_bytes(b"short")
    with caplog.at_level(logging.WARNING), engine_over(tmp_path) as engine:
        assert answer(engine) == (want, 0)
    assert len(caplog.records) == 1
    with engine_over(tmp_path) as engine:
        assert answer(engine) == (want, 16 * N_PAGES)


def test_settings_that_cannot_be_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"cache folder .*file"):
        LocalEngine(tiny_model(), [], EngineConfig(cache_dir=tmp_path / "file"))
    with pytest.raises(InvalidRequest, match="prefix_caching"):
        LocalEngine(tiny_model(), [], EngineConfig(cache_dir=tmp_path, prefix_caching=False))


def test_the_fingerprint_sees_every_weight():
    torch.manual_seed(0)
    model = Transformer(PRESETS["tiny"])
    seen = {fingerprint(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[-1] += 0.5
            seen.add(fingerprint(model))
        weight = model.tok_embeddings.weight
        weight.copy_(weight.flip(0))  # the same numbers in other places
        seen.add(fingerprint(model))
    assert len(seen) == 2 + len(list(model.parameters()))
