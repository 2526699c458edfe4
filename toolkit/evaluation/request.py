"""What is evaluated: the command line of `toolkit/evaluate.py`, and which evaluation is the run's final one."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from toolkit.config.load import SAVED, Parser, parse
from toolkit.config.schema import Config
from toolkit.evaluation.results import FOLDER
from toolkit.run_folder import existing_exports, find_export, load_run, read_step, trained_data

if TYPE_CHECKING:
    from shards.manifest import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One command: a checkpoint and the data sets that it is evaluated on.

    Attributes:
        config: The run's configuration, or a model's preprocessing, with overrides from the command line.
        run: Run folder; None: a model without one.
        source: The run, or the model as it was named.
        export: Folder of the exported model.
        datasets: Shards and split of each data set.
        rerank: Candidates per query to re-rank; 0: none.
        by: Attributes of captions to group recall by.
        protocols: Whether to compare protocols.
        json: Whether to print JSON rather than tables.
        out: Folder of the results.
    """

    config: Config
    run: Path | None
    source: str
    export: Path
    datasets: list[tuple[str, str]]
    rerank: int
    by: list[str]
    protocols: bool
    json: bool
    out: Path


def build_parser(description: str | None) -> Parser:
    """Build the command line: what to evaluate and how, or which stored results to show."""
    parser = Parser(description)
    add = parser.add_argument
    add("--split", help="split to evaluate (default: final.split)")
    rerank = "candidates per query to re-rank (default: final.rerank, or 0 if the run trained no matching head)"
    add("--rerank", type=int, metavar="K", help=rerank)
    add("--checkpoint", metavar="best|last|DIR", help="exported model (default: best, else last)")
    add("--datasets", nargs="+", metavar="DIR[:SPLIT]", help="data sets to evaluate on, in place of data.shards")
    add("--model", metavar="FOLDER", help="exported folder or hub id, in place of --run; needs --out")
    add("--out", type=Path, metavar="DIR", help="folder of the results of --model")
    add("--by", nargs="+", metavar="NAME", help="groups of captions: speaker, language, accent, duration, words")
    add(
        "--protocols", action="store_true", help="compare protocols: length of the audio, score of re-ranking, measures"
    )
    add("--results", nargs="+", type=Path, metavar="RUN", help="show the stored results of runs, and evaluate nothing")
    add("--compare", nargs=2, type=Path, metavar="RUN", help="paired test of two runs' stored results, or of two files")
    add("--json", action="store_true", help="print JSON rather than tables")
    return parser


def read_arguments(arguments: list[str], description: str | None = None) -> Request:
    """Parse the command line of an evaluation.

    Raises:
        UserError: An option is wrong, or the run or model does not exist.
    """
    parser = build_parser(description)
    named = parser.parse_known_args(arguments)[0]
    if named.model is not None:
        config, run, export = _read_model(arguments, parser)
        source = named.model
    else:
        config, run = _read_run(arguments, parser)
        export, source = find_export(run, named.checkpoint), str(run)
    k = config.final.rerank if named.rerank is None else named.rerank
    if k < 0:
        raise UserError(f"--rerank {k}: expected a number of candidates, or 0")
    if k and run and (reason := why_no_matching(load_run(run), export)):
        if named.rerank:
            raise UserError(f"--rerank {k}: {run} {reason}: leave --rerank out, or evaluate a run that trained one")
        logger.warning("not re-ranked: %s %s", run, reason)
        k = 0
    split = named.split or config.final.split or "test"
    datasets = [split_name(name, split) for name in named.datasets or [config.data.shards]]
    by = [name for word in named.by or [] for name in word.split(",") if name]
    out = run / FOLDER if run else named.out
    return Request(config, run, source, export, datasets, k, by, named.protocols, named.json, out)


def why_no_matching(trained: Config, export: Path) -> str | None:
    """Say why the matching head of a run's exported model has not been trained; None: it has, or this is not known."""
    if not trained.objectives.matching.weight:
        return "trained no matching head (objectives.matching.weight 0)"
    step, first = read_step(export), trained.objectives.coarse_steps
    if step is not None and step <= first and trained.training.resume == "auto":
        return f"trains the matching head after step {first} (objectives.coarse_steps), and {export.name} is of {step}"
    return None


def _read_run(arguments: list[str], parser: Parser) -> tuple[Config, Path]:
    config, options = parse(arguments, parser)
    run = config.run
    saved = Path(run) / SAVED
    if not saved.is_file():
        raise UserError(f"{run} is not a run folder (no {SAVED}): train first, or name the run with --run DIR")
    if options.out is not None:
        raise UserError(f"--out {options.out} is for --model: the results of a run are written to {Path(run) / FOLDER}")
    return parse([*arguments, "--config", str(saved), "--run", run], parser)[0], Path(run)


def _read_model(arguments: list[str], parser: Parser) -> tuple[Config, None, Path]:
    """Read the preprocessing of an exported model; everything else has its default value."""
    from toolkit.indexing.encoder import find_model
    from toolkit.model.processor import SpeechImageProcessor

    options = parser.parse_known_args(arguments)[0]
    given = {argument.partition("=")[0] for argument in arguments}
    if "--run" in given:
        raise UserError("--model and --run exclude each other: name a run, or a model without one")
    if options.out is None:
        raise UserError("--model needs --out DIR, the folder of its results")
    if options.datasets is None and "--data.shards" not in given:
        raise UserError("--model needs --datasets DIR[:SPLIT], the data sets to evaluate on")
    folder = find_model(options.model, options.checkpoint)
    processor = SpeechImageProcessor.from_pretrained(folder)
    initial = Config()
    initial.data.image_size, initial.data.resize = processor.image_size, processor.resize
    initial.evaluation.max_seconds = processor.max_seconds
    try:
        weight = json.loads((folder / "config.json").read_bytes()).get("match_weight")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read as a model's configuration ({error})") from None
    if weight is None:
        initial.final.rerank = 0
    config = parse(arguments, parser, initial)[0]
    if weight is None and (options.rerank or config.final.rerank) and config.evaluation.fuse == "fitted":
        raise UserError(
            f"{options.model} has no fitted weight of the match logit, and perhaps no trained matching head: "
            "evaluate with --rerank 0, or with --evaluation.fuse sum or matching"
        )
    return config, None, folder


def split_name(name: str, default: str) -> tuple[str, str]:
    """Split DIR[:SPLIT] into the shards, a folder or URL, and the split."""
    from shards.manifest import SPLIT

    folder, colon, split = name.rpartition(":")
    if not colon or Path(name).exists() or not SPLIT.fullmatch(split):
        return name, default
    return folder, split


def is_final(config: Config, manifest: "Manifest", split: str, k: int, export: Path) -> bool:
    """Return whether this is the run's final evaluation.

    That is its final split of its own shards, with its settings and its best model (the last, if there is no best).

    Args:
        config: The run's configuration with overrides from the command line.
        manifest: The shards.
        split: Name of the evaluated split.
        k: Number of re-ranked candidates per query.
        export: The exported model.
    """
    run, trained = Path(config.run), load_run(config.run)
    final_export = next(iter(existing_exports(run, ["best", "last"])), export)
    settings = [  # of this evaluation, and of the final one
        (k, 0 if why_no_matching(trained, export) else trained.final.rerank),
        (config.evaluation.fuse, trained.evaluation.fuse if k else config.evaluation.fuse),
        (config.evaluation.max_seconds, trained.evaluation.max_seconds),
        (config.data.image_size, trained.data.image_size),
        (config.data.resize, trained.data.resize),
        (export.resolve(), final_export.resolve()),
        (split, trained.final.split or "test"),
    ]
    return all(this == final for this, final in settings) and _is_training_data(trained, config, manifest)


def _is_training_data(trained: Config, config: Config, manifest: "Manifest") -> bool:
    """Whether the run was trained on these shards: by checksum if it has a checkpoint, else by location."""
    checksums = None if trained.data.mixture else trained_data(Path(config.run))
    if checksums is not None:
        return manifest.hash in checksums
    locations = (trained.data.shards, manifest.location)
    return len({place if "://" in place else str(Path(place).resolve()) for place in locations}) == 1
