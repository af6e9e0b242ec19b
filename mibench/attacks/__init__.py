"""Attacks: how a curious server rebuilds the image from what it received."""
