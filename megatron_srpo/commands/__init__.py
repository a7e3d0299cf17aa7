"""Commands beside the training: prepare data, convert models, compare logits, view responses. run/cli.py lists them."""

TOOLS = {  # command → what it does
    "prepare-data": "Turn data sets (verl, slime, csv, parquet, …) into the trainer's rows.",
    "convert-hf-to-megatron": "Convert a Hugging Face folder to a Megatron checkpoint.",
    "convert-megatron-to-hf": "Convert a checkpoint to a Hugging Face folder.",
    "compare-logits": "Compare a model in transformers, Megatron and vLLM.",
    "view": "Show the responses of a run, their rewards, and which loss trained them.",
}
