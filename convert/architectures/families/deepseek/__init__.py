"""Families with the multi-head latent attention of DeepSeek."""
