"""Training objectives as pure functions of tensors: SIC (contrastive), SIM (matching) and CMD (denoising).

They do not depend on rank or world size: gathered tensors are arguments. Each loss is a mean over the rows of this
rank, so that the mean over ranks is the mean over the global batch. Losses are computed in float32 for any precision of
the model.
"""
