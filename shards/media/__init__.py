"""Audio and image files: what they are, whether they are whole, and how they are decoded and stored."""
