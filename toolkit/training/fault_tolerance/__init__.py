"""Signals, hangs, values that are not finite, and a run folder with one writer at a time."""
