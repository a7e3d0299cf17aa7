"""`python -m megatron_srpo`. The guard matters: saving a checkpoint starts helper processes that import this module."""

import sys

if __name__ == "__main__":
    from megatron_srpo.entry import main

    sys.exit(main())
