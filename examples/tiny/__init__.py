"""What the tiny examples share: a character tokenizer, a supervised warm start, sampling, and starting the trainer."""
