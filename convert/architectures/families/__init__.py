"""Model families, one file each; convert/architectures/__init__.py lists them."""
