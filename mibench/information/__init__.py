"""What the shares tell of the image, whatever the attack: one measure a file."""
