"""A trained model in other libraries: transformers, sentence-transformers, mteb, and the hub."""
