"""The command `python -m megatron_srpo.torchrun`; see run/torchrun.py."""

import sys

from megatron_srpo.core import streams

if __name__ == "__main__":
    streams.guard()  # before anything else opens a file
    from megatron_srpo.run.torchrun import main

    sys.exit(main())
