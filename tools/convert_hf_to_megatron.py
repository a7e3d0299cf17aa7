"""The command `python -m megatron_srpo convert-hf-to-megatron`, as a script of the checkout."""

from megatron_srpo.commands.convert_hf_to_megatron import main

if __name__ == "__main__":
    raise SystemExit(main())
