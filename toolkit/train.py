"""Train a retrieval model: `deepspeed toolkit/train.py --config NAME --run DIR [--section.key value ...]`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import run_main
from toolkit.config_loader import load_config
from toolkit.run_folder import prepare_run


def main(arguments: list[str] | None = None) -> None:
    """Train until the configured step, from the newest checkpoint of the run folder if there is one.

    Args:
        arguments: Command-line arguments; default: those of this process.

    Raises:
        UserError: The configuration, the shards or the run folder do not fit.
    """
    config = load_config(sys.argv[1:] if arguments is None else arguments, __doc__)

    from shards.manifest import load
    from shards.order import order_of
    from toolkit.distributed import agree, initialise
    from toolkit.training.deepspeed_config import deepspeed_config
    from toolkit.training.trainer import Trainer

    rank, world_size, device = initialise()
    # A mistake in what follows leaves no run folder behind.
    deepspeed_config(config, world_size)
    order_of(load(config.data.shards), config.data.train, config.training.batch_size)
    run = Path(config.run)
    agree(lambda: prepare_run(config), rank)
    trainer = Trainer(config, run, rank, world_size, device)
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    run_main(main)
