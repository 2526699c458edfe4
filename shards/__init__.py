"""Shards: speech-image pairs written once as WebDataset tars, read back in an exact order. Independent of models."""

from shards.media import torchaudio_on_cpu

torchaudio_on_cpu.install()
