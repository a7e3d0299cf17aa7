"""`python -m megatron_srpo`. The guard matters: saving a checkpoint starts helper processes that import this module."""

import sys

from megatron_srpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
