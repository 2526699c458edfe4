"""Launching: one command that runs the whole job, on SLURM or on this machine. Only this package knows submitit."""
