"""The engines that run the files: llama.cpp, transformers, vLLM. Each in a process of its own, behind one interface."""
