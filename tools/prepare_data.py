"""The command `python -m megatron_srpo prepare-data`, as a script of the checkout."""

from megatron_srpo.commands.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
