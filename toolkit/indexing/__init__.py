"""Use of a trained model: embeddings of files, an index on disk, and search by voice or by image."""
