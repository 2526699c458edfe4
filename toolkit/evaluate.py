"""Measure a trained model: `python toolkit/evaluate.py --run DIR --split test --rerank K [--section.key value ...]`."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import UserError, run_main
from toolkit.config.load import SAVED, Parser, parse
from toolkit.config.schema import Config
from toolkit.run_folder import existing_exports, find_export, load_model, load_run, read_step, trained_data

if TYPE_CHECKING:
    from shards.manifest import Manifest
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.model.retrieval import SpeechImageModel

logger = logging.getLogger(__name__)

RECALL, GALLERY = "recall.json", "retrieved.png"


def main(arguments: list[str] | None = None) -> None:
    """Print recall in both directions and write it to the run folder, with an image of retrieved examples.

    The final evaluation with the run's own settings is written to RUN/recall.json and RUN/retrieved.png; any other
    evaluation has its settings in the file names (see `result_suffix`).

    Args:
        arguments: Command-line arguments; default: those of this process.

    Raises:
        UserError: The run, its exported model, the shards or the split do not exist.
    """
    config, split, k, checkpoint = read_arguments(sys.argv[1:] if arguments is None else arguments)
    run = Path(config.run)
    export = find_export(run, checkpoint)

    from shards.files import atomic_write
    from shards.manifest import load

    manifest = load(config.data.shards)
    manifest.rows(split)  # fail on an unknown split before the model is loaded

    from toolkit.distributed import initialise
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.examples import save_examples
    from toolkit.evaluation.gallery import save_gallery
    from toolkit.evaluation.retrieve import retrieve
    from toolkit.reporting.run_report import write_report

    rank, world_size, device = initialise()
    model = load_model(export)
    model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    process = ProcessInfo(rank, world_size, device, show_progress=rank == 0)
    if k and config.evaluation.fuse == "fitted" and model.config.match_weight is None:
        fit_match_weight(model, config, k, process)
    retrieval = retrieve(model, manifest, split, config, k, process)
    if rank == 0:
        source = {"shards": config.data.shards, "checkpoint": export.name, "step": read_step(export)}
        report = retrieval.report | source
        suffix = result_suffix(config, manifest, split, k, export)
        recall, gallery = (add_suffix(run / name, suffix) for name in (RECALL, GALLERY))
        with atomic_write(recall) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
        save_gallery(manifest, retrieval, gallery)
        if not suffix:  # the final evaluation is a part of the run's report
            save_examples(run, None, manifest, retrieval, config)
            write_report(run)
        print(format_table(report, manifest.corpus), flush=True)
        note = f" ({RECALL} is reserved for the final evaluation with the run's own settings)" if suffix else ""
        logger.info("recall: %s%s", recall, note)
        logger.info("retrieved examples: %s", gallery)


def read_arguments(arguments: list[str]) -> tuple[Config, str, int, str | None]:
    """Parse the command line: the run's configuration with overrides, split, candidates to re-rank, checkpoint.

    Raises:
        UserError: An option is wrong, or the run does not exist.
    """
    parser = Parser(__doc__)
    parser.add_argument("--split", help="split to evaluate (default: final.split)")
    parser.add_argument(
        "--rerank", type=int, metavar="K", help="candidates per query to re-rank (default: final.rerank)"
    )
    parser.add_argument("--checkpoint", metavar="best|last|DIR", help="exported model (default: best, else last)")
    run = parse(arguments, parser)[0].run
    saved = Path(run) / SAVED
    if not saved.is_file():
        raise UserError(f"{run} is not a run folder (no {SAVED}): train first, or name the run with --run DIR")
    config, options = parse([*arguments, "--config", str(saved), "--run", run], parser)
    k = config.final.rerank if options.rerank is None else options.rerank
    if k < 0:
        raise UserError(f"--rerank {k}: expected a number of candidates, or 0")
    if k and not config.objectives.matching.weight:
        logger.warning("not re-ranked: this run trained no matching head (objectives.matching.weight 0)")
        k = 0
    return config, options.split or config.final.split or "test", k, options.checkpoint


def fit_match_weight(model: "SpeechImageModel", config: Config, k: int, process: "ProcessInfo") -> None:
    """Fit the weight of the match logit on the run's development split, for a model that was exported without one.

    Raises:
        UserError: The run's shards or their development split do not exist.
    """
    from shards.manifest import load
    from toolkit.evaluation.retrieve import retrieve

    trained = load_run(config.run)
    manifest = load(trained.data.shards)
    logger.info("fitting the weight of the match logit on %s: the model was exported without one", trained.data.dev)
    retrieve(model, manifest, trained.data.dev, trained, k, process, fit=True)


def result_suffix(config: Config, manifest: "Manifest", split: str, k: int, export: Path) -> str:
    """Suffix of the result files' names, by which evaluations with different settings are distinguished.

    Args:
        config: The run's configuration with overrides from the command line.
        manifest: The shards.
        split: Name of the evaluated split.
        k: Number of re-ranked candidates per query.
        export: The exported model.

    Returns:
        An empty string for the run's final evaluation: its final split of its own shards, with its settings and its
        best model (the last, if there is no best). Otherwise the split, the checksum of the shards, and the settings
        that differ from the final evaluation's.
    """
    run, trained = Path(config.run), load_run(config.run)
    matching = trained.objectives.matching.weight > 0
    final_export = next(iter(existing_exports(run, ["best", "last"])), export)
    settings = {  # of this evaluation, and of the final one
        "rerank": (k, trained.final.rerank if matching else 0),
        "fuse": (config.evaluation.fuse, trained.evaluation.fuse if k else config.evaluation.fuse),
        "max_seconds": (config.evaluation.max_seconds, trained.evaluation.max_seconds),
        "image_size": (config.data.image_size, trained.data.image_size),
        "resize": (config.data.resize, trained.data.resize),
        "checkpoint": (export.resolve(), final_export.resolve()),
    }
    differing = [f"-{name}-{getattr(this, 'name', this)}" for name, (this, final) in settings.items() if this != final]
    if not differing and split == (trained.final.split or "test") and _is_training_data(trained, config, manifest):
        return ""
    return "-".join(["", quote(split, safe=""), manifest.hash[:8]]) + "".join(differing)


def _is_training_data(trained: Config, config: Config, manifest: "Manifest") -> bool:
    """Whether the run was trained on these shards: by checksum if it has a checkpoint, else by location."""
    checksums = None if trained.data.mixture else trained_data(Path(config.run))
    if checksums is not None:
        return manifest.hash in checksums
    locations = (trained.data.shards, config.data.shards)
    return len({place if "://" in place else str(Path(place).resolve()) for place in locations}) == 1


def add_suffix(path: Path, suffix: str) -> Path:
    """Append a suffix to the stem of a file name."""
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def format_table(report: dict[str, Any], corpus: str) -> str:
    """Format a report as a table."""
    step = "" if report["step"] is None else f" (step {report['step']:,})"
    size = f"{report['pictures']:,} pictures, {report['captions']:,} spoken captions"
    lines = [
        f"{corpus} {report['split']}, checkpoint {report['checkpoint']}{step}: {size}",
        f"{'percent':<18}{'speech to image':>23}{'image to speech':>25}{'mean':>9}",
        f"{'':<18}{'R@1':>7}{'R@5':>8}{'R@10':>8}{'R@1':>9}{'R@5':>8}{'R@10':>8}{'R@1':>9}",
    ]
    reranked = report["reranked"]
    rows = {"coarse": report["coarse"], f"best {reranked['k']} re-ranked" if reranked else "": reranked}
    for name, recall in rows.items():
        if recall:
            s2i, i2s = recall["speech_to_image"].values(), recall["image_to_speech"].values()
            widths = zip((*s2i, *i2s, recall["mean_R@1"]), (7, 8, 8, 9, 8, 8, 9), strict=True)
            lines.append(f"{name:<18}" + "".join(f"{value:>{width}.1f}" for value, width in widths))
    if reranked:
        lines.append(f"re-ranking time: {1000 * reranked['seconds_per_query']:.1f} ms per query and rank")
    if pairs := report["twins"]:
        accuracies = {"all": pairs} | {f"  {kind}": accuracy for kind, accuracy in pairs["kinds"].items()}
        lines.append(f"\n{'minimal pairs':<20}{'coarse':>8}{'matching':>10}   accuracy, chance 50.0")
        for kind, accuracy in accuracies.items():
            matching = "" if accuracy["matching"] is None else f"{accuracy['matching']:.1f}"
            lines.append(f"{kind:<20}{accuracy['coarse']:>8.1f}{matching:>10}")
    return "\n".join(lines)


def cli() -> None:
    """Console entry point: print a `UserError` as one line, and exit with its code."""
    run_main(main)


if __name__ == "__main__":
    cli()
