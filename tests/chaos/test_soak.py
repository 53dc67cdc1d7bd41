"""A minute of eight clients (soak.py runs for an hour by hand) leaves nothing behind."""

import pytest

from tests.chaos.soak import OPTIONS, soak
from tests.servers import serving


@pytest.mark.chaos
def test_a_minute_of_eight_clients_leaves_everything_flat(folder, tmp_path):
    with serving(folder, tmp_path, *OPTIONS) as server:
        samples, statuses = soak(server, 60, n_samples=6)
        assert {sample.n_pages for sample in samples} == {0}
        assert samples[-1].n_descriptors <= samples[0].n_descriptors + 4
        # What is needed at most (threads, large bodies, grammars) has been needed by half of it.
        assert samples[-1].resident_bytes < samples[3].resident_bytes + 4 * 2**20
        assert statuses.keys() <= {200, 400, 401, 404, 405, 413, 422, 431, 503, "cut off"}, statuses
        assert not {"defect", "failed"} & {event["event"] for event in server.events()}
