"""The Hugging Face Hub as a source: headers by range, shards through a bounded folder."""
