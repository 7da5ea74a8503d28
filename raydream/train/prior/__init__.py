"""Training a small text-to-image prior of one's own: VAE, then text encoder and UNet."""
