"""Model families, one file each, by publisher where there are several; convert/architectures/__init__.py lists them."""
