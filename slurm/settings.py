"""What the batch host has to know of a configuration: python -m slurm.settings RANKS CONFIG… [--section.key VALUE …].

Runs in the job's own environment, before anything else; prints one line of JSON, or the configuration's problems with
exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_srpo.config import load_config
from megatron_srpo.core import exit_codes
from megatron_srpo.core.errors import UserError
from megatron_srpo.run.cli import check_run
from slurm.job import files_and_overrides


def main(arguments: Sequence[str]) -> int:
    ranks, *rest = arguments
    files, overrides = files_and_overrides(rest)
    os.environ["WORLD_SIZE"] = ranks
    try:
        settings = load_config(files, overrides)
        check_run(settings, train=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISTAKE
    found = {
        "output": str(Path(settings.run.output_dir).absolute()),
        "device": settings.run.device,
        "engine_ranks": settings.rollout.tensor_parallel_size,
    }
    print(json.dumps(found))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
