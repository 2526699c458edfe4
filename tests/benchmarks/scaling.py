"""Formulas of the bytes that a training step sends, for this project and a plain design, and of the time it takes.

Bytes are those that a rank receives, as counted by `traffic.py`; it sends as many. With N ranks, B pairs per rank,
embeddings of D elements, S and P elements of b bytes in the speech and image tokens of a pair, G bytes of gradients, W
bytes of trained weights, E of these in the teacher's working copy, and F bytes of flags:

    ours     keys       (N - 1) B (8 D + 8)                 one all-gather of both embeddings and the image ids, float32
             requests   (N - 1) (16 B + 16)                 one all-gather of the requested rows and the maximum lengths
             negatives  q B [(S + P) b + masks]             the requested rows, and the gradients of the tokens that
                        + q B (those with gradient) b       require one; q = (N - 1) B / (N B - 1) of them are remote
             gradients  2 (N - 1) / N G                     all-reduce, as DeepSpeed does at stages 0, 1 and 2
             weights    (N - 1) / N W                       stages 1 and 2: all-gather of the updated shards
             teacher    (N - 1) / N E                       stages 1 and 2: all-gather of the averaged shards
             agreement  2 (N - 1) / N F                     flags: batch available, continue, gradients finite
    plain    keys       (N - 1) B (8 D + 8)                 three all-gathers
             negatives  (N - 1) B (S + P) b                 tokens of all ranks, to draw negatives from
                        + 2 (N - 1) B (those with gradient) b   all-reduce of the gradients of all of them
             gradients  2 (N - 1) / N G

A collective takes its bytes divided by the bandwidth, plus the latency times log2 N; an exchange of rows also takes one
message per rank. No overlap of communication and computation is assumed, so the efficiency is a lower bound.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the traffic of a step.

    Attributes:
        batch: Pairs per rank, B.
        dim: Embedding dimension, D.
        speech: Elements in the speech tokens of a pair, padded to the longest of all ranks, S.
        image: Elements in the image tokens of a pair, P.
        frames: Frames of an utterance; the mask that is sent has one byte per frame.
        trained: Number of trained parameters.
        averaged: Number of trained parameters that the teacher averages.
        element_size: Bytes per element of tokens, gradients and weights, b.
        image_gradient: Whether the image tokens require a gradient: the trunk is trained or the head has layers.
        speech_gradient: The same for the speech tokens.
        zero_stage: ZeRO stage, 0 to 2.
    """

    batch: int
    dim: int
    speech: int
    image: int
    frames: int
    trained: int
    averaged: int
    element_size: int = 4
    image_gradient: bool = False
    speech_gradient: bool = True
    zero_stage: int = 1

    @property
    def with_gradient(self) -> int:
        """Elements of a pair's tokens that require a gradient."""
        return self.speech * self.speech_gradient + self.image * self.image_gradient


@dataclass(frozen=True)
class Collectives:
    """Collectives of one kind in a step.

    Attributes:
        bytes: Bytes that a rank receives in all of them.
        count: Number of collectives.
        messages: Number of messages to each rank.
    """

    bytes: float
    count: int
    messages: int = 0


def ours(n: int, sizes: Sizes) -> dict[str, Collectives]:
    """Return the traffic of this project's step on n ranks, with negatives from all ranks."""
    share, b = (n - 1) / n, sizes.batch
    remote = (n - 1) * b / (n * b - 1)
    row = (sizes.speech + sizes.image + sizes.with_gradient) * sizes.element_size + sizes.frames
    exchanges = 3 + sizes.image_gradient + sizes.speech_gradient
    parts = {
        "keys": Collectives((n - 1) * b * (8 * sizes.dim + 8), 1),
        "requests": Collectives((n - 1) * (16 * b + 16), 1),
        "negatives": Collectives(remote * b * row, exchanges, messages=exchanges),
        "gradients": Collectives(2 * share * sizes.trained * sizes.element_size, 1),
        "agreement": Collectives(2 * share * (24 if sizes.zero_stage else 12), 5 if sizes.zero_stage else 2),
    }
    if sizes.zero_stage:
        parts["weights"] = Collectives(share * sizes.trained * sizes.element_size, 2)
        parts["teacher"] = Collectives(share * sizes.averaged * sizes.element_size, 1)
    return parts


def plain(n: int, sizes: Sizes) -> dict[str, Collectives]:
    """Return the traffic of the plain step: three gathers of keys, all ranks' tokens with gradient, and gradients."""
    tokens = (n - 1) * sizes.batch * sizes.element_size
    returned = 2 * tokens * sizes.with_gradient
    return {
        "keys": Collectives((n - 1) * sizes.batch * (8 * sizes.dim + 8), 3),
        "negatives": Collectives(
            tokens * (sizes.speech + sizes.image) + returned, 2 + sizes.image_gradient + sizes.speech_gradient
        ),
        "gradients": Collectives(2 * (n - 1) / n * sizes.trained * sizes.element_size, 1),
    }


@dataclass(frozen=True)
class Machine:
    """Performance of a machine.

    Attributes:
        compute: Duration of a step on a single rank, in seconds.
        flops: Achieved FLOP/s per rank.
        bandwidth: Bytes per second that a rank receives while it sends as many.
        latency: Seconds per doubling of the number of ranks.
        message: Seconds to start a message to one rank.
    """

    compute: float
    flops: float
    bandwidth: float
    latency: float
    message: float


def seconds(n: int, parts: dict[str, Collectives], machine: Machine) -> dict[str, float]:
    """Return the duration of each kind of collective on n ranks, in seconds."""
    return {
        name: part.bytes / machine.bandwidth
        + part.count * machine.latency * math.log2(n)
        + part.messages * (n - 1) * machine.message
        for name, part in parts.items()
    }


def contrastive_seconds(n: int, sizes: Sizes, machine: Machine) -> float:
    """Return the seconds of SIC's products with other ranks' keys: six matrix products of B x B (N - 1) x D."""
    return 12 * sizes.batch**2 * (n - 1) * sizes.dim / machine.flops


def efficiency(n: int, parts: dict[str, Collectives], sizes: Sizes, machine: Machine) -> float:
    """Return the weak-scaling efficiency: duration of a single-rank step divided by that of a step on n ranks."""
    overhead = sum(seconds(n, parts, machine).values()) + contrastive_seconds(n, sizes, machine) if n > 1 else 0.0
    return machine.compute / (machine.compute + overhead)
