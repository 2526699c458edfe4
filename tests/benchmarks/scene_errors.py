"""Errors of image retrieval on the scenes, coarse and re-ranked, and attributes that image tokens encode.

    python tests/benchmarks/scene_errors.py RUN [RUN ...] --shards data/scenes [--split test] [--k 16] [--probe N]

For each run: the percentage of captions whose top image is wrong in the shapes only, and in anything else, coarse and
with the best k candidates re-ranked; and the accuracy in percent, on the split's images, of a linear probe of the image
tokens, fitted on N training images, for color and shape of the first object (chance: one over the number of colors, of
shapes). An objective on top of the tokens cannot recover what they do not encode. For scenes in English; no bound.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.corpora.drawing import COLOURS, SHAPES
from shards.manifest import Manifest, load
from shards.reading.caption_attributes import read_caption_attributes
from toolkit.config.load import load_config
from toolkit.config.schema import Config
from toolkit.evaluation.encode import ProcessInfo, encode
from toolkit.evaluation.ranking import Ranking
from toolkit.evaluation.retrieve import retrieve
from toolkit.model.retrieval import SpeechImageModel

PROCESS = ProcessInfo(0, 1, torch.device("cpu"))
Objects = list[tuple[str, str]]  # color and shape of each object, in the order of the caption


def objects(text: str) -> Objects:
    """Return color and shape of each object that a caption names."""
    return re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)


def differ_only_in_shapes(correct: str, first: str) -> bool:
    """Return whether the first two objects of two captions differ in shape, but not in color."""
    a, b = objects(correct)[:2], objects(first)[:2]
    return [color for color, _ in a] == [color for color, _ in b] and a != b


def error_shares(ranking: Ranking, owner: Tensor, texts: list[str]) -> tuple[float, float]:
    """Return the percentages of captions whose top image is wrong in the shapes only, and in anything else."""
    first = ranking.candidates[:, 0]
    wrong = [(own, other) for own, other in zip(owner.tolist(), first.tolist(), strict=True) if own != other]
    shapes = sum(differ_only_in_shapes(texts[own], texts[other]) for own, other in wrong)
    return 100 * shapes / len(owner), 100 * (len(wrong) - shapes) / len(owner)


def tokens_and_labels(
    model: SpeechImageModel, manifest: Manifest, split: str, count: int, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all tokens of each image, [N, P x H], and color and shape of its first object, int64 [N] each."""
    samples = manifest.rows(split)[:count]
    encoded = encode(model, manifest, samples, config, PROCESS, keep_tokens=True)
    assert encoded.tokens is not None
    texts = first_captions(manifest, split)[: len(samples)]
    named = [objects(text)[0] for text in texts]
    colors, shapes = list(COLOURS), list(SHAPES)
    labels = [[colors.index(color) for color, _ in named], [shapes.index(shape) for _, shape in named]]
    return encoded.tokens.images.flatten(1).float(), torch.tensor(labels[0]), torch.tensor(labels[1])


def first_captions(manifest: Manifest, split: str) -> list[str]:
    """Return the first caption of each image of a split."""
    attributes = read_caption_attributes(manifest, split)
    counts = [len(manifest.captions(sample)) for sample in manifest.rows(split).tolist()]
    starts = np.cumsum([0, *counts[:-1]])
    return [attributes.text[start] or "" for start in starts]


def probe(
    inputs: Tensor, labels: Tensor, test_inputs: Tensor, test_labels: Tensor, weight_decay: float = 3e-3
) -> float:
    """Fit a linear classifier and return its accuracy on the test inputs in percent."""
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-5
    inputs, test_inputs = (inputs - mean) / deviation, (test_inputs - mean) / deviation
    weight = torch.zeros(int(labels.max()) + 1, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + weight_decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return 100 * (F.linear(test_inputs, weight, bias).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    """Print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders with config.yaml and export/best"
    )
    parser.add_argument("--shards", required=True, help="shards of the scenes")
    parser.add_argument("--split", default="test", help="split to evaluate (default: %(default)s)")
    parser.add_argument("--k", type=int, default=16, help="re-ranked candidates per query (default: %(default)s)")
    parser.add_argument("--probe", type=int, default=3000, metavar="N", help="training images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)
    manifest = load(arguments.shards)
    texts = first_captions(manifest, arguments.split)
    print(f"{'percent':24}  coarse: shapes  other  re-ranked: shapes  other  probe: color  shape")
    for run in arguments.runs:
        config = load_config(["--config", str(run / "config.yaml"), "--data.shards", arguments.shards])
        model = SpeechImageModel.from_pretrained(run / "export/best").eval()
        found = retrieve(model, manifest, arguments.split, config, arguments.k, PROCESS)
        assert found.coarse is not None
        rankings = found.coarse[0], found.speech_to_image
        before, after = (error_shares(ranking, found.caption_picture, texts) for ranking in rankings)
        with torch.no_grad():
            train = tokens_and_labels(model, manifest, "train", arguments.probe, config)
            test = tokens_and_labels(model, manifest, arguments.split, len(texts), config)
        color, shape = (probe(train[0], train[i], test[0], test[i]) for i in (1, 2))
        print(
            f"{run.name:24}  {before[0]:14.1f}  {before[1]:5.1f}  {after[0]:17.1f}  {after[1]:5.1f}  {color:12.1f}  "
            f"{shape:5.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
