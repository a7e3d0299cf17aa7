"""The real script on a real Slurm: two pretend nodes of one rank each, tensor parallel over both."""

from __future__ import annotations

import pytest

from megatron_srpo import exit_codes
from tests.slurm.jobs import Inputs, SubmittedJob

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def eventful(cluster, inputs) -> SubmittedJob:
    """One job with everything that happens to one: asked to stop, requeued, a launcher killed, requeued, done."""
    job = SubmittedJob(cluster, inputs, "eventful", {"run.iterations": "8", "checkpoint.every": "100"})
    job.wait(lambda: len(job.iterations()) >= 2)
    job.ask_to_stop()
    job.wait(lambda: job.facts()["Restarts"] == "1")
    job.saved = job.checkpoints[-1]
    job.wait(lambda: len(job.iterations()) > job.saved)
    job.kill_launcher(1)
    job.code = job.wait_for_end()
    return job


def test_a_job_over_two_nodes_trains_to_its_end(eventful):
    assert eventful.code == exit_codes.DONE, eventful.report()
    assert eventful.iterations() == list(range(1, 9))
