"""Re-ranking from cached encodings of both modalities, against encoding both inputs of every pair again.

    python tests/benchmarks/reranking.py [--json] [--pictures P] [--captions N] [--k K] [--repeats R] [--threads T]

The alternative does what a cross-encoder on input pairs does (`predict` of mteb and sentence-transformers): speech and
image of each pair are encoded, then matched, in batches of the same number of pairs. Both score the same pairs, the
best k candidates of every query in both directions, and must agree. Ours includes encoding every input once, which
evaluation needs anyway; `rerank_matching` excludes it on our side. The model has random weights and the proportions of
the reference configurations at an eighth of their width and a third of their depth: trunks of 8 layers of 128, a fusion
encoder of 2 layers of 96, 4 s of speech at 50 frames per second, 257 patches. Measurements alternate; the figures are
ratios of medians. One thread by default. Exit code 1: a bound is missed.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from table import Figure, build_parser, print_figures
from torch import Tensor

from toolkit.config import schema
from toolkit.evaluation.encode import Encodings, ProcessInfo, encode_captions, encode_images
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.rerank import ScoredCandidates, score_candidates
from toolkit.model.build import build_model

SECONDS, RATE, SIDE, BATCH = 4, 16_000, 224, 16
PROCESS = ProcessInfo(0, 1, torch.device("cpu"))
TRUNK = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 512}
CONVOLUTIONS = {"conv_dim": [64] * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def scaled_config() -> schema.Config:
    """Return the scaled-down reference configuration."""
    speech = schema.Speech(config=TRUNK | CONVOLUTIONS, head_layers=1, head_heads=4, groups=1)
    image = schema.Image(config=TRUNK | {"image_size": SIDE, "patch_size": 14})
    fusion = schema.Fusion(width=96, layers=2, heads=4)
    return schema.Config(
        data=schema.Data(max_seconds=SECONDS),
        model=schema.Model(embed_dim=96, speech=speech, image=image, fusion=fusion),
        evaluation=schema.Evaluation(batch_size=BATCH, fuse="sum"),
    )


class Inputs:
    """A model with random weights, and noise in place of speech and pictures."""

    def __init__(self, pictures: int, captions: int, k: int) -> None:
        torch.manual_seed(0)
        self.config, self.k = scaled_config(), k
        self.model = build_model(self.config.model).eval()
        self.images = torch.randint(0, 256, (pictures, 3, SIDE, SIDE), dtype=torch.uint8)
        self.owner = torch.arange(pictures).repeat_interleave(captions)
        self.waves = torch.randn(len(self.owner), SECONDS * RATE) * 0.1

    def encode(self) -> Encodings:
        """Encode every input once."""
        arguments = self.config, PROCESS
        images, tokens = encode_images(self.model, self.images.__getitem__, len(self.images), *arguments, True)
        seconds = np.full(len(self.waves), float(SECONDS))
        speech, kept = encode_captions(self.model, self.waves.__getitem__, seconds, *arguments, tokens)
        numbers = np.arange(len(self.images)), np.arange(len(self.waves))
        return Encodings(*numbers, self.owner, images, speech, kept)

    def score(self, encodings: Encodings) -> ScoredCandidates:
        """Rank, and score the best k candidates of each query in both directions."""
        rankings = rank_both(encodings.speech, encodings.images, self.owner, self.k)
        return score_candidates(self.model, encodings, *rankings, self.owner.unique(), self.k, PROCESS)

    def score_from_inputs(self, pairs: Tensor) -> Tensor:
        """Return the match logits of pairs of caption and picture, int64 [M, 2], each encoded from its inputs."""
        logits = []
        for captions, pictures in (batch.unbind(1) for batch in pairs.split(BATCH)):
            waves = self.waves[captions]
            speech = self.model.encode_speech(waves, torch.full((len(waves),), waves.shape[1]))
            logits.append(self.model.match(speech, self.model.encode_image(self.images[pictures]))[:, 1])
        return torch.cat(logits)

    def pairs(self, scored: ScoredCandidates, encodings: Encodings) -> Tensor:
        """Return the scored pairs, int64 [M, 2], in the order of the logits."""
        forward, backward = rank_both(encodings.speech, encodings.images, self.owner, self.k)
        pairs = torch.zeros(len(scored.logits), 2, dtype=torch.int64)
        captions, queries = torch.arange(len(self.owner))[:, None], self.owner.unique()[:, None]
        for places, parts in (
            (scored.pairs[0], (captions, forward.candidates)),
            (scored.pairs[1], (backward.candidates, queries)),
        ):
            pairs[places] = torch.stack([part.expand(places.shape) for part in parts], dim=2)
        return pairs


@torch.no_grad()
def measure(inputs: Inputs, repeats: int) -> tuple[float, float, float]:
    """Return the median seconds of ours with and without encoding, and of encoding every pair again."""
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(repeats):
        begin = time.perf_counter()
        encodings = inputs.encode()
        encoded = time.perf_counter()
        scored = inputs.score(encodings)
        done = time.perf_counter()
        pairs = inputs.pairs(scored, encodings)
        ready = time.perf_counter()
        logits = inputs.score_from_inputs(pairs)
        end = time.perf_counter()
        for taken, value in zip(times, (done - begin, done - encoded, end - ready), strict=True):
            taken.append(value)
        error = float((logits - scored.logits).abs().max())
        if not error < 1e-3:
            raise SystemExit(f"the match logits differ by up to {error:.2e}")
    ours, matching, plain = map(statistics.median, times)
    return ours, matching, plain


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=1, threads=1)
    parser.add_argument("--pictures", type=int, default=24, help="number of pictures (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=2, help="captions per picture (default: %(default)s)")
    parser.add_argument("--k", type=int, default=16, help="candidates per query (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = Inputs(options.pictures, options.captions, options.k)
    ours, matching, plain = measure(inputs, options.repeats)
    what = f"{options.pictures} pictures, {len(inputs.owner)} captions, best {options.k} of every query"
    figures = [
        Figure("rerank", ours, plain, "s", plain / ours, f"with encoding: {what}", at_least=5.0),
        Figure("rerank_matching", matching, plain, "s", plain / matching, f"after encoding: {what}", at_least=10.0),
    ]
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
