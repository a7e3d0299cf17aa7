"""Many episodes at once, without an engine."""

from __future__ import annotations

import asyncio

from megatron_srpo.config import EnvironmentConfig
from megatron_srpo.environments import Task
from megatron_srpo.environments.pool import EnvironmentPool

ECHO = """
from megatron_srpo.environments import Environment, Step
class Echo(Environment):
    async def step(self, reply):
        return Step(done=True, reward=float(reply))
"""


def test_hundreds_of_episodes_run_at_once(tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    config = EnvironmentConfig(
        classes={"row": f"{tmp_path}/echo.py:Echo"}, processes=400, step_timeout_seconds=120.0
    )  # fmt: skip
    said = []

    async def one(pool, number):
        process = await pool.open()
        try:
            await process.start("row", Task(({"role": "user", "content": "x"},), "", {}, 0, number))
            return (await process.step(str(number))).reward
        finally:
            await process.close()

    async def all_of_them():
        pool = EnvironmentPool(config, said.append)
        try:
            return await asyncio.gather(*(one(pool, number) for number in range(400)))
        finally:
            pool.close()

    assert asyncio.run(all_of_them()) == [float(number) for number in range(400)]
    assert said == []
