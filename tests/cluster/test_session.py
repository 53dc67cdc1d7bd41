"""What session.py changes in Ray is as it was when that file was written."""

# Ray is an extra, which few users install.
# pyright: reportMissingImports=false
import importlib
import inspect

import pytest

from tests.servers import needs_ray


@needs_ray
def test_the_changed_function_takes_a_server_and_an_address():
    pytest.importorskip("grpc")
    replica = importlib.import_module("ray.serve._private.replica")
    bind = replica.add_port_to_grpc_server
    assert len(inspect.signature(bind).parameters) == 2
    assert "add_port_to_grpc_server(" in inspect.getsource(replica)
