"""DeepSpeed ZeRO: the engine, its settings, and the parts of parameters and optimizer state that a rank holds."""
