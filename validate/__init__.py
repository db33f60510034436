"""Trusts only the files that were written: reads them back and compares."""
