"""Before any test file imports transformers, the import hook for torchaudio has to stand."""

import shards  # noqa: F401
