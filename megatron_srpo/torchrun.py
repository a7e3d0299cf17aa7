"""The command `python -m megatron_srpo.torchrun`; see run/torchrun.py."""

import sys

from megatron_srpo.run.torchrun import main

if __name__ == "__main__":
    sys.exit(main())
