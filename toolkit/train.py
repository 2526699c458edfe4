"""Train a retrieval model: `deepspeed toolkit/train.py --config NAME --run DIR [--section.key value ...]`."""

import logging
import os
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import ExitCode, UserError, run_main
from toolkit.config.load import Parser, parse
from toolkit.config.schema import Config
from toolkit.config.validate import batch_warnings
from toolkit.launcher import check_alone
from toolkit.run_folder import prepare_run, save_configuration

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Train until the configured step, from the newest checkpoint of the run folder if there is one.

    A run that a signal stopped earlier exits with `ExitCode.REQUEUE`.

    Args:
        arguments: Command-line arguments; default: those of this process.

    Raises:
        UserError: The configuration, the shards or the run folder are not valid.
    """
    config, options = parse(sys.argv[1:] if arguments is None else arguments, build_parser())
    config.training.resume = options.resume or config.training.resume
    if options.dry_run:
        print(dry_run(config, options.ranks))
        return
    if options.profile is not None and options.profile < 1:
        raise UserError(f"--profile {options.profile}: expected 1 or more steps")
    if options.ranks is not None:
        raise UserError("--ranks is an option of --dry-run; a training has as many as it is launched with")
    check_alone(os.environ)  # before all of them import torch
    train(config, options.profile)


def build_parser() -> Parser:
    """The command line: the options of this command, and every key of the configuration."""
    parser = Parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print which rank would read what, and train nothing")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks of the dry run (default: as launched or configured)"
    )
    parser.add_argument(
        "--profile", type=int, nargs="?", const=10, metavar="STEPS",
        help="time some steps (10) by part and trace a few, in RUN/profile; train nothing",
    )  # fmt: skip
    parser.add_argument("--resume", metavar="WHAT", help="the same as --training.resume (default: auto)")
    return parser


def train(config: Config, profiled_steps: int | None = None) -> None:
    """Train on this rank, or profile some steps.

    Args:
        config: The configuration.
        profiled_steps: Steps to profile; nothing is trained then.
    """
    from toolkit.data import check_dev, open_order
    from toolkit.distributed import init_distributed
    from toolkit.rank_sync import run_on_rank_zero
    from toolkit.training.metrics.wandb_run import check_wandb
    from toolkit.training.trainer import Trainer
    from toolkit.training.zero.settings import deepspeed_config

    rank, world_size, device = init_distributed()
    # Raise errors of the configuration before a run folder is made.
    deepspeed_settings = deepspeed_config(config, world_size)
    data = open_order(config, world_size)
    if profiled_steps:
        from toolkit.training.metrics.profile import profile_training

        profile_training(config, rank, world_size, device, profiled_steps, data, deepspeed_settings)
        return
    check_dev(config)
    run = Path(config.run)
    run_on_rank_zero(lambda: check_wandb(config.wandb, run), rank)
    run_on_rank_zero(lambda: prepare_run(config), rank)
    trainer = Trainer(config, run, rank, world_size, device, data, deepspeed_settings)

    def begin() -> None:
        trainer.lease.check()
        save_configuration(config)

    run_on_rank_zero(begin, rank)
    trainer.train()
    trainer.close()
    if trainer.stop:
        run_on_rank_zero(lambda: None, rank)  # launchers end all ranks after the first exit: wait until rank 0 is done
        sys.exit(ExitCode.REQUEUE)


def dry_run(config: Config, ranks: int | None = None) -> str:
    """Describe what a training would read, from the manifests alone; no model is built.

    Args:
        config: The configuration.
        ranks: Processes to plan for; default: as many as the launcher has started, else as many as configured.

    Raises:
        UserError: The shards do not exist, or the batch does not divide by the ranks.
    """
    from shards.reading.dry_run import plan_reading
    from toolkit.data import check_dev, open_order, shared_pictures

    launch = config.launch
    if ranks is None:
        ranks = int(os.environ.get("WORLD_SIZE", launch.nodes * max(1, launch.ranks_per_node)))
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}; expected 1 or more")
    manifests, order = open_order(config, ranks)
    check_dev(config)
    for line in (*batch_warnings(config, ranks), *shared_pictures(manifests, config.data.train)):
        logger.warning(line)
    return plan_reading(
        order,
        manifests,
        world_size=ranks,
        workers=config.data.workers,
        accumulation=config.training.accumulation,
        groups=config.model.speech.groups,
        max_seconds=config.data.max_seconds,
        nodes=launch.nodes if ranks % launch.nodes == 0 else 1,
    ).text()


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
