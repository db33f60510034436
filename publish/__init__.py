"""Give variants to the world: model cards, uploads to the Hugging Face Hub, a whole release from one file."""
