"""One read of a BF16 Hugging Face checkpoint, every FP8 and GGUF variant of it, and proof of what was lost."""
