"""What a run records: losses, throughput, FLOPs, profiles, and Weights & Biases."""
