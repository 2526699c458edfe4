"""Evaluation: encode a split, rank, re-rank, and show examples of what was retrieved."""
