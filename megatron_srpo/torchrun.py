"""The command `python -m megatron_srpo.torchrun`; see run/torchrun.py."""

import sys

if __name__ == "__main__":
    from megatron_srpo.entry import torchrun

    sys.exit(torchrun())
