"""Train, evaluate and use speech-image retrieval models."""

import shards  # noqa: F401  sets its torchaudio import hook, which must precede the import of transformers
