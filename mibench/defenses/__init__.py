"""Defenses: what the client does to its features before it sends them."""
