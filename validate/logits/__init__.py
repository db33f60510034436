"""What the variants compute beside the original: divergence, likelihood, error by layer and by tensor."""
