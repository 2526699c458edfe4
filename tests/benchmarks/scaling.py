"""What a training step sends, by formula, for the project and for the plain design, and how long that takes.

Bytes are those that a rank receives, as `traffic.py` counts them; it sends as many. With N ranks, B pairs a rank,
embeddings of D numbers, S and P numbers in the speech and image tokens of a pair, of b bytes each, and G bytes of
gradients, W of trained weights, E of these in the teacher's working copy:

    here     keys       (N - 1) B (8 D + 8)                 one gather of both embeddings and identities, in float32
             requests   (N - 1) (16 B + 16)                 one gather of the rows wanted and of the longest sequences
             negatives  q B [(S + P) b + masks]             the rows asked for, and the gradients of those tokens that
                        + q B (those with gradient) b       have one; q = (N - 1) B / (N B - 1) of them are elsewhere
             gradients  2 (N - 1) / N G                     all-reduce: DeepSpeed's way at stages 0, 1 and 2
             weights    (N - 1) / N W                       stages 1 and 2: gather of what each rank has updated
             teacher    (N - 1) / N E                       alike, of the average
             agreement  2 (N - 1) / N F                     a few flags: a batch is there, go on, gradients are finite
    plain    keys       (N - 1) B (8 D + 8)                 three gathers
             negatives  (N - 1) B (S + P) b                 the tokens of all ranks, so as to draw from them
                        + 2 (N - 1) B (those with gradient) b   all-reduce of the gradients of all of them
             gradients  2 (N - 1) / N G

A collective takes its bytes at the bandwidth and the latency times the doublings from 1 to N; an exchange of rows also
a message a rank. Nothing is taken to hide behind the computation: the efficiency is the least to be expected.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What a step's traffic depends on.

    Attributes:
        batch: Pairs a rank, B.
        dim: Length of a embedding, D.
        speech: Numbers in the speech tokens of a pair, padded to the longest of all ranks, S.
        image: Numbers in the image tokens of a pair, P.
        frames: Of an utterance; a mask of a byte each travels.
        trained: Parameters trained.
        averaged: Of these, those that the teacher follows.
        number: Bytes of a number of tokens, gradients and weights, b.
        image_gradient: Whether the image tokens have a gradient: the trunk is trained or the head has layers.
        speech_gradient: Alike.
        zero: Stage, 0 to 2.
    """

    batch: int
    dim: int
    speech: int
    image: int
    frames: int
    trained: int
    averaged: int
    number: int = 4
    image_gradient: bool = False
    speech_gradient: bool = True
    zero: int = 1

    @property
    def with_gradient(self) -> int:
        """Numbers of a pair's tokens that have a gradient."""
        return self.speech * self.speech_gradient + self.image * self.image_gradient


@dataclass(frozen=True)
class Part:
    """Collectives of one kind: bytes that a rank receives in all of them, how many there are, messages to each rank."""

    bytes: float
    count: int
    messages: int = 0


def ours(n: int, sizes: Sizes) -> dict[str, Part]:
    """The project's step on n ranks with negatives from all of them."""
    share, b = (n - 1) / n, sizes.batch
    elsewhere = (n - 1) * b / (n * b - 1)
    row = (sizes.speech + sizes.image + sizes.with_gradient) * sizes.number + sizes.frames
    exchanges = 3 + sizes.image_gradient + sizes.speech_gradient
    parts = {
        "keys": Part((n - 1) * b * (8 * sizes.dim + 8), 1),
        "requests": Part((n - 1) * (16 * b + 16), 1),
        "negatives": Part(elsewhere * b * row, exchanges, messages=exchanges),
        "gradients": Part(2 * share * sizes.trained * sizes.number, 1),
        "agreement": Part(2 * share * (24 if sizes.zero else 12), 5 if sizes.zero else 2),
    }
    if sizes.zero:
        parts["weights"] = Part(share * sizes.trained * sizes.number, 2)
        parts["teacher"] = Part(share * sizes.averaged * sizes.number, 1)
    return parts


def plain(n: int, sizes: Sizes) -> dict[str, Part]:
    """Three gathers of keys, all tokens of all ranks with gradient, gradients by all-reduce."""
    tokens = (n - 1) * sizes.batch * sizes.number
    returned = 2 * tokens * sizes.with_gradient
    return {
        "keys": Part((n - 1) * sizes.batch * (8 * sizes.dim + 8), 3),
        "negatives": Part(
            tokens * (sizes.speech + sizes.image) + returned, 2 + sizes.image_gradient + sizes.speech_gradient
        ),
        "gradients": Part(2 * (n - 1) / n * sizes.trained * sizes.number, 1),
    }


@dataclass(frozen=True)
class Machine:
    """What the steps run on.

    Attributes:
        compute: Seconds of a step without any other rank.
        flops: What a rank really reaches a second.
        bandwidth: Bytes a second that a rank receives while it sends as many.
        latency: Seconds a doubling.
        message: Seconds to begin a message to one rank.
    """

    compute: float
    flops: float
    bandwidth: float
    latency: float
    message: float


def seconds(n: int, parts: dict[str, Part], machine: Machine) -> dict[str, float]:
    """Seconds of each part on n ranks."""
    return {
        name: part.bytes / machine.bandwidth
        + part.count * machine.latency * math.log2(n)
        + part.messages * (n - 1) * machine.message
        for name, part in parts.items()
    }


def contrast(n: int, sizes: Sizes, machine: Machine) -> float:
    """Seconds by which SIC's products with the keys of the other ranks lengthen a step: six of B x B (N - 1) x D."""
    return 12 * sizes.batch**2 * (n - 1) * sizes.dim / machine.flops


def efficiency(n: int, parts: dict[str, Part], sizes: Sizes, machine: Machine) -> float:
    """Share of a step on n ranks that one rank alone would take too."""
    more = sum(seconds(n, parts, machine).values()) + contrast(n, sizes, machine) if n > 1 else 0.0
    return machine.compute / (machine.compute + more)
