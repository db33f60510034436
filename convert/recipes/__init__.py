"""The variants, and which tensor gets which format in each."""
