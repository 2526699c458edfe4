"""What a run records: losses, throughput, FLOPs, profiles, the report, and Weights & Biases."""
