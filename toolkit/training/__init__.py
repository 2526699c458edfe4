"""Training: the loop, one micro-batch, the momentum encoder, queues, and what keeps a run alive."""
