"""Before a submission: checks, limits of the cluster, memory and disk estimates, and the dry run."""
