"""Tokens, chat templates and greedy answers of a variant beside the original's."""
