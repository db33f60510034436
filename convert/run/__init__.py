"""Runs a plan: reads chunks, encodes them for every variant, writes them at their addresses."""
