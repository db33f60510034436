"""What is done with files: containers, sizes, hashes, atomic writes, threads. Knows no model and no variant."""
