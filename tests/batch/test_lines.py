"""Lines give way to live requests."""

import asyncio

from opennemo.batch import lines as batch


def test_live_requests_take_the_places_of_lines():
    async def begun(n_live: int) -> int:
        slots = batch.Slots(4, lambda: n_live)
        tasks = [asyncio.create_task(slots.take()) for _ in range(10)]
        await asyncio.sleep(0.05)
        n_taken = slots.n_taken
        slots.give()
        await asyncio.sleep(0.05)
        assert slots.n_taken == n_taken  # the next one came
        for task in tasks:
            task.cancel()
        return n_taken

    assert [asyncio.run(begun(n_live)) for n_live in (0, 1, 3, 9)] == [4, 3, 1, 1]
