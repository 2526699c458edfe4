"""The retrieval model: encoders, fusion encoder, denoiser, processor."""
