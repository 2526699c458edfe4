"""Decoding and encoding of audio and image files, and checks that they are complete."""
