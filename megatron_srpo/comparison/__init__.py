"""One model computed by transformers, Megatron and vLLM: do they agree, and if not, from which layer on?

trace.py      what one of them computed on one prompt; two of them compared
reference.py  transformers
megatron.py   Megatron, at any layout (a rank's part; the driver gets the whole)
engine.py     vLLM, in a process of its own
"""
