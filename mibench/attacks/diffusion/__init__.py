"""Diffusion attacks: a denoising prior and one guided sampler for all variants."""
