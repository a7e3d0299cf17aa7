"""The command `python -m megatron_srpo convert-megatron-to-hf`, as a script of the checkout."""

from megatron_srpo.commands.convert_megatron_to_hf import main

if __name__ == "__main__":
    raise SystemExit(main())
