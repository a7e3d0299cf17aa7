"""The project on a Slurm cluster: docs/slurm.md.

`launch` runs on the batch host, with `job`, `commands`, `supervisor` and `attempts`, and needs a Python alone, without
packages: the job's own environment may be a container that only srun enters. `settings`, `health`, `node`, `serve` and
`plan` run in that environment.
"""
