"""The Hugging Face Hub: repositories to read from and to write to, and what its client raises."""
