"""Any checkpoint, GGUF or compressed-tensors folder as float tensors by Hugging Face name."""
