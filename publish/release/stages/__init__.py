"""The stages of a release, a file for each."""
