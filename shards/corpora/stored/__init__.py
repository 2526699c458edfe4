"""Corpora whose pictures and audio files are inside other files: tars, parquet files."""
