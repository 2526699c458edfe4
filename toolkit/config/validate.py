"""Validation of the configuration: the range of each value, and combinations that are not allowed."""

from operator import attrgetter
from typing import Any

from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS
from shards.errors import UserError
from toolkit.config.schema import GPUS, Config, Image, Speech, micro_batch


def check_config(config: Config) -> None:
    """Check the range of every value and the combinations of values.

    Raises:
        UserError: A value is out of range, or values contradict each other.
    """
    for expected, (is_valid, keys) in _RANGES.items():
        for key in keys.split():
            value = attrgetter(key)(config)
            if not all(is_valid(item) for item in (value if isinstance(value, list) else [value])):
                raise UserError(f"--{key} is {value}; expected {expected}")
    rules = (_objective_rules, _model_rules, _trunk_rules, _training_rules, _augment_rules)
    for is_wrong, message in (one for rule in rules for one in rule(config)):
        if is_wrong:
            raise UserError(message)


# Range in words: predicate, and the keys that it applies to (to every item, if the value is a list).
_RANGES: dict[str, tuple[Any, str]] = {
    "1 or more": (
        lambda value: value >= 1,
        """data.augment.speech.babble_voices data.augment.speech.frequency_masks
        data.augment.speech.time_masks data.image_size data.shuffle_shards data.shard_groups model.embed_dim
        model.fusion.width model.fusion.layers
        model.fusion.heads model.fusion.pool model.speech.head_heads model.image.head_heads objectives.denoising.span
        objectives.denoising.swap_group objectives.denoising.layers
        training.steps training.batch_size training.accumulation training.log_every
        training.save_every training.keep_checkpoints training.max_skipped_in_a_row evaluation.batch_size launch.nodes
        launch.signal""",
    ),
    "0 or more": (
        lambda value: value >= 0,
        """seed data.workers data.max_bad_samples data.max_bad_samples_in_a_row model.speech.head_layers
        model.image.head_layers model.speech.lora_rank model.image.lora_rank
        objectives.coarse_steps objectives.contrastive.weight objectives.matching.queue
        objectives.contrastive.queue objectives.contrastive.alpha_ramp objectives.matching.weight
        objectives.denoising.weight training.min_lr training.warmup_steps training.weight_decay training.grad_clip
        training.watchdog evaluation.every evaluation.rerank final.rerank launch.ranks_per_node launch.cpus_per_rank
        launch.array""",
    ),
    "more than 0": (
        lambda value: value > 0,
        """data.max_seconds evaluation.max_seconds data.timeout data.cache_gb objectives.contrastive.temperature
        objectives.contrastive.min_temperature
        objectives.denoising.token_temperature training.lr model.speech.lora_alpha model.image.lora_alpha""",
    ),
    "more than 0, at most 1": (lambda value: 0 < value <= 1, "objectives.denoising.ratio training.layer_decay"),
    "more than 0, or null": (lambda value: value is None or value > 0, "training.trunk_lr"),
    "from 0 up to, not including, 1": (
        lambda value: 0 <= value < 1,
        "model.speech.dropout model.image.dropout model.fusion.dropout training.betas",
    ),
    "0 to 1": (
        lambda value: 0 <= value <= 1,
        " ".join(
            ["objectives.contrastive.alpha objectives.momentum.decay"]
            + [f"data.augment.speech.{kind}" for kind in SPEECH_KINDS]
            + [f"data.augment.image.{kind}" for kind in IMAGE_KINDS]
        ),
    ),
    "a number of GPUs, or a type and a number such as a100:4": (
        lambda value: value is None or GPUS.fullmatch(str(value)) is not None,
        "launch.gpus_per_node",
    ),
    "none, all, or a number of layers": (
        lambda value: value in ("none", "all") or (value.isdecimal() and int(value) > 0),
        "model.speech.train model.image.train",
    ),
}


Rule = tuple[bool, str]  # whether the rule is violated, and the error message


def _objective_rules(config: Config) -> list[Rule]:
    contrastive, matching, denoising = (
        config.objectives.contrastive, config.objectives.matching, config.objectives.denoising
    )  # fmt: skip
    teacher = config.objectives.momentum.enabled
    off = "needs the momentum encoder, which --objectives.momentum.enabled false switches off"
    return [
        (
            contrastive.weight + matching.weight + denoising.weight == 0,
            "all of objectives.contrastive.weight, matching.weight and denoising.weight are 0: nothing to train",
        ),
        (
            not contrastive.min_temperature <= contrastive.temperature <= contrastive.max_temperature,
            f"--objectives.contrastive.temperature {contrastive.temperature} is not between min_temperature "
            f"{contrastive.min_temperature} and max_temperature {contrastive.max_temperature}",
        ),
        (
            contrastive.alpha > 0 and not teacher,
            f"--objectives.contrastive.alpha {contrastive.alpha} {off}; set it to 0",
        ),
        (
            denoising.weight > 0 and denoising.target == "teacher" and not teacher,
            f"--objectives.denoising.target teacher {off}; set it to own",
        ),
        (
            denoising.weight > 0 and denoising.noise == "swap" and denoising.swap_group == 1,
            "--objectives.denoising.swap_group 1 leaves no row to swap with: set it to 2 or more, or change "
            "--objectives.denoising.noise",
        ),
        (
            config.evaluation.rerank > 0 and matching.weight == 0,
            "--evaluation.rerank needs the matching objective, whose weight is 0: set --evaluation.rerank 0",
        ),
    ]


def _model_rules(config: Config) -> list[Rule]:
    fusion, image = config.model.fusion, config.model.image
    # Of transformers' configurations.
    defaults = {"clip": (32, 768), "blip2": (14, 1408), "siglip": (16, 768), "dinov2": (14, 768)}[image.architecture]
    patch_size, hidden_size = map(image.config.get, ("patch_size", "hidden_size"), defaults)
    return [
        (
            fusion.width % fusion.heads != 0,
            f"--model.fusion.width {fusion.width} is not divisible by --model.fusion.heads {fusion.heads}",
        ),
        (
            image.freeze_projection
            and not (image.trunk and image.architecture == "clip" and image.pool == "class" and not image.head_layers),
            "--model.image.freeze_projection true freezes the projection of a CLIP trunk's class token: it needs "
            "--model.image.trunk, architecture clip, pool class and head_layers 0",
        ),
        (
            image.stem == "convolutions" and image.trunk is not None,
            "--model.image.stem convolutions would replace the patch projection that --model.image.trunk was trained "
            "with: set it to patches, or train from random weights",
        ),
        (
            image.stem == "convolutions" and image.train != "all",
            f"--model.image.train {image.train} would leave the stem's random weights untrained: set it to all, or "
            "--model.image.stem to patches",
        ),
        (
            image.stem == "convolutions" and not stem_supports(patch_size, hidden_size),
            "--model.image.stem convolutions needs a patch_size that is a power of 2, at least 2, and a hidden_size "
            f"that is a multiple of 4 (model.image.config): they are {patch_size} and {hidden_size}",
        ),
    ]


def _trunk_rules(config: Config) -> list[Rule]:
    model, training = config.model, config.training
    sides: tuple[Speech | Image, ...] = (model.speech, model.image)
    trained = any(side.train != "none" or side.lora_rank for side in sides)
    rules = [
        (
            side.lora_rank > 0 and side.train != "none",
            f"--model.{name}.lora_rank {side.lora_rank} adapts a frozen trunk, and --model.{name}.train is "
            f"{side.train}: set it to none, or lora_rank to 0",
        )
        for name, side in zip(("speech", "image"), sides, strict=True)
    ]
    whisper = model.speech.architecture == "whisper" and not model.speech.trunk
    message = "--model.speech.filterbank initializes a convolution over the waveform; Whisper has none: set it to false"
    rules.append((whisper and model.speech.filterbank, message))
    rules += _spectrogram_rules(model.speech)
    for key, changed in (("trunk_lr", training.trunk_lr is not None), ("layer_decay", training.layer_decay != 1)):
        message = (
            f"--training.{key} has no effect: both trunks are frozen (model.speech.train and model.image.train none)"
        )
        rules.append((changed and not trained, message))
    return rules


def _spectrogram_rules(speech: Speech) -> list[Rule]:
    bins = speech.mel_bins
    key = f"--model.speech.mel_bins {bins}"
    return [
        (bins != 0 and not 8 <= bins <= 128, f"{key}; expected 8 to 128, or 0 for the waveform"),
        (
            bins > 0 and speech.trunk is not None,
            f"{key} would replace the waveform that --model.speech.trunk was trained with: set it to 0, or train from "
            "random weights",
        ),
        (
            bins > 0 and speech.train != "all",
            f"--model.speech.train {speech.train} would leave random convolutions untrained: set it to all, or "
            "--model.speech.mel_bins to 0",
        ),
        (
            bins > 0 and speech.architecture == "whisper",
            f"{key}: Whisper has a spectrogram of its own; set it to 0, and num_mel_bins in model.speech.config",
        ),
        (
            bins > 0 and speech.filterbank,
            "--model.speech.filterbank initializes a convolution over the waveform, and --model.speech.mel_bins "
            "replaces the waveform: set one of them to false or 0",
        ),
        (
            bins > 0 and speech.config.get("feat_extract_norm", "group") != "layer",
            f"{key} needs feat_extract_norm: layer in model.speech.config",
        ),
    ]


def stem_supports(patch_size: Any, hidden_size: Any) -> bool:
    """Whether a convolutional stem can embed patches: a power of 2 pixels from 2, and a multiple of 4 channels."""
    if not isinstance(patch_size, int) or not isinstance(hidden_size, int):
        return False
    return patch_size >= 2 and patch_size & (patch_size - 1) == 0 and hidden_size > 0 and hidden_size % 4 == 0


def _training_rules(config: Config) -> list[Rule]:
    training = config.training
    return [
        (training.min_lr > training.lr, f"--training.min_lr {training.min_lr} is above --training.lr {training.lr}"),
        (len(training.betas) != 2, f"--training.betas is {training.betas}; expected two numbers"),
        (
            training.batch_size % training.accumulation != 0,
            f"--training.batch_size {training.batch_size} is not divisible by --training.accumulation "
            f"{training.accumulation}",
        ),
        (
            training.stop_after is not None and training.stop_after < 1,
            f"--training.stop_after is {training.stop_after}; expected 1 or more, or null",
        ),
    ]


# Limits of the ranges of data.augment.
_AUGMENT_LIMITS: dict[tuple[float, float], str] = {
    (0.5, 2): "speech.speed_range speech.tempo_range image.crop_aspect",
    (-12, 12): "speech.pitch_semitones",
    (0.7, 1.4): "speech.formants_range",
    (0.01, 5): "speech.reverberation_seconds",
    (-30, 100): "speech.reverberation_db speech.noise_snr speech.babble_snr",
    (-40, 40): "speech.equalizer_db speech.gain_db",
    (1, 8000): "speech.band_low speech.band_high",
    (0, 0.5): "speech.frequency_mask_width",
    (0, 10): "speech.time_mask_seconds",
    (0.01, 1): "image.crop_area",
    (0, 3): "image.brightness image.contrast image.saturation",
    (-0.5, 0.5): "image.hue",
}


def _augment_rules(config: Config) -> list[Rule]:
    rules = []
    for (low, high), keys in _AUGMENT_LIMITS.items():
        for key in keys.split():
            value = attrgetter(key)(config.data.augment)
            is_valid = len(value) == 2 and low <= value[0] <= value[1] <= high
            expected = f"two numbers from {low} to {high}, the smaller first"
            rules.append((not is_valid, f"--data.augment.{key} is {value}; expected {expected}"))
    low_cutoffs, high_cutoffs = config.data.augment.speech.band_low, config.data.augment.speech.band_high
    no_band = len(low_cutoffs) == len(high_cutoffs) == 2 and low_cutoffs[1] >= high_cutoffs[0]
    expected = f"cutoffs below those of data.augment.speech.band_high, {high_cutoffs}"
    rules.append((no_band, f"--data.augment.speech.band_low is {low_cutoffs}; expected {expected}"))
    return rules


def batch_warnings(config: Config, world_size: int) -> list[str]:
    """Warn about objectives that train poorly with these steps or micro-batches, which no error would reveal.

    Args:
        config: The configuration.
        world_size: Number of ranks.

    Returns:
        One line per problem, with the value to set.

    Raises:
        UserError: The batch size is not divisible by ranks times accumulation.
    """
    micro, objectives = micro_batch(config, world_size), config.objectives
    matching, denoising = objectives.matching, objectives.denoising
    candidates = micro * (world_size if matching.negatives == "global" else 1)
    pairs = f"{micro} pair{'s' * (micro > 1)} per rank and micro-batch"
    advice = "raise --training.batch_size, or lower the number of ranks or --training.accumulation"
    warnings = []
    if (matching.weight or denoising.weight) and objectives.coarse_steps >= config.training.steps:
        warnings.append(
            f"--objectives.coarse_steps {objectives.coarse_steps}: all of {config.training.steps} steps train SIC "
            "alone; lower it, or raise --training.steps"
        )
    if matching.weight > 0 and candidates == 1:
        other = "" if world_size == 1 else ", or set --objectives.matching.negatives global"
        warnings.append(
            f"{pairs}: SIM has no other pair to sample negatives from and sees matching pairs only; {advice}{other}"
        )
    if denoising.weight > 0 and denoising.noise == "swap":
        if micro == 1:
            warnings.append(
                f"{pairs}: CMD has no other row to swap tokens with, and its loss is 0; {advice}, or set "
                "--objectives.denoising.noise gaussian"
            )
        elif micro % denoising.swap_group and micro < config.training.batch_size:
            divisors = [size for size in range(2, micro + 1) if micro % size == 0]
            best = min(divisors, key=lambda size: (abs(size - denoising.swap_group), size))
            warnings.append(
                f"{pairs}: --objectives.denoising.swap_group {denoising.swap_group} does not divide this number, so "
                f"CMD's noise depends on the number of ranks; set it to {best}"
            )
    return warnings
