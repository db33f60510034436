"""A model on disk as float tensors, and its forward pass, one layer at a time."""
