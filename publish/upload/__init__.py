"""Uploads: what is there already, what goes, what the Hub takes."""
