"""What bounded_http.py changes in uvicorn is as it was when that file was written."""

import hashlib
import inspect

import pytest

pytest.importorskip("httptools")
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SOURCES = {
    "send_400_response": "ae5a4a37",
    "connection_made": "6efb565f",
    "connection_lost": "c91a4c9b",
    "_unset_keepalive_if_required": "00a6a4e4",
    "on_message_begin": "96d377fd",
    "on_headers_complete": "1ea8589a",
    "data_received": "010a7ae5",
    "timeout_keep_alive_handler": "8b53bf5f",
    "pause_writing": "17a8fd21",
    "resume_writing": "7844bbaa",
    "on_response_complete": "64e254f2",
}


@pytest.mark.parametrize("name", SOURCES)
def test_methods_that_are_changed_or_called_are_those_that_were_read(name):
    source = inspect.getsource(getattr(HttpToolsProtocol, name))
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    assert digest == SOURCES[name], f"uvicorn changed {name}: read bounded_http.py against it"


def test_attributes_that_are_read_are_there():
    made = inspect.getsource(HttpToolsProtocol.__init__)
    for name in (
        "transport",
        "cycle",
        "flow",
        "loop",
        "timeout_keep_alive",
        "connections",
        "client",
    ):
        assert f"self.{name}" in made
    assert "self.limit_concurrency = config.limit_concurrency" in made
    assert "read_paused" in inspect.getsource(FlowControl)
