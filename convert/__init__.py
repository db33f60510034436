"""Checkpoint in, variants out: plan every byte, then stream."""
