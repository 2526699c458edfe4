"""What is minimised, as pure functions of tensors: SIC (contrastive), SIM (matching) and CMD (denoising).

They know nothing of ranks: their inputs hold what was gathered. Each loss is a mean over this rank's rows, so that the
mean over ranks is the mean over the global batch, and is computed in float32 whatever the precision of the model.
"""
