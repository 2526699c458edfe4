"""Checking shards: their bytes, structure, media and duplicates, with a page of examples."""
