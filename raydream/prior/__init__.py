"""Assets, canonical coordinate maps and the priors trained on them."""
