"""GGML block formats, a file per family."""
