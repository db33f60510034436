"""From headers and recipes to addresses: every byte of every output, before the first weight is read."""
