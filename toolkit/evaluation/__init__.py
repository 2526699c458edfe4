"""Evaluation: encode a split once, recall both ways, re-ranking, twins, and a picture of what was retrieved."""
