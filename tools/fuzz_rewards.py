"""Coverage-guided fuzzing of the reward parsers: python tools/fuzz_rewards.py [-runs=N] [-max_total_time=SECONDS]

Needs `pip install atheris==3.0.0`; the options are libFuzzer's. Every input is a sequence of pieces that parsers
stumble over and of free text, and has to satisfy tests/reward_properties.py. Ends at the first failure, with the input.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["megatron_srpo.rewards"]):
    from tests import reward_properties as properties


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    parts = []
    while provider.remaining_bytes():
        if provider.ConsumeBool():
            parts.append(provider.PickValueInList(list(properties.PIECES)))
        else:
            parts.append(provider.ConsumeUnicode(8))
    properties.check_all("".join(parts))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
