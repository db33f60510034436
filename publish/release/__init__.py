"""A whole release from one file, in stages."""
