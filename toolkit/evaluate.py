"""Measure a trained model: `python toolkit/evaluate.py --run DIR --split test --rerank K [--section.key value ...]`.

Also `--datasets DIR[:SPLIT] ...` (zero-shot), `--by speaker,language,accent,duration,words`, `--protocols`,
`--model FOLDER --out DIR`; and of stored results `--results RUN ...` and `--compare RUN RUN`.
"""

import json
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import run_main
from shards.logs import setup_logging
from toolkit.config.schema import Config, Fuse
from toolkit.evaluation.request import Request, build_parser, is_final, read_arguments
from toolkit.evaluation.results import Result, save_result
from toolkit.evaluation.summaries.stored import show_stored
from toolkit.run_folder import RECALL, load_model, load_run, read_step

if TYPE_CHECKING:
    from shards.manifest import Manifest
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.evaluation import Checkpoint, SplitEvaluation
    from toolkit.model.retrieval import SpeechImageModel

logger = logging.getLogger(__name__)

RETRIEVED = "retrieved.png"


def main(arguments: list[str] | None = None) -> None:
    """Print recall in both directions and write it to RUN/results, with an image of retrieved examples.

    The final evaluation with the run's own settings is also written to RUN/recall.json and RUN/retrieved.png.

    Args:
        arguments: Command-line arguments; default: those of this process.

    Raises:
        UserError: The run, its exported model, the shards or the split do not exist.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = build_parser(__doc__).parse_known_args(arguments)
    if options.results or options.compare:
        show_stored(options, rest)
        return
    request = read_arguments(arguments, __doc__)
    if request.json:
        setup_logging("warning")  # standard output is JSON alone

    from shards.manifest import load

    data = [(load(shards), split) for shards, split in request.datasets]
    for manifest, split in data:
        manifest.rows(split)  # fail on an unknown split before the model is loaded

    from toolkit.distributed import init_distributed
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.evaluation import Checkpoint, checkpoint_name

    groups = [_groups(manifest, split, request.by) for manifest, split in data]
    rank, world_size, device = init_distributed()
    model = load_model(request.export)
    model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    process = ProcessInfo(rank, world_size, device, show_progress=rank == 0)
    if request.run and request.rerank and request.config.evaluation.fuse == "fitted" and not _is_fitted(model):
        fit_match_weight(model, request.config, request.rerank, process)
    of_hub = request.run is None and not Path(request.source).exists()
    name = request.source if of_hub else checkpoint_name(request.export, request.run)
    checkpoint = Checkpoint(model, request.source, name, read_step(request.export))
    results = []
    for (manifest, split), names in zip(data, groups, strict=True):
        for evaluation in evaluate(request, checkpoint, manifest, split, names, process):
            results.append(store(request, evaluation, manifest, split))
    if rank == 0:
        from toolkit.evaluation.summaries.tables import format_evaluations

        as_json = json.dumps([result.report for result in results], indent=1)
        print(as_json if request.json else format_evaluations(results, request.protocols), flush=True)


def _groups(manifest: "Manifest", split: str, by: list[str]) -> dict[str, list[str]]:
    from shards.reading.caption_attributes import read_caption_attributes
    from toolkit.evaluation.summaries.groups import group_captions

    attributes = read_caption_attributes(manifest, split) if by else None
    return {name: group_captions(attributes, name) for name in by} if attributes else {}


def _is_fitted(model: "SpeechImageModel") -> bool:
    return model.config.match_weight is not None


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


def evaluate(
    request: Request,
    checkpoint: "Checkpoint",
    manifest: "Manifest",
    split: str,
    groups: dict[str, list[str]],
    process: "ProcessInfo",
) -> "list[SplitEvaluation]":
    """Evaluate one data set under the requested protocol, or under all of them."""
    from toolkit.evaluation.evaluation import audio_limits, evaluate_split

    # The shards may differ from those of the configuration, of which readers need the location.
    config = replace(request.config, data=replace(request.config.data, shards=manifest.location))
    if not request.protocols:
        return evaluate_split(checkpoint, manifest, split, config, request.rerank, process, groups)
    fuses = [fuse for fuse in get_args(Fuse) if fuse != "fitted" or _is_fitted(checkpoint.model)]
    evaluations = []
    for seconds in audio_limits(manifest, split, config.evaluation.max_seconds):
        cut = replace(config, evaluation=replace(config.evaluation, max_seconds=seconds))
        evaluations += evaluate_split(checkpoint, manifest, split, cut, request.rerank, process, groups, fuses)
    return evaluations


def store(request: Request, evaluation: "SplitEvaluation", manifest: "Manifest", split: str) -> Result:
    """Write the result of one evaluation, and its image of retrieved examples; on rank 0."""
    from shards.files import atomic_write
    from toolkit.evaluation.example_sheet import save_example_sheet
    from toolkit.evaluation.examples import save_examples

    result = save_result(request.out, evaluation.report, evaluation.columns)
    config, sheet, run = evaluation.config, result.path.with_suffix(".png"), request.run
    if run and is_final(config, manifest, split, request.rerank, request.export):
        with atomic_write(run / RECALL) as file:
            final = {name: result.report[name] for name in evaluation.report}
            file.write(json.dumps(final, indent=1).encode() + b"\n")
        sheet = run / RETRIEVED
        logger.info("recall: %s", run / RECALL)
    else:
        logger.info("recall: %s", result.path)
    save_example_sheet(manifest, evaluation.retrieval, sheet)
    if run and sheet == run / RETRIEVED:  # the final evaluation is a part of the run's report
        from toolkit.reporting.run_report import write_report

        save_examples(run, None, manifest, evaluation.retrieval, config)
        write_report(run)
    logger.info("retrieved examples: %s", sheet)
    return result


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
