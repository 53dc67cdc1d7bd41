"""A Ray for this process alone: on loopback, closed to others. What it is for is not known here."""

import os
import secrets
import sys


def keep_ray_here() -> None:
    """Set what Ray reads as it is imported; where that has happened, it is left as it is.

    A process that may talk to Ray may run code, so Ray gets an address of this host alone, even on
    Linux, and a token that no other process knows. No usage is reported to its makers.
    """
    if "ray" not in sys.modules:
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
