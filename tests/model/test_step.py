"""The fastest step is taken, and PyTorch's where it is missing."""

from pathlib import Path

import pytest

from opennemo.kernels import build, cpu
from opennemo.model.step import compile_step
from opennemo.model.torch_step import TorchStep
from tests.model.test_cpu_step import Requests, model


def test_without_a_compiler_pytorch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # A new name for the same instructions: a kernel that was loaded stays loaded.
    monkeypatch.setattr(cpu, "available_instructions", lambda: ["new"])
    monkeypatch.setitem(build.INSTRUCTIONS, "new", build.INSTRUCTIONS["portable"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    net = model("odd")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        step = compile_step(net)
    assert isinstance(step, TorchStep)
    assert Requests(net.config, [5]).whole(step)[0].isfinite().all()


def test_pytorch_computes_what_has_no_kernels():
    net = model("odd")
    assert isinstance(compile_step(net, kv_format="fp16"), TorchStep)
    assert isinstance(compile_step(net.half()), TorchStep)
