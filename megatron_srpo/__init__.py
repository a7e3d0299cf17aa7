"""SRPO (sample-routed policy optimization) on Megatron Core and vLLM."""

__version__ = "0.1.0"
