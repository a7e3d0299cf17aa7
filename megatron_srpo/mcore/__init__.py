"""Everything that touches Megatron Core. `Policy` is what the rest of the package sees."""
