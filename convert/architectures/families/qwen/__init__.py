"""The families of Alibaba: Qwen 2 to 3.6."""
