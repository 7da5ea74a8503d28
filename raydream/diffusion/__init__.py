"""Diffusion models as scores: pure guidance maths, denoisers, text, latents, LoRA."""
