"""Measure a trained model: `python toolkit/evaluate.py --run DIR --split test --rerank K [--section.key value ...]`."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import UserError, run_main
from toolkit.config.load import SAVED, Parser, parse
from toolkit.config.schema import Config
from toolkit.run_folder import load_run

if TYPE_CHECKING:
    from shards.manifest import Manifest
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.model.retrieval import SpeechImageModel

RECALL, GALLERY = "recall.json", "retrieved.png"


def main(arguments: list[str] | None = None) -> None:
    """Print recall in both directions and write it to the run folder, with a picture of retrieved examples.

    The run's final evaluation, as it is configured, is RUN/recall.json and RUN/retrieved.png; any other has file names
    that say what it is of.

    Args:
        arguments: Command-line arguments; default: those of this process.

    Raises:
        UserError: The run, its exported model, the shards or the split are not there.
    """
    config, split, k, checkpoint = read_arguments(sys.argv[1:] if arguments is None else arguments)
    run = Path(config.run)
    export = find_export(run, checkpoint)

    from shards.files import atomic_write
    from shards.manifest import load

    manifest = load(config.data.shards)
    manifest.rows(split)  # an unknown split is told before the model is loaded

    from toolkit.distributed import initialise
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.gallery import save_gallery
    from toolkit.evaluation.retrieve import retrieve

    rank, world_size, device = initialise()
    model = load_model(export)
    model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    process = ProcessInfo(rank, world_size, device, show_progress=rank == 0)
    if k and config.evaluation.fuse == "fitted" and model.config.match_weight is None:
        fit_match_weight(model, config, k, process)
    found = retrieve(model, manifest, split, config, k, process)
    if rank == 0:
        report = found.report | {"shards": config.data.shards, "checkpoint": export.name, "step": read_step(export)}
        suffix = result_suffix(config, manifest, split, k, export)
        recall, gallery = (with_suffix(run / name, suffix) for name in (RECALL, GALLERY))
        with atomic_write(recall) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
        save_gallery(manifest, found, gallery)
        print(table(report, manifest.corpus))
        print(f"recall: {recall}{f' ({RECALL} is for the final evaluation as configured)' if suffix else ''}")
        print(f"examples of what was retrieved: {gallery}")


def read_arguments(arguments: list[str]) -> tuple[Config, str, int, str | None]:
    """Read the command line: the run's own configuration with overrides, split, candidates to re-rank, checkpoint.

    Raises:
        UserError: An option is wrong, or there is no run.
    """
    parser = Parser(__doc__)
    parser.add_argument("--split", help="split to evaluate (default: final.split)")
    parser.add_argument("--rerank", type=int, metavar="K", help="answers a query to reorder (default: final.rerank)")
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
        print("not re-ranked: this run trained no matching head (objectives.matching.weight 0)", file=sys.stderr)
        k = 0
    return config, options.split or config.final.split or "test", k, options.checkpoint


def fit_match_weight(model: "SpeechImageModel", config: Config, k: int, process: "ProcessInfo") -> None:
    """Fit the weight of the match score on the run's own dev split, for a model that was exported without one.

    Raises:
        UserError: The run's shards or their dev split are not there.
    """
    from shards.manifest import load
    from toolkit.evaluation.retrieve import retrieve

    own = load_run(config.run)
    manifest = load(own.data.shards)
    if process.rank == 0:
        print(f"fitting the weight of the match score on {own.data.dev}: the model was exported without one")
    retrieve(model, manifest, own.data.dev, own, k, process, fit=True)


def find_export(run: Path, checkpoint: str | None) -> Path:
    """Find the exported model of a run, or any folder that `save_pretrained` wrote.

    Raises:
        UserError: There is none.
    """
    names = ["best", "last"] if checkpoint is None else [checkpoint]
    for folder in _exports(run, names):
        return folder
    if checkpoint is None:
        raise UserError(f"{run} holds no exported model yet: training writes one when it evaluates or saves")
    there = ", ".join(sorted(path.parent.name for path in (run / "export").glob("[!.]*/config.json"))) or "nothing"
    raise UserError(f"no exported model {checkpoint}: {run / 'export'} holds {there}")


def _exports(run: Path, names: list[str]) -> Iterator[Path]:
    """The exported models of these names or paths that are there."""
    for folder in [run / "export" / name for name in names] + [Path(name) for name in names if os.sep in name]:
        if (folder / "config.json").is_file():
            yield folder


def result_suffix(config: Config, manifest: "Manifest", split: str, k: int, export: Path) -> str:
    """What the file names of an evaluation's result carry, beside `recall` and `retrieved`.

    Args:
        config: The run's configuration, with what the command line has changed.
        manifest: The shards.
        split: The split evaluated.
        k: Answers to a query that were reordered.
        export: The exported model.

    Returns:
        Nothing for the run's final evaluation as configured: its split of its own shards, with its settings and its
        best model, or its last where there is no best. Else the split, the checksum of the shards, and the settings
        that differ.
    """
    run, own = Path(config.run), load_run(config.run)
    matching = own.objectives.matching.weight > 0
    final_export = next(iter(_exports(run, ["best", "last"])), export)
    settings = {  # as they are, and as in the final evaluation
        "rerank": (k, own.final.rerank if matching else 0),
        "fuse": (config.evaluation.fuse, own.evaluation.fuse if k else config.evaluation.fuse),
        "max_seconds": (config.evaluation.max_seconds, own.evaluation.max_seconds),
        "image_size": (config.data.image_size, own.data.image_size),
        "resize": (config.data.resize, own.data.resize),
        "checkpoint": (export.resolve(), final_export.resolve()),
    }
    differing = [f"-{name}-{getattr(here, 'name', here)}" for name, (here, final) in settings.items() if here != final]
    if not differing and split == (own.final.split or "test") and _is_own_data(own, config, manifest):
        return ""
    return "-".join(["", quote(split, safe=""), manifest.hash[:8]]) + "".join(differing)


def _is_own_data(own: Config, config: Config, manifest: "Manifest") -> bool:
    """Whether shards are the run's own, wherever they lie: by the checksum that its checkpoints know, or by name."""
    from toolkit.training.checkpointing.progress import MARKER, read_marker

    markers = sorted(Path(config.run).glob(f"checkpoints/step-*/{MARKER}"), reverse=True)
    for path in [] if own.data.mixture else markers:
        if not isinstance(saved := read_marker(path.parent), str):
            return manifest.hash in saved.data
    names = (own.data.shards, config.data.shards)
    return len({name if "://" in name else str(Path(name).resolve()) for name in names}) == 1


def with_suffix(path: Path, suffix: str) -> Path:
    """The path with something more at the end of its name, before the dot."""
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def load_model(export: Path) -> "SpeechImageModel":
    """Load an exported model in the precision it was written in.

    Raises:
        UserError: The folder holds no such model.
    """
    from safetensors import SafetensorError

    from toolkit.model.retrieval import SpeechImageModel

    try:
        return SpeechImageModel.from_pretrained(export, dtype="auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{export} cannot be loaded as a model: {str(error).splitlines()[0]}") from error


def read_step(export: Path) -> int | None:
    """Training step of an exported model, where the trainer left it."""
    path = export / "progress.json"
    return json.loads(path.read_text())["step"] if path.is_file() else None


def table(report: dict[str, Any], corpus: str) -> str:
    """Lay a report out for reading."""
    step = "" if report["step"] is None else f" (step {report['step']:,})"
    size = f"{report['pictures']:,} pictures, {report['captions']:,} spoken captions"
    lines = [
        f"{corpus} {report['split']}, checkpoint {report['checkpoint']}{step}: {size}",
        f"{'per cent':<18}{'speech to image':>23}{'image to speech':>25}{'mean':>9}",
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
        lines.append(f"re-ranking takes one rank {1000 * reranked['seconds_per_query']:.1f} ms a query")
    if report["twins"]:
        kinds = {"twins": report["twins"]} | {f"  {kind}": each for kind, each in report["twins"]["kinds"].items()}
        lines.append(f"\n{'right of two twins':<20}{'coarse':>8}{'matching':>10}   chance 50.0")
        for kind, each in kinds.items():
            matching = "" if each["matching"] is None else f"{each['matching']:.1f}"
            lines.append(f"{kind:<20}{each['coarse']:>8.1f}{matching:>10}")
    return "\n".join(lines)


def cli() -> None:
    """Entry point of the console command: print a `UserError` as one line, and exit with its code."""
    run_main(main)


if __name__ == "__main__":
    cli()
