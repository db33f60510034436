"""The fast encoders behind the formats."""
