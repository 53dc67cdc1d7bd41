"""Shared by the chaos tests: tests/serve's tiny servers, and how much hypothesis tries."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from tests.serve.conftest import folder, running, state_dir, tiny_llm  # noqa: F401  fixtures

# No deadline of hypothesis' own, which is a clock: what hangs is caught by a generous watchdog.
SHORT = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LONG = settings(SHORT, max_examples=3000, derandomize=False)


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.chaos)])
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`fuzz(check, strategy)` calls `check` with what a strategy draws, again and again."""

    def run(check: Callable[..., None], *strategies: SearchStrategy, share: float = 1) -> None:
        profile = {"short": SHORT, "long": LONG}[request.param]
        n = max(1, int(profile.max_examples * share))
        settings(profile, max_examples=n)(given(*strategies)(check))()

    return run
