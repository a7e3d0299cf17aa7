"""The pretend cluster, started once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why_not():
        pytest.skip(why_not())
    # In /tmp, for a short path: the munge socket lies in it.
    place = tempfile.TemporaryDirectory(prefix="srpo-slurm-", dir="/tmp", ignore_cleanup_errors=True)
    with place as folder, running(Path(folder)) as cluster:
        yield cluster
