"""Checkpoints and exports of a run: atomic, asynchronous, read back on any number of ranks."""
