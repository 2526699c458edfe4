"""Train, evaluate and use speech-image retrieval models."""

import shards  # noqa: F401  its torchaudio import hook has to stand before transformers is imported
