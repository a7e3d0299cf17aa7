"""The limit of open files, of which a job on many ranks needs more than the usual 1,024."""

from __future__ import annotations

import resource

from megatron_srpo.core.errors import UserError

FILES = 512  # shared libraries' files, data, logs, NCCL's sockets, engine servers
MESHES = 2  # gloo groups over all ranks: the control group, and that of a colocated vLLM engine
HIGHEST = 2**16  # more would slow the start of every helper process, which closes what it inherits


def raise_limit() -> int:
    """Raise the soft limit of open files as far as the hard limit allows, up to HIGHEST, and return it. Processes that
    are started later inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = HIGHEST if hard == resource.RLIM_INFINITY else min(hard, HIGHEST)
    if soft == resource.RLIM_INFINITY or soft >= possible:
        return HIGHEST if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return possible


def allow_open_files(ranks: int) -> None:
    """Raise the limit. Raises UserError if a job of `ranks` ranks needs more than the machine allows.

    gloo connects every pair of ranks of a group, and each connection is an open file.
    """
    allowed, needed = raise_limit(), MESHES * ranks + FILES
    if allowed < needed:
        raise UserError(
            f"a rank of a job with {ranks} ranks needs about {needed:,} open files, and this machine allows "
            f"{allowed:,}: raise the hard limit (ulimit -Hn; under Slurm, LimitNOFILE of slurmd), or use fewer ranks"
        )
