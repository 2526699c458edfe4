"""SLURM: the client that queries it, options of sbatch, and the requeue logic of the batch script."""
