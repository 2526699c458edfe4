"""State of the queues and of the model's buffers in a checkpoint."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shards.errors import UserError
from toolkit.training.checkpointing.progress import Marker
from toolkit.training.queue import EmbeddingQueue, TokenQueue


def shared_state(module: nn.Module, queue: EmbeddingQueue) -> dict[str, Tensor]:
    """Return the state that is the same on all ranks: SIC's queue and the model's buffers."""
    parts = {"queue": queue.state_dict(), "buffer": _buffers(module)}
    return {f"{part}:{name}": tensor for part, values in parts.items() for name, tensor in values.items()}


def load_shared(path: Path, module: nn.Module, queue: EmbeddingQueue | None) -> None:
    """Load what `shared_state` returned.

    Raises:
        UserError: It does not match the queue or the model.
    """
    parts: dict[str, dict[str, Tensor]] = {"queue": {}, "buffer": {}}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            part, _, name = key.partition(":")
            parts.setdefault(part, {})[name] = file.get_tensor(key)
    try:
        if queue is not None:
            queue.load_state_dict(parts["queue"])
        for name, buffer in _buffers(module).items():
            buffer.copy_(parts["buffer"][name])
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not match queue or model ({reason}): it is of another model") from None


def token_file(rank: int) -> str:
    """Return the name of the file with a rank's pairs of SIM's queue."""
    return f"tokens-{rank:05d}.safetensors"


def index_in(queue: TokenQueue, rank: int, world_size: int) -> int:
    """Return a rank's index in a token queue: 0 in a queue of this rank's pairs only."""
    return rank if queue.world_size == world_size else 0


def load_token_queue(marker: Marker, queue: TokenQueue, rank: int, world_size: int) -> str | None:
    """Load SIM's queue from a checkpoint of any world size.

    Returns:
        None, or the reason why it was not loaded and is empty.
    """
    names = sorted(info.name for info in marker.files if info.name.startswith("tokens-"))
    try:
        if queue.world_size < world_size:  # each rank has a separate queue
            if len(names) != world_size:
                return f"it has {len(names)}, each of one rank's own pairs"
            names = [names[rank]]
        if not names:
            return "it has none"
        queue.load(
            [safe_open(marker.folder / name, "pt").get_slice for name in names], index_in(queue, rank, world_size)
        )
    except (ValueError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}
