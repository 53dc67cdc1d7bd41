"""Models at servers: answers, retries, and errors in one line."""

import pytest

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals.endpoint import RemoteModel
from tests.evals.conftest import serving

QUESTION = [{"role": "user", "content": "Hello?"}]


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(OpenNemoError, match=r"127\.0\.0\.1:9"):
        RemoteModel.connect("http://127.0.0.1:9/v1", None, "none")


def test_a_busy_server_is_asked_again_and_a_refusal_is_not():
    statuses = [503, 429]

    def busy(body: dict) -> str | int:
        return statuses.pop() if statuses else "yes"

    with serving(busy) as (url, bodies):
        model = RemoteModel.connect(url, None, "none")
        assert (model.name, model.ask(QUESTION)["content"]) == ("judge", "yes")
        assert len(bodies) == 3
    with serving(lambda body: 422) as (url, bodies):
        with pytest.raises(OpenNemoError, match=r"HTTP 422: .*as asked") as error:
            RemoteModel(url, "m").ask(QUESTION)
        assert len(bodies) == 1 and "\n" not in str(error.value)


def test_without_a_grammar_the_tokenizer_is_needed():
    with pytest.raises(InvalidRequest, match="--tokenizer"):
        RemoteModel("http://127.0.0.1:9/v1", "m").ask(QUESTION, grammar=False)
