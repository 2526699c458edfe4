"""DeepSpeed ZeRO: the engine, its settings, and a rank's partition of parameters and optimizer state."""
