"""Fine-tuning of causal language models with adapters, for `recipes.finetune_text`."""
