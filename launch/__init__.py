"""Launching: one command runs a job on SLURM or on this machine. Only this package uses submitit."""
