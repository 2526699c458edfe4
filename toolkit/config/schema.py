"""The configuration: one typed tree, read from YAML, overridden on the command line.

Every value has its type, default and meaning here and nowhere else. `toolkit/configs/*.yaml` holds ready ones.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from shards.errors import UserError

GPUS = re.compile(r"(?:(?!\d+:)[\w.-]+:)?\d+")  # a number of GPUs, or a type and a number, as SLURM writes them: a100:4


RENAMED_KEYS = {  # keys of earlier versions, still read: the section's key as it is called now
    "data.window": "shuffle_shards",
    "data.lanes": "shard_groups",
    "data.max_faults": "max_bad_samples",
    "data.max_faults_in_a_row": "max_bad_samples_in_a_row",
    "objectives.denoising.donors": "swap_group",
    "training.cached": "grad_cache",
    "training.warmup": "warmup_steps",
    "training.clip": "grad_clip",
    "training.zero": "zero_stage",
    "training.keep": "keep_checkpoints",
    "training.name_bad_module": "detect_nonfinite",
}


@dataclass
class Data:
    """Where samples come from and how they are prepared."""

    shards: str = "data/scenes"  # folder that make_shards wrote, or its URL (s3://..., https://...)
    mixture: dict[str, float] = field(default_factory=dict)  # folders to train on, with weights; empty: `shards` alone
    make: list[str] = field(default_factory=list)  # arguments with which submit runs make_shards if it is missing
    train: str = "train"  # names of the splits
    dev: str = "dev"
    image_size: int = 224  # pixels a side; pictures become squares in the loader
    resize: Literal["crop", "squash"] = "crop"  # short side resized and centre cut (CLIP), or both sides (BLIP-2)
    max_seconds: float = 8.0  # longer captions are cropped at random in training; see also evaluation.max_seconds
    workers: int = 2  # loader processes a rank
    timeout: float = 600.0  # seconds that a batch may take before its workers are taken to hang
    shuffle_shards: int = 16  # shards shuffled together
    shard_groups: int = 1  # disjoint groups of shards; a node downloads only the groups that it serves
    cache: str | None = None  # folder on each node's own disk that keeps remote shards; null: read them from afar
    cache_gb: float = 100.0  # what it may hold, in GB
    max_bad_samples: int = 1000  # samples that a rank may replace because they cannot be read; each counts once
    max_bad_samples_in_a_row: int = 50  # largest number of unreadable samples in a row


@dataclass
class Speech:
    """Speech encoder: HuBERT trunk, softmax layer mix, transformer head."""

    trunk: str | None = None  # folder or hub id of a HuBERT; none: random weights from `config`
    config: dict[str, Any] = field(default_factory=dict)  # HubertConfig values for random weights
    train: str = "none"  # how much of the trunk is trained: none, all, or the number of top layers
    head_layers: int = 1
    pool: Literal["mean", "thirds"] = (
        "mean"  # what is projected without head layers: mean of the frames, or means of beginning, middle and end
    )
    head_heads: int = 8
    dropout: float = 0.1
    groups: int = 6  # parts, by length, that a batch is encoded in: less padding
    filterbank: bool = False  # random weights only: the first convolution begins as a mel-spaced filter bank


@dataclass
class Image:
    """Image encoder: CLIP (or BLIP-2) vision trunk and head."""

    architecture: Literal["clip", "blip2"] = "clip"
    trunk: str | None = None  # folder or hub id, of a CLIPModel with its projection; none: random weights from `config`
    config: dict[str, Any] = field(default_factory=dict)  # CLIPVisionConfig or Blip2VisionConfig values
    stem: Literal["patches", "convolutions"] = (
        "patches"  # what embeds patches: the trunk's projection, or, from random weights, convolutions of stride 2
    )
    train: str = "none"
    head_layers: int = 0
    pool: Literal["class", "mean", "grid"] = (
        "class"  # what is projected without head layers: class token, mean of the patches, means over a 4 x 4 grid
    )
    head_heads: int = 8
    dropout: float = 0.1
    freeze_projection: bool = False  # keep CLIP's own projection; with a frozen trunk pictures' embeddings are CLIP's


@dataclass
class Fusion:
    """Fusion encoder: speech frames attend to image patches; the denoiser is the same class, turned round."""

    width: int = 768
    layers: int = 6
    heads: int = 12
    pool: int = 2  # neighbouring speech frames averaged into one query
    dropout: float = 0.1


@dataclass
class Model:
    """The retrieval model."""

    embed_dim: int = 256  # length of the global embeddings; CLIP's projection_dim lets pictures' begin as CLIP's own
    speech: Speech = field(default_factory=Speech)
    image: Image = field(default_factory=Image)
    fusion: Fusion = field(default_factory=Fusion)


@dataclass
class Momentum:
    """Momentum encoder (teacher) that supplies the keys, the soft targets and the denoising targets."""

    enabled: bool = True  # off: keys are the student's own embeddings, gathered with gradient
    decay: float = 0.995


@dataclass
class Contrastive:
    """SIC, the coarse alignment."""

    weight: float = 1.0
    temperature: float = 0.07
    learn_temperature: bool = True
    min_temperature: float = 0.001
    max_temperature: float = 0.5
    queue: int = 65536  # keys kept of earlier batches; 0: none
    queue_from: int = 0  # step from which keys are kept; while the weights change fast, earlier keys are stale
    alpha: float = 0.4  # weight of the teacher's soft targets
    alpha_ramp: int = 1000  # steps over which alpha grows from 0


@dataclass
class Matching:
    """SIM, the fine alignment."""

    weight: float = 1.0  # 0: off
    negatives: Literal["local", "global"] = "global"  # drawn from all ranks' pairs, or (local) from this rank's
    queue: int = (
        0  # pairs of earlier batches, over all ranks, that negatives are drawn from, too; their tokens are kept
    )
    queue_on: Literal["device", "host"] = "device"  # where: host takes the CPU's page-locked memory


@dataclass
class Denoising:
    """CMD, cross-modal denoising."""

    weight: float = 0.5  # 0: off
    side: Literal["image", "speech", "both"] = "image"
    noise: Literal["swap", "gaussian", "mask"] = "swap"
    ratio: float = 0.5  # share of the positions that are noised
    span: int = 5  # length of a noised run of speech frames
    swap_group: int = 8  # neighbours in the global batch that exchange tokens; no rank's micro-batch should cut them
    snr_db: float = 0.0  # of the Gaussian noise
    target: Literal["teacher", "own"] = "teacher"
    loss: Literal["cosine", "mse", "infonce"] = "cosine"
    positions: Literal["noised", "all"] = "noised"
    layers: int = 2
    token_temperature: float = 0.1  # of the token InfoNCE


@dataclass
class Objectives:
    """What is minimised: contrastive + matching + denoising, each times its weight."""

    coarse_steps: int = (
        0  # steps at the start with SIC alone, on the batch's own embeddings: without teacher and queues
    )
    contrastive: Contrastive = field(default_factory=Contrastive)
    matching: Matching = field(default_factory=Matching)
    denoising: Denoising = field(default_factory=Denoising)
    momentum: Momentum = field(default_factory=Momentum)


@dataclass
class Training:
    """The optimisation."""

    steps: int = 50000
    batch_size: int = 256  # pairs an optimizer step, over all ranks and accumulated micro-batches
    accumulation: int = 1  # micro-batches a step
    activation_checkpointing: bool = False  # recompute trained layers' activations in the backward pass
    grad_cache: bool = False  # SIC compares all pairs of an accumulated step, not of a micro-batch; encodes twice
    lr: float = 1e-4
    min_lr: float = 1e-6
    warmup_steps: int = 5000  # steps
    weight_decay: float = 0.02
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    grad_clip: float = 1.0  # gradient norm
    precision: Literal["fp32", "bf16"] = "bf16"
    export_dtype: Literal["model", "fp32"] = "model"  # fp32: the optimizer's weights, whatever the model computes in
    zero_stage: Literal[0, 1, 2, 3] = 1  # DeepSpeed ZeRO stage
    log_every: int = 20  # steps
    save_every: int = 1000  # steps
    keep_checkpoints: int = 3  # newest checkpoints kept, beside the best
    max_skipped_in_a_row: int = 20  # steps skipped for numbers that are not finite, after which the run ends
    watchdog: float = (
        900.0  # seconds without a completed step after which the stacks are shown and the run ends; 0: none
    )
    detect_nonfinite: bool = False  # say which module's output was not finite first; slower
    resume: str = "auto"  # auto: own newest checkpoint; never; or another run's if it has none, on other data at step 0
    stop_after: int | None = None  # steps after which this process saves and leaves, short of `steps`


@dataclass
class Evaluation:
    """Recall on dev during training and on any split afterwards."""

    every: int = 1000  # steps; 0: never
    batch_size: int = 64  # pictures, or captions up to data.max_seconds; of longer ones fewer
    max_seconds: float = 60.0  # longer captions are cut to their start; the exported model's processor does the same
    rerank: int = 0  # candidates that SIM re-scores a query during training's evaluations; 0: coarse only
    fuse: Literal["fitted", "sum", "matching"] = "fitted"  # cosine + logit, as fits dev or 1:1 (BLIP); logit (ALBEF)


@dataclass
class Wandb:
    """Weights & Biases; offline where no key is found."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "speech-image-retrieval"


@dataclass
class Final:
    """What `launch/submit.py` runs after training."""

    split: str = "test"  # evaluated once the last step is done; empty: nothing
    rerank: int = 16


@dataclass
class Launch:
    """Where and on what `launch/submit.py` runs."""

    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"  # auto: SLURM where it is; debug: one process, here
    profile: str | None = None  # a name in slurm/profiles or a YAML file; null: the one that fits this machine, if any
    name: str | None = None  # of the job; null: that of the run folder
    nodes: int = 1
    ranks_per_node: int = 0  # 0: one a GPU, or 2 where there is none
    gpus_per_node: int | str | None = None  # to ask SLURM for, such as 4 or a100:4; null: none. Local ones are found
    cpus_per_rank: int = 0  # 0: the machine's cores shared out; on SLURM, as many as the loader needs
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"  # limit, as SLURM writes it: minutes, H:M:S or D-H:M:S
    signal: int = 300  # seconds before that limit at which all ranks save and leave, to go on in the next job
    array: int = 0  # members of a grid that run at once; 0: as many as fit
    follow: bool = True  # show the log until the job ends


@dataclass
class Config:
    """The whole tree."""

    run: str = "runs/default"  # the run folder
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    objectives: Objectives = field(default_factory=Objectives)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    final: Final = field(default_factory=Final)
    wandb: Wandb = field(default_factory=Wandb)
    launch: Launch = field(default_factory=Launch)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's own keys, but those decided above


def gpu_count(gpus: int | str | None) -> int:
    """The number in a request for GPUs, such as 4 or a100:4; 0 for none."""
    return int(str(gpus or 0).rpartition(":")[2])


def micro_batch(config: Config, world_size: int) -> int:
    """Pairs that one rank takes through the model at once.

    Raises:
        UserError: The batch does not divide by ranks and accumulation.
    """
    unit = world_size * config.training.accumulation
    batch = config.training.batch_size
    if batch % unit:
        valid = " or ".join(str(size) for size in (batch // unit * unit, (batch // unit + 1) * unit) if size)
        raise UserError(
            f"--training.batch_size {batch} does not divide by {world_size} ranks x {config.training.accumulation} "
            f"accumulated micro-batches; the nearest that do: {valid}"
        )
    return batch // unit
