"""Everything that imports Megatron Core. The rest of the package uses `Policy`."""
