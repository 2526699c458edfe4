"""Speech encoded in groups of like length against one padded batch: frames that are padding, frames in all, and time.

    python tests/benchmarks/padding.py [--json] [--batch B] [--batches N] [--groups G] [--repeats R] [--threads T]

Durations are log-normal with the mean and the long tail of SpokenCOCO, cut at 8 s (the reference configurations) and at
15 s. The frames are counted where they enter the first transformer layer of a trunk with the strides of HuBERT, and the
embeddings have to be those of the padded batch. Time is that of the processor in a forward pass of a group-norm trunk,
a third as wide and as deep as HuBERT-base, median of turns. Exit code 1: a bound is missed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from table import Figure, print_figures
from torch import Tensor, nn
from training import durations
from transformers import HubertConfig, HubertModel

from shards.media.audio import SAMPLE_RATE
from toolkit.config import schema as config
from toolkit.model.outputs import Encoded
from toolkit.model.speech import SpeechEncoder

CUTS = (8, 15)  # seconds


class Counted:
    """An encoder with HuBERT-base's strides and group norm that counts the frames which enter its first layer."""

    def __init__(self, width: int, layers: int) -> None:
        torch.manual_seed(0)
        trunk = HubertModel(
            HubertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=4 * width,
                conv_dim=[width // 4] * 7,
                mask_time_prob=0.0,
            )
        )
        self.encoder = SpeechEncoder(trunk, 64, "none", head_layers=0, head_heads=4, dropout=0.0).eval()
        self.frames = 0
        trunk.encoder.layers[0].register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.frames += inputs[0].shape[0] * inputs[0].shape[1]

    @torch.no_grad()
    def encode(self, waves: Tensor, lengths: list[int], groups: int) -> tuple[Encoded, int]:
        """Encode a batch in so many groups: what comes out, and the frames it took."""
        self.encoder.groups, self.frames = groups, 0
        encoded = self.encoder(self.encoder.frozen_features(waves, torch.tensor(lengths), lengths))
        return encoded, self.frames


def make_batch(seed: int, size: int, cut: float) -> tuple[Tensor, list[int]]:
    """Noise [B, T] with such durations, zero-padded, and its lengths in samples."""
    chance = np.random.default_rng(seed)
    lengths = [int(seconds * SAMPLE_RATE) for seconds in durations(chance, size, cut)]
    waves = torch.zeros(size, max(lengths))
    for row, length in zip(waves, lengths, strict=True):
        row[:length] = torch.from_numpy(0.1 * chance.standard_normal(length, np.float32))
    return waves, lengths


def count(batches: int, size: int, groups: int, cut: float) -> list[Figure]:
    """The share of padding, and all frames against those of padded batches."""
    counted = Counted(width=32, layers=1)
    real = grouped = padded = 0
    for seed in range(batches):
        batch = make_batch(seed, size, cut)
        (ours, frames), (theirs, more) = (counted.encode(*batch, number) for number in (groups, 1))
        error = float((ours.embedding - theirs.embedding).abs().max())
        if not error < 1e-4:
            raise SystemExit(f"the groups' embeddings differ from those of the padded batch by {error:.1e}")
        real, grouped, padded = real + int(ours.mask.sum()), grouped + frames, padded + more
    what = f"{batches} batches of {size}, captions cut at {cut} s, {groups} groups"
    share = f"frames of padding in all that are encoded, in one padded batch {1 - real / padded:.1%}: {what}"
    return [
        Figure(f"padding_{cut}s", grouped - real, grouped, "frames", 1 - real / grouped, share, at_most=0.10),
        Figure(f"frames_{cut}s", grouped, padded, "frames", grouped / padded, f"frames encoded: {what}", at_most=0.65),
    ]


def seconds(size: int, groups: int, repeats: int, cut: float) -> Figure:
    """Processor time of a forward pass, the two taking turns on the same batches."""
    counted = Counted(width=256, layers=4)
    counted.encode(*make_batch(0, 2, 1.0), 1)
    times: dict[int, list[float]] = {groups: [], 1: []}
    for seed in range(repeats):
        batch = make_batch(seed, size, cut)
        for number, taken in times.items():
            begin = time.process_time()
            counted.encode(*batch, number)
            taken.append(time.process_time() - begin)
    ours, theirs = (statistics.median(taken) for taken in times.values())
    what = f"median of {repeats} forward passes, batch {size}, captions cut at {cut} s, {groups} groups"
    return Figure(f"encoding_{cut}s", ours, theirs, "s", ours / theirs, what, at_most=0.75)


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--batch", type=int, default=32, help="utterances a rank (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="to count in (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=config.Speech().groups, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = [one for cut in CUTS for one in count(options.batches, options.batch, options.groups, cut)]
    figures.append(seconds(options.batch, options.groups, options.repeats, CUTS[0]))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
