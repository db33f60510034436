"""Reads back what was written: listings, hashes, every byte against the source."""
