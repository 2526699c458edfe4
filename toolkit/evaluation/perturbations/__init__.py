"""Perturbations of speech and images at given levels, to measure robustness with."""
