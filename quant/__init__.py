"""Number formats: float32 rows -> bytes -> float32 rows. No files, no network, no model names."""
