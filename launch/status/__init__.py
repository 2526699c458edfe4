"""State of runs, from their folders and from SLURM: followed in the terminal or shown as tables."""
