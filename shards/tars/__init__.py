"""Tars that stock `webdataset` writes: their members, their samples, and an index over tars as they are."""
