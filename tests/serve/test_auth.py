"""Keys and their limits."""

import pytest

from opennemo.errors import InvalidRequest
from opennemo.serve.auth import KeyLimits, hash_key, read_clients


def test_key_files_hold_hashes_and_limits(tmp_path):
    file = tmp_path / "keys"
    digest = hash_key("secret").hex()
    file.write_text(f"# comment\nalice {digest} requests_per_minute=5\nbob {digest.upper()}\n")
    alice, bob = read_clients([], file, KeyLimits(max_concurrent=3))
    assert alice.name == "alice"
    assert alice.limits == KeyLimits(requests_per_minute=5, max_concurrent=3)
    assert bob.limits == KeyLimits(max_concurrent=3) and bob.digest == hash_key("secret")
    for line in ("eve", f"eve {digest[:-1]}", f"eve {digest} speed=5", f"eve {digest} x"):
        file.write_text(line)
        with pytest.raises(InvalidRequest, match="line 1"):
            read_clients([], file, KeyLimits())
