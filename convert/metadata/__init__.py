"""Every key of a GGUF file: tokenizer, chat template, model card."""
