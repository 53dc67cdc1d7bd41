"""A Ray for this process only: on loopback, closed to others, and quiet.

It changes the environment and the levels of Ray's loggers, and does not know what Ray is for.
"""

import logging
import os
import secrets
import sys
from typing import Any


def keep_ray_here() -> None:
    """Set what Ray reads when it is imported; if that has happened, change nothing.

    A process that may talk to Ray may run code, so Ray gets an address of this host alone, even on
    Linux, and a token that no other process knows. No usage is reported to its makers.
    """
    if "ray" not in sys.modules:
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def quiet_ray_data() -> Any:
    """Ray Data's settings, with its bars off and its logs reduced to errors."""
    import ray.data  # pyright: ignore[reportMissingImports]

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return context
