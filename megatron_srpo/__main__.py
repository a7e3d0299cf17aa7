"""`python -m megatron_srpo`. The guard matters: saving a checkpoint starts helper processes that import this module."""

from megatron_srpo.cli import app

if __name__ == "__main__":
    app()
