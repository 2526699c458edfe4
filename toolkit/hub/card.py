"""What an exported folder says of itself: the model card README.md, and modules.json for sentence-transformers.

The card states only what the folder and its run hold: config.json, recall.json, config.yaml, environment.json, and the
manifests of the training data whose checksums the run's checkpoint names. What is unknown is left out.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.files import read_object
from toolkit.run_folder import ENVIRONMENT, PROGRESS, RECALL, load_run, trained_data

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from shards.manifest import Manifest
    from toolkit.config.schema import Config

logger = logging.getLogger(__name__)

CARD = "README.md"
MARK = "<!-- Written by share.py, which replaces this file; delete this line to keep your changes. -->"
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "toolkit.hub.sentence_transformer.SpeechImageModule"}]
_TAGS = ["speech-image-retrieval", "audio", "image", "sentence-transformers", "arxiv:2408.13119", "arxiv:2408.13705"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DIRECTION_NAMES = {"speech_to_image": "speech to image", "image_to_speech": "image to speech"}

_USE = """## Use

With the package speech-image-toolkit installed:

```python
import toolkit.hub.auto
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{name}"), AutoProcessor.from_pretrained("{name}")
images = model.get_image_features(**processor(images=["photo.jpg"]))  # [1, {size}], of unit length
speech = model.get_audio_features(**processor(speech=["query.wav"]))
similarity = speech @ images.T
```

or `SentenceTransformer("{name}", trust_remote_code=True).encode(["query.wav", "photo.jpg"])`.
"""


def write_modules(folder: Path) -> None:
    """Write `modules.json`, which names the class that sentence-transformers loads."""
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2))


def write_card(folder: Path, name: str) -> None:
    """Write a card of what the folder itself holds; share.py adds results, training and data."""
    if (folder / "config.json").is_file():
        (folder / CARD).write_text(str(model_card(folder, None, name)), encoding="utf-8")


def model_card(export: Path, run: Path | None, name: str, license_id: str | None = None) -> "ModelCard":
    """Describe an exported model; without a run folder the card has no results, training and data.

    Returns:
        The card; `str` of it is the content of README.md.

    Raises:
        UserError: `config.json` is damaged.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model, config = read_object(export / "config.json"), _config(run)
    if not isinstance(model.get("embed_dim"), int):
        raise UserError(f"{export / 'config.json'} is missing or damaged: pass a folder that training exported")
    recall = _recall(export, run)
    data = _manifests(run, config) if run and config else []
    data_name = _data_name(recall, config, data)
    results = list(_results(recall, data_name)) if data_name else []
    head = ModelCardData(
        base_model=_trunks(config) or None,
        eval_results=results or None,
        library_name="speech-image-toolkit",
        license=license_id,
        metrics=["recall"] if results else None,
        model_name=name if results else None,
        tags=_TAGS,
    )
    environment = read_object(run / ENVIRONMENT) if run else {}
    sections = [
        f"# {name}\n\nEmbeds spoken captions and images in one space of {model['embed_dim']} dimensions, so that a "
        "recording finds its image\nand an image its recordings, without text in between.\n",
        _USE.format(name=name if "/" in name else "path/to/this/folder", size=model["embed_dim"]),
        _table("Model", _model_rows(export, model)),
        _results_section(recall),
        _table("Training data", [row for manifest in data for row in _data_rows(manifest, config)]),
        _table("Training", _training_rows(export, config, environment)),
        MARK + "\n",
    ]
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(section for section in sections if section))


def current_card(export: Path, run: Path | None, name: str, license_id: str | None = None) -> str:
    """Return the card of a folder: its README.md if the user edited it, else a new one with the license of the old.

    Raises:
        UserError: The card in the folder, or config.json, cannot be parsed, or a license is given for the user's card.
    """
    from huggingface_hub import ModelCard

    path = export / CARD
    if not path.is_file():
        return str(model_card(export, run, name, license_id))
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        head = ModelCard(text).data
    except Exception as error:  # of the YAML, or of its values
        reason = " ".join(str(error).split())
        raise UserError(f"the head of {path} is not that of a model card: {reason}") from None
    if MARK in text:
        return str(model_card(export, run, name, license_id or getattr(head, "license", None)))
    if license_id:
        raise UserError(f"--license: {path} was edited and is kept as it is: set the license in its head")
    logger.info("%s was edited and is kept as it is", path)
    return text


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _config(run: Path | None) -> "Config | None":
    try:
        return load_run(run) if run else None
    except UserError as error:
        logger.warning("%s: left out of the model card", error)
        return None


def _recall(export: Path, run: Path | None) -> dict[str, Any]:
    """Read the run's final results, if they are those of this export."""
    recall = read_object(run / RECALL) if run else {}
    if recall and recall.get("step") != read_object(export / PROGRESS).get("step"):
        logger.warning("%s/recall.json is of another step than %s: left out of the model card", run, export)
        return {}
    return recall


def _manifests(run: Path, config: "Config") -> "list[Manifest]":
    """Read the manifests of the data that the run was trained on; those that are gone or were replaced are left out."""
    from shards.manifest import load

    trained, manifests = trained_data(run), []
    for location in config.data.mixture or {config.data.shards: 1.0}:
        try:
            manifest = load(location)
        except UserError as error:
            logger.warning("%s: left out of the model card", error)
            continue
        if trained is None or manifest.hash in trained:
            manifests.append(manifest)
        else:
            logger.warning("%s is not what %s was trained on: left out of the model card", location, run)
    return manifests


def _data_name(recall: Mapping[str, Any], config: "Config | None", data: "list[Manifest]") -> str:
    """Corpus of the evaluated shards, or the name of their folder; empty: unknown."""
    location = str(recall.get("shards", ""))
    if config and len(data) == 1 and location == config.data.shards:
        return data[0].corpus
    return location.rstrip("/").rpartition("/")[2]


def _trunks(config: "Config | None") -> list[str]:
    """Hub ids of the pretrained trunks."""
    names = [config.model.speech.trunk, config.model.image.trunk] if config else []
    return [name for name in names if name and _HUB_ID.fullmatch(name) and not Path(name).exists()]


def _rows(recall: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, float]]]:
    """Yield a label and the figures of each direction, before and after re-ranking."""
    for part, suffix in (("coarse", ""), ("reranked", ", re-ranked")):
        for key, label in _DIRECTION_NAMES.items():
            if figures := _mapping(_mapping(recall.get(part)).get(key)):
                yield label + suffix, figures


def _results(recall: Mapping[str, Any], data: str) -> "Iterable[EvalResult]":
    from huggingface_hub import EvalResult

    for label, figures in _rows(recall):
        for cutoff, value in figures.items():
            yield EvalResult(
                task_type="retrieval",
                task_name="Speech-image retrieval",
                dataset_type=data,
                dataset_name=data,
                dataset_split=str(recall.get("split", "")) or None,
                metric_type="recall",
                metric_name=f"{cutoff}, {label}",
                metric_value=value,
            )


def _results_section(recall: Mapping[str, Any]) -> str:
    rows = list(_rows(recall))
    if not rows:
        return ""
    cutoffs = list(rows[0][1])
    lines = [f"| | {' | '.join(cutoffs)} |", "|---" * (len(cutoffs) + 1) + "|"]
    lines += [
        f"| {label} | {' | '.join(str(figures.get(cutoff, '')) for cutoff in cutoffs)} |" for label, figures in rows
    ]
    counts = f"{recall.get('pictures')} images and {recall.get('captions')} spoken captions of the split"
    text = f"R@k, the percentage of queries with a correct result among the first k, on {counts} {recall.get('split')}:"
    return f"## Results\n\n{text}\n\n" + "\n".join(lines) + "\n"


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    known = [f"| {label} | {value} |" for label, value in rows if value not in (None, "", {}, [])]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *known, ""]) if known else ""


def _model_rows(export: Path, model: Mapping[str, Any]) -> list[tuple[str, Any]]:
    speech, image, fusion = (_mapping(model.get(part)) for part in ("speech", "image", "fusion"))
    return [
        ("parameters", _parameters(export)),
        ("speech encoder", _trunk_row(speech, "hubert")),
        ("image encoder", _trunk_row(image, "clip")),
        ("fusion encoder", fusion and f"{fusion.get('layers')} layers of width {fusion.get('width')}"),
    ]


def _trunk_row(part: Mapping[str, Any], default: str) -> str:
    trunk = _mapping(part.get("trunk"))
    layers, width = trunk.get("num_hidden_layers"), trunk.get("hidden_size")
    return f"{part.get('architecture', default)}, {layers} layers of width {width}" if layers and width else ""


def _parameters(export: Path) -> str:
    """Count the values in the weight files; only their headers are read."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for path in export.glob("*.safetensors"):
            with safe_open(path, "numpy") as weights:
                total += sum(prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return ""
    return f"{total:,}" if total else ""


def _data_rows(manifest: "Manifest", config: "Config | None") -> Iterable[tuple[str, Any]]:
    split = config.data.train if config else "train"
    rows = manifest.rows(split).tolist() if split in manifest.splits else []
    captions = [caption for sample in rows for caption in manifest.captions(sample)]
    hours = float(manifest.duration[captions].sum()) / 3600
    yield "corpus", f"{manifest.corpus}, split {split}"
    yield "content", f"{len(rows):,} images, {len(captions):,} spoken captions, {hours:.1f} hours"
    yield "SHA-256", manifest.hash


def _training_rows(export: Path, config: "Config | None", environment: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "steps", read_object(export / PROGRESS).get("step")
    if config:
        losses = config.objectives
        weights = {"SIC": losses.contrastive.weight, "SIM": losses.matching.weight, "CMD": losses.denoising.weight}
        yield "pairs per step", config.training.batch_size
        yield "loss weights", ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        yield "precision", config.training.precision
        yield "seed", config.seed
    yield "processes", environment.get("world_size")
    yield "GPUs", ", ".join(map(str, environment.get("gpus") or []))
    versions = {"python": environment.get("python"), **_mapping(environment.get("versions"))}
    yield "versions", ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    git = _mapping(environment.get("git"))
    yield "commit", git.get("commit") and f"{git['commit']}{' with uncommitted changes' if git.get('changed') else ''}"
