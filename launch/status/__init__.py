"""The state of runs: from their folders and from SLURM, followed live or shown as tables."""
