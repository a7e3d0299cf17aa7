"""The command `python -m megatron_srpo compare-logits`, as a script of the checkout."""

from megatron_srpo.commands.compare_logits import main

if __name__ == "__main__":
    raise SystemExit(main())
