"""The families of Mistral AI."""
