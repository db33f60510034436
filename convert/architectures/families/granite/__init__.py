"""The families of IBM."""
