"""Examine a trained model: `python toolkit/analyze.py ANALYSIS --run DIR [--section.key value ...]`."""

import argparse
import dataclasses
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # import from the repository root, not from the script's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS
from shards.errors import UserError, run_main
from toolkit.config.load import SAVED, Parser, parse
from toolkit.config.schema import Config
from toolkit.evaluation.inside.result import FOLDER as INSIDE
from toolkit.evaluation.inside.result import format_inside, save_inside
from toolkit.evaluation.perturbations.kinds import KINDS, NOISE, parse_kinds
from toolkit.evaluation.request import why_no_matching
from toolkit.evaluation.robustness import (
    CLEAN,
    FOLDER,
    Robustness,
    format_robustness,
    read_robustness,
    result_name,
)
from toolkit.run_folder import find_export, load_model, load_run, read_step

if TYPE_CHECKING:
    import numpy as np

    from shards.manifest import Manifest
    from toolkit.evaluation.perturbations.suite import Noise

logger = logging.getLogger(__name__)

ANALYSES = {
    "robustness": "recall with perturbed speech and perturbed images",
    "text": "baselines by text: recognized speech, or the true transcripts, and a text-image model",
    "inside": "attention over patches, denoising, modality gap, ranks, hardest queries",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the analysis that the first argument names.

    Args:
        arguments: Command-line arguments; default: those of this process.

    Raises:
        UserError: There is no such analysis, an option is wrong, or the run, its exported model, the shards or the
            split do not exist.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    lines = "\n".join(f"  {name:<12}{line}" for name, line in ANALYSES.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{lines}\n\nanalyze.py ANALYSIS --help lists the options.")
        return
    name = arguments[0]
    if name not in ANALYSES:
        raise UserError(f"{name}: expected one of {', '.join(ANALYSES)}, as in analyze.py robustness --run DIR")
    parser = Parser(ANALYSES[name])
    parser.prog = f"analyze.py {name}"
    if name == "robustness":
        add_robustness(parser)
    elif name == "text":
        add_text(parser)
    analyze = {"robustness": robustness, "text": text, "inside": inside}[name]
    analyze(*read_arguments(arguments[1:], parser))


def read_arguments(arguments: list[str], parser: Parser) -> tuple[Config, argparse.Namespace]:
    """Parse the command line: the run's configuration with overrides, and the options.

    Raises:
        UserError: An option is wrong, or the run does not exist.
    """
    parser.add_argument("--split", help="split to evaluate (default: final.split)")
    parser.add_argument("--checkpoint", metavar="best|last|DIR", help="exported model (default: best, else last)")
    parser.add_argument("--limit", type=int, metavar="N", help="N pictures at equal distances over the split, not all")
    run = parse(arguments, parser)[0].run
    saved = Path(run) / SAVED
    if not saved.is_file():
        raise UserError(f"{run} is not a run folder (no {SAVED}): train first, or name the run with --run DIR")
    config, options = parse([*arguments, "--config", str(saved), "--run", run], parser)
    options.split = options.split or config.final.split or "test"
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: expected a number of pictures, at least 1")
    return config, options


def add_robustness(parser: Parser) -> None:
    """Add the options of the robustness suite."""
    kinds = "; ".join(f"{name}: {kind.meaning}, in {kind.unit}" for name, kind in KINDS.items()).replace("%", "%%")
    add = parser.add_argument
    add("--kinds", nargs="+", default=[], metavar="KIND[=LEVEL,...]", help=f"default: all, with usual levels. {kinds}")
    add("--noise", type=Path, metavar="DIR", help="folder of audio files for the kind noise")
    add("--suite-seed", type=int, default=0, help="seed of the perturbations (default: 0)")


def robustness(config: Config, options: argparse.Namespace) -> None:
    """Measure the conditions that are missing in RUN/robustness, and print the table.

    Raises:
        UserError: A kind or level is not valid, or the model, the shards, the split or the noise do not exist.
    """
    if options.suite_seed < 0:
        raise UserError(f"--suite-seed {options.suite_seed}: expected 0 or more")
    conditions = [(CLEAN, None), *parse_kinds(options.kinds, options.noise is not None)]
    export = find_export(Path(config.run), options.checkpoint)

    from shards.manifest import load

    manifest = load(config.data.shards)
    samples = limited(manifest.rows(options.split), options.limit)

    from toolkit.distributed import init_distributed
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.perturbations.suite import Suite, find_noise
    from toolkit.rank_sync import run_on_rank_zero

    noise = find_noise(options.noise) if options.noise else None
    rank, world_size, device = init_distributed()
    opening = partial(open_result, config, options, manifest, samples, export)
    result = run_on_rank_zero(opening, rank) if world_size > 1 else opening()  # all ranks measure the same conditions
    known = {condition.key for condition in result.conditions}
    missing = [(kind, level) for kind, level in conditions if condition_key(kind, level, noise) not in known]
    if missing:
        model = load_model(export).eval()
        model.to(device)
        process = ProcessInfo(rank, world_size, device)
        suite = Suite(model, manifest, options.split, samples, config, options.suite_seed, process, noise)
        result = suite.complete(result, missing)
    if rank == 0:
        print(format_robustness(result), flush=True)
        logger.info("robustness: %s", result.path)


def inside(config: Config, options: argparse.Namespace) -> None:
    """Write RUN/inside, and print the modality gap and the denoising curves.

    Raises:
        UserError: The model, the shards or the split do not exist, or there are several processes.
    """
    export, trained = find_export(Path(config.run), options.checkpoint), load_run(config.run)

    from shards.manifest import load

    manifest, options.suite_seed = load(config.data.shards), 0
    samples = limited(manifest.rows(options.split), options.limit)

    from toolkit.distributed import init_distributed
    from toolkit.evaluation.encode import ProcessInfo
    from toolkit.evaluation.inside.measure import InsideLook
    from toolkit.evaluation.inside.page import write_page
    from toolkit.training.checkpointing.denoisers import load_denoisers

    _, world_size, device = init_distributed()
    if world_size > 1:
        raise UserError("analyze.py inside runs in one process: start it without a launcher")
    model = load_model(export).eval()
    model.to(device)
    look = InsideLook(model, manifest, options.split, samples, config, ProcessInfo(0, 1, device, show_progress=True))
    values = describe(config, options, manifest, samples, export) | look.distributions()
    images: dict[str, bytes] = {}
    if reason := why_no_matching(trained, export):
        values["attention"] = {"reason": f"the run {reason}"}
    else:
        values["attention"], images = look.attention()
    try:
        denoisers = load_denoisers(Path(config.run), trained, model, values["step"])
        values["denoising"] = look.denoising({side: each.to(device) for side, each in denoisers.items()})
    except UserError as error:
        values["denoising"] = {"reason": str(error)}
    result = save_inside(Path(config.run) / INSIDE / result_name(values), values, images)
    print(format_inside(result), flush=True)
    logger.info("inside: %s", write_page(result, look.inputs.reader))


def add_text(parser: Parser) -> None:
    """Add the options of the baselines by text."""
    add = parser.add_argument
    add("--clip", required=True, metavar="FOLDER", help="text-image model that transformers wrote, such as CLIP")
    add("--recognizer", metavar="FOLDER", help="model of speech recognition such as Whisper, or pocketsphinx")


def text(config: Config, options: argparse.Namespace) -> None:
    """Write recall by text to RUN/results, and print it with the word error rate.

    Raises:
        UserError: A model, the shards or the split do not exist, there are several processes, or there is neither a
            recognizer nor text.
    """
    from shards.manifest import load

    manifest = load(config.data.shards)
    samples = limited(manifest.rows(options.split), options.limit)

    from toolkit.distributed import init_distributed
    from toolkit.evaluation.encode import ModelInputs
    from toolkit.evaluation.results import format_results
    from toolkit.evaluation.text_baselines import (
        TextBaseline,
        TextImageModel,
        load_recognizer,
        read_texts,
        transcribe,
        word_error_rate,
    )

    _, world_size, device = init_distributed()
    if world_size > 1:
        raise UserError("analyze.py text runs in one process: start it without a launcher")
    inputs = ModelInputs(manifest, samples, config)
    transcripts = read_texts(manifest, options.split, inputs)
    if transcripts is None and options.recognizer is None:
        raise UserError(f"split {options.split}: not all captions have text: name a recognizer with --recognizer")
    recognizer = load_recognizer(options.recognizer, device) if options.recognizer else None
    clip, limit = TextImageModel.load(options.clip, device), options.limit
    baseline = TextBaseline(clip, options.clip, inputs, manifest, options.split, Path(config.run), limit)
    results, rate = [], None
    if transcripts is not None:
        results.append(baseline.save("oracle-text", transcripts, None))
    if recognizer:
        name = Path(options.recognizer).resolve().name
        recognized = transcribe(inputs, recognizer, baseline.transcripts_file(options.recognizer))
        rate = word_error_rate(transcripts, recognized) if transcripts is not None else None
        results.append(baseline.save(f"asr-{name}", recognized, rate))
    print(format_results(results), flush=True)
    if rate is not None:
        print(f"word error rate of {name}: {rate:.1f} %", flush=True)


def limited(samples: "np.ndarray", limit: int | None) -> "np.ndarray":
    """Select samples at equal distances; None: all."""
    from toolkit.evaluation.example_sheet import equally_spaced

    return samples if limit is None else samples[equally_spaced(len(samples), limit)]


def open_result(
    config: Config, options: argparse.Namespace, manifest: "Manifest", samples: "np.ndarray", export: Path
) -> Robustness:
    """Read what was measured before in the same way; without conditions if nothing was."""
    run, augment = Path(config.run), load_run(config.run).data.augment
    augmentation = {
        kind: probability
        for kinds, settings in ((SPEECH_KINDS, augment.speech), (IMAGE_KINDS, augment.image))
        for kind in kinds
        if (probability := getattr(settings, kind))
    }
    measured = describe(config, options, manifest, samples, export)
    result = Robustness(path=run, **measured, augmentation=augmentation, conditions=())
    result = dataclasses.replace(result, path=run / FOLDER / f"{result_name(measured)}.json")
    return read_robustness(result.path) if result.path.is_file() else result


def describe(
    config: Config, options: argparse.Namespace, manifest: "Manifest", samples: "np.ndarray", export: Path
) -> dict[str, Any]:
    """Describe what is examined: the fields that results of all analyses have in common."""
    from toolkit.indexing.encoder import model_checksum

    data, whole = config.data, len(samples) == len(manifest.rows(options.split))
    return {
        "run": config.run,
        "shards": data.shards,
        "corpus": manifest.corpus,
        "split": options.split,
        "manifest": manifest.hash,
        "checkpoint": export.name,
        "step": read_step(export),
        "model": model_checksum(export),
        "protocol": {
            "limit": None if whole else options.limit,
            "seed": options.suite_seed,
            "max_seconds": config.evaluation.max_seconds,
            "image_size": data.image_size,
            "resize": data.resize,
        },
        "pictures": len(samples),
        "captions": sum(len(manifest.captions(sample)) for sample in samples.tolist()),
    }


def condition_key(kind: str, level: float | None, noise: "Noise | None") -> tuple[str, float | None, str | None]:
    """Key of a condition, as that of one that was measured."""
    return kind, level, noise.checksum if noise and kind == NOISE else None


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
