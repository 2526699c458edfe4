"""The configuration schema: nested dataclasses, loaded from YAML and overridden on the command line.

The comment beside a field is its text in `--help`. Ready configurations are in `toolkit/configs/*.yaml`.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from shards.augment.settings import Augment
from shards.errors import UserError

GPUS = re.compile(r"(?:(?!\d+:)[\w.-]+:)?\d+")  # a number of GPUs, or type:number as in SLURM, such as a100:4

RENAMED_KEYS = {  # full key of an earlier version: name of the key in its section today
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

Fuse = Literal["fitted", "sum", "matching"]  # score of re-ranked candidates; see `toolkit.evaluation.rerank`


@dataclass
class Data:
    """Shards, data loading and preprocessing."""

    shards: str = "data/scenes"  # folder written by make_shards, or its URL (s3://..., https://...)
    mixture: dict[str, float] = field(default_factory=dict)  # training folders and their weights; empty: `shards` alone
    make: list[str] = field(default_factory=list)  # make_shards arguments that submit uses if the shards are missing
    train: str = "train"  # name of the training split
    dev: str = "dev"  # name of the development split
    image_size: int = 224  # side of the square model input, in pixels
    resize: Literal["crop", "squash"] = "crop"  # crop: resize the short side and center-crop (CLIP); squash (BLIP-2)
    max_seconds: float = 8.0  # in training, longer captions are randomly cropped; see also evaluation.max_seconds
    workers: int = 2  # data loader workers per rank
    timeout: float = 600.0  # seconds to wait for a batch before the workers count as hung
    shuffle_shards: int = 16  # shards per shuffle block
    shard_groups: int = 1  # disjoint groups of shards; a node downloads only the groups that it serves
    cache: str | None = None  # node-local folder for copies of remote shards; null: stream without a cache
    cache_gb: float = 100.0  # maximum size of the cache in GB
    max_bad_samples: int = 1000  # distinct unreadable samples that a rank may replace before training fails
    max_bad_samples_in_a_row: int = 50  # largest number of unreadable samples in a row
    augment: Augment = field(default_factory=Augment)  # its keys are in shards/augment/settings.py


@dataclass
class Speech:
    """Speech encoder: trunk, softmax-weighted layer mix, transformer head."""

    architecture: Literal["hubert", "wav2vec2", "wavlm", "whisper"] = (
        "hubert"  # of random weights; a folder says its own
    )
    trunk: str | None = None  # folder or hub id, such as a HubertModel's; null: random weights from `config`
    config: dict[str, Any] = field(default_factory=dict)  # values of transformers' configuration for random weights
    train: str = "none"  # trainable part of the trunk: none, all, or the number of top layers
    head_layers: int = 1  # transformer layers of the head; 0: pooling and a linear projection
    pool: Literal["mean", "thirds"] = (
        "mean"  # pooling for head_layers 0: mean over frames, or concatenated means of beginning, middle and end
    )
    head_heads: int = 8  # attention heads of the head's layers
    dropout: float = 0.1  # dropout of the head
    groups: int = 6  # groups of similar length that a batch is encoded in, to reduce padding
    lora_rank: int = 0  # rank of LoRA on the frozen trunk's layers (peft); 0: off
    lora_alpha: float = 16.0  # LoRA's output is scaled by lora_alpha / lora_rank
    lora_targets: list[str] = field(default_factory=list)  # linear layers by name; empty: of queries and values
    filterbank: bool = False  # random weights only: initialize the first convolution as a mel-spaced filter bank
    mel_bins: int = 0  # random weights only: convolve a log-mel spectrogram of so many bins; 0: the waveform


@dataclass
class Image:
    """Image encoder: vision trunk and head."""

    architecture: Literal["clip", "blip2", "siglip", "dinov2"] = "clip"  # of random weights; folders say theirs
    trunk: str | None = None  # folder or hub id, such as a CLIPModel's; null: random weights from `config`
    config: dict[str, Any] = field(default_factory=dict)  # values of transformers' configuration for random weights
    stem: Literal["patches", "convolutions"] = (
        "patches"  # patch embedding: the trunk's linear projection, or (random weights only) stride-2 convolutions
    )
    train: str = "none"  # trainable part of the trunk: none, all, or the number of top layers
    head_layers: int = 0  # transformer layers of the head; 0: pooling and a linear projection
    pool: Literal["class", "mean", "grid"] = (
        "class"  # pooling for head_layers 0: class token, mean over patches, or concatenated means over a 4 x 4 grid
    )
    head_heads: int = 8  # attention heads of the head's layers
    dropout: float = 0.1  # dropout of the head
    lora_rank: int = 0  # rank of LoRA on the frozen trunk's layers (peft); 0: off
    lora_alpha: float = 16.0  # LoRA's output is scaled by lora_alpha / lora_rank
    lora_targets: list[str] = field(default_factory=list)  # linear layers by name; empty: of queries and values
    freeze_projection: bool = False  # freeze CLIP's projection; with a frozen trunk, image embeddings equal CLIP's


@dataclass
class Fusion:
    """Fusion encoder: speech frames cross-attend to image patches. The denoiser shares its width, heads and dropout."""

    width: int = 768  # hidden size
    layers: int = 6
    heads: int = 12  # attention heads
    pool: int = 2  # neighboring speech frames averaged into one query
    dropout: float = 0.1


@dataclass
class Model:
    """The retrieval model."""

    embed_dim: int = 256  # size of the embeddings; CLIP's projection is loaded if it has the same size
    speech: Speech = field(default_factory=Speech)
    image: Image = field(default_factory=Image)
    fusion: Fusion = field(default_factory=Fusion)


@dataclass
class Momentum:
    """Momentum encoder (teacher) for the keys, the soft targets and the denoising targets."""

    enabled: bool = True  # false: the keys are the student's embeddings, gathered with gradient
    decay: float = 0.995  # decay of the exponential moving average per step


@dataclass
class Contrastive:
    """Speech-image contrastive loss (SIC): coarse alignment of the embeddings."""

    weight: float = 1.0  # loss weight; 0: computed, but not trained
    temperature: float = 0.07  # initial temperature
    learn_temperature: bool = True
    min_temperature: float = 0.001  # lower bound of a learned temperature
    max_temperature: float = 0.5  # upper bound of a learned temperature
    queue: int = 65536  # keys of earlier batches that serve as negatives; 0: no queue
    queue_from: int = 0  # first step whose keys are queued; while the weights change fast, queued keys are stale
    alpha: float = 0.4  # weight of the teacher's soft targets
    alpha_ramp: int = 1000  # steps over which alpha increases linearly from 0


@dataclass
class Matching:
    """Speech-image matching loss (SIM): fine alignment by the fusion encoder."""

    weight: float = 1.0  # loss weight; 0: off
    negatives: Literal["local", "global"] = "global"  # sample hard negatives from this rank's pairs or all ranks'
    queue: int = 0  # pairs of earlier batches (total over ranks) that negatives are also sampled from, with tokens
    queue_on: Literal["device", "host"] = "device"  # memory of that queue; host: pinned CPU memory


@dataclass
class Denoising:
    """Cross-modal denoising loss (CMD)."""

    weight: float = 0.5  # loss weight; 0: off
    side: Literal["image", "speech", "both"] = "image"  # modality whose tokens are noised and reconstructed
    noise: Literal["swap", "gaussian", "mask"] = "swap"  # swap: tokens of other samples of the batch
    ratio: float = 0.5  # fraction of the positions that are noised
    span: int = 5  # length of a noised span of speech frames
    swap_group: int = 8  # adjacent rows of the global batch that swap tokens; must not cross a rank's micro-batch
    snr_db: float = 0.0  # signal-to-noise ratio of Gaussian noise in dB
    target: Literal["teacher", "own"] = "teacher"  # clean features of the momentum encoder or of the student
    loss: Literal["cosine", "mse", "infonce"] = "cosine"  # distance to the clean features
    positions: Literal["noised", "all"] = "noised"  # positions that count in the loss
    layers: int = 2  # layers of the denoiser
    token_temperature: float = 0.1  # temperature of the InfoNCE loss over tokens


@dataclass
class Objectives:
    """Training objectives: the weighted sum of contrastive, matching and denoising loss."""

    coarse_steps: int = 0  # initial steps with SIC alone, on in-batch negatives: no teacher, no queues
    contrastive: Contrastive = field(default_factory=Contrastive)
    matching: Matching = field(default_factory=Matching)
    denoising: Denoising = field(default_factory=Denoising)
    momentum: Momentum = field(default_factory=Momentum)


@dataclass
class Training:
    """Optimization, checkpoints and fault tolerance."""

    steps: int = 50000  # optimizer steps
    batch_size: int = 256  # pairs per optimizer step, over all ranks and accumulated micro-batches
    accumulation: int = 1  # micro-batches per optimizer step (gradient accumulation)
    activation_checkpointing: bool = False  # recompute trained layers' activations in the backward pass
    grad_cache: bool = False  # SIC over all pairs of an accumulated step, not of a micro-batch; encodes twice
    lr: float = 1e-4  # peak learning rate
    trunk_lr: float | None = None  # peak learning rate of the trunks' trained weights; null: `lr`
    layer_decay: float = 1.0  # a trunk's layer i of n, from 1 at the input, learns at layer_decay ** (n - i) of that
    min_lr: float = 1e-6  # learning rate at the end of the cosine decay
    warmup_steps: int = 5000  # steps of linear warmup
    weight_decay: float = 0.02
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # of AdamW
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
    precision: Literal["fp32", "bf16"] = "bf16"
    export_dtype: Literal["model", "fp32"] = "model"  # fp32: export the optimizer's float32 master weights
    zero_stage: Literal[0, 1, 2, 3] = 1  # DeepSpeed ZeRO stage
    log_every: int = 20  # steps between log lines
    save_every: int = 1000  # steps between checkpoints
    keep_checkpoints: int = 3  # newest checkpoints kept, in addition to the best one
    max_skipped_in_a_row: int = 20  # consecutive steps skipped for non-finite gradients before training fails
    watchdog: float = 900.0  # seconds without a completed step before stacks are dumped and the run ends; 0: off
    detect_nonfinite: bool = False  # report the first module with a non-finite output; slower
    resume: str = "auto"  # auto: this run's newest checkpoint; never; or a run to start from (on other data: at step 0)
    stop_after: int | None = None  # steps after which this process saves and exits early; null: `steps`


@dataclass
class Evaluation:
    """Recall on the development split during training, and on any split afterwards."""

    every: int = 1000  # steps between evaluations during training; 0: never
    batch_size: int = 64  # pictures, or captions of up to data.max_seconds; fewer if captions are longer
    max_seconds: float = 60.0  # longer captions are truncated, also by the exported model's processor
    rerank: int = 0  # candidates per query that SIM re-ranks in evaluations during training; 0: no re-ranking
    fuse: Fuse = (
        "fitted"  # score: cosine + w * match logit with w fitted on dev, or w = 1 (BLIP), or the logit alone (ALBEF)
    )


@dataclass
class Wandb:
    """Weights & Biases logging, or trackio's."""

    tracker: Literal["wandb", "trackio"] = "wandb"  # trackio: local, without an account, extra [trackio]; see its guide
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if an API key is found, else offline
    project: str = "speech-image-retrieval"


@dataclass
class Final:
    """Final evaluation, run by `launch/submit.py` after training."""

    split: str = "test"  # split to evaluate; empty: no final evaluation
    rerank: int = 16  # candidates per query to re-rank; 0: no re-ranking


@dataclass
class Launch:
    """Resources of `launch/submit.py`."""

    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"  # auto: SLURM if available; debug: one local process
    profile: str | None = None  # name in slurm/profiles or a YAML file; null: the profile matching this machine, if any
    name: str | None = None  # job name; null: name of the run folder
    nodes: int = 1  # number of nodes
    ranks_per_node: int = 0  # processes per node; 0: one per GPU, or 2 without GPUs
    gpus_per_node: int | str | None = None  # GPUs to request from SLURM, such as 4 or a100:4; local ones are detected
    cpus_per_rank: int = 0  # 0: local cores divided by the ranks; on SLURM, as many as the data loader needs
    partition: str | None = None  # as sbatch --partition
    account: str | None = None  # as sbatch --account
    qos: str | None = None  # as sbatch --qos
    constraint: str | None = None  # as sbatch --constraint
    time: str = "24:00:00"  # time limit, as sbatch --time: minutes, H:M:S or D-H:M:S
    signal: int = 300  # seconds before the time limit at which all ranks save and exit, to resume in the next job
    array: int = 0  # sweep members that run concurrently; 0: no limit
    follow: bool = True  # print the log until the job ends


@dataclass
class Config:
    """The complete configuration."""

    run: str = "runs/default"  # run folder
    seed: int = 0  # seed of initialization, data order and dropout
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    objectives: Objectives = field(default_factory=Objectives)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    final: Final = field(default_factory=Final)
    wandb: Wandb = field(default_factory=Wandb)
    launch: Launch = field(default_factory=Launch)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further DeepSpeed settings, except those set above


def gpu_count(gpus: int | str | None) -> int:
    """Number of GPUs in a request such as 4 or a100:4; 0 for None."""
    return int(str(gpus or 0).rpartition(":")[2])


def micro_batch(config: Config, world_size: int) -> int:
    """Pairs per rank and micro-batch.

    Raises:
        UserError: The batch size is not divisible by ranks times accumulation.
    """
    unit = world_size * config.training.accumulation
    batch = config.training.batch_size
    if batch % unit:
        valid = " or ".join(str(size) for size in (batch // unit * unit, (batch // unit + 1) * unit) if size)
        raise UserError(
            f"--training.batch_size {batch} is not divisible by {world_size} ranks x {config.training.accumulation} "
            f"accumulated micro-batches; the nearest valid sizes: {valid}"
        )
    return batch // unit
