"""The mailbox between the driver and the ranks: who may end the job."""

import asyncio

from orchestration.pretrain_rank import Control


def test_ranks_that_were_replaced_by_ranks_of_the_same_driver_do_not_end_the_job():
    async def tell() -> tuple[str | None, str | None]:
        control = Control()
        await control.tell("group", "first")
        await control.tell("group", "second")
        await control.tell("replaced", ("first", "continued by the second"))
        old = (await control.drain()).user_error
        await control.tell("replaced", ("second", "continued by another command"))
        return old, (await control.drain()).user_error

    assert asyncio.run(tell()) == (None, "continued by another command")
