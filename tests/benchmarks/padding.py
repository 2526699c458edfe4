"""Speech encoded in length groups against one padded batch: share of padding, encoded frames, and time.

    python tests/benchmarks/padding.py [--json] [--batch B] [--batches N] [--groups G] [--repeats R] [--threads T]

Durations are log-normal with the mean and long tail of SpokenCOCO, truncated at 8 s (the reference configurations) and
15 s. Frames are counted at the input of the first transformer layer of a trunk with HuBERT's strides, and the
embeddings must equal those of the padded batch. Time is the processor time of a forward pass of a group-norm trunk, a
third as wide and deep as HuBERT-base; the two are measured alternately, and medians are compared. Exit code 1: a bound
is missed.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from table import Figure, build_parser, print_figures
from torch import Tensor, nn
from training import make_speech
from transformers import HubertConfig, HubertModel

from toolkit.config import schema as config
from toolkit.model.outputs import Encoded
from toolkit.model.speech import SpeechEncoder

MAX_SECONDS = (8, 15)


class FrameCountingEncoder:
    """Speech encoder with HuBERT-base's strides and group norm that counts the input frames of its first layer."""

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
        """Encode a batch in the given number of groups; return the encodings and the number of frames processed."""
        self.encoder.groups, self.frames = groups, 0
        encoded = self.encoder(self.encoder.frozen_features(waves, torch.tensor(lengths), lengths))
        return encoded, self.frames


def count_frames(batches: int, size: int, groups: int, max_seconds: float) -> list[Figure]:
    """Measure the share of padding, and the number of encoded frames against that of padded batches."""
    encoder = FrameCountingEncoder(width=32, layers=1)
    real = grouped = padded = 0
    for seed in range(batches):
        batch = make_speech(np.random.default_rng(seed), size, max_seconds)
        (ours, frames), (theirs, padded_frames) = (encoder.encode(*batch, number) for number in (groups, 1))
        error = float((ours.embedding - theirs.embedding).abs().max())
        if not error < 1e-4:
            raise SystemExit(f"the groups' embeddings differ from those of the padded batch by {error:.1e}")
        real, grouped, padded = real + int(ours.mask.sum()), grouped + frames, padded + padded_frames
    what = f"{batches} batches of {size}, captions truncated at {max_seconds} s, {groups} groups"
    share = f"share of padding in encoded frames; {1 - real / padded:.1%} in one padded batch: {what}"
    encoded = f"encoded frames, against one padded batch: {what}"
    return [
        Figure(f"padding_{max_seconds}s", grouped - real, grouped, "frames", 1 - real / grouped, share, at_most=0.10),
        Figure(f"frames_{max_seconds}s", grouped, padded, "frames", grouped / padded, encoded, at_most=0.65),
    ]


def measure_time(size: int, groups: int, repeats: int, max_seconds: float) -> Figure:
    """Measure the processor time of a forward pass with and without groups, alternately on the same batches."""
    encoder = FrameCountingEncoder(width=256, layers=4)
    encoder.encode(*make_speech(np.random.default_rng(0), 2, 1.0), 1)
    times: dict[int, list[float]] = {groups: [], 1: []}
    for seed in range(repeats):
        batch = make_speech(np.random.default_rng(seed), size, max_seconds)
        for number, taken in times.items():
            begin = time.process_time()
            encoder.encode(*batch, number)
            taken.append(time.process_time() - begin)
    ours, theirs = (statistics.median(taken) for taken in times.values())
    what = f"median of {repeats} forward passes, batch {size}, captions truncated at {max_seconds} s, {groups} groups"
    return Figure(f"encoding_{max_seconds}s", ours, theirs, "s", ours / theirs, what, at_most=0.75)


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=5, threads=1)
    parser.add_argument("--batch", type=int, default=32, help="utterances per rank (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, default=20, help="batches in which frames are counted (default: %(default)s)"
    )
    parser.add_argument(
        "--groups", type=int, default=config.Speech().groups, help="length groups (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = []
    for max_seconds in MAX_SECONDS:
        figures += count_frames(options.batches, options.batch, options.groups, max_seconds)
    figures.append(measure_time(options.batch, options.groups, options.repeats, MAX_SECONDS[0]))
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
