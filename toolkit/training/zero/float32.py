"""Float32 values of a model in bf16: the temperature of the forward pass, and weights to export.

The optimizer keeps float32 weights and rounds them to bf16 after each step. That is enough for most weights, but the
logarithm of the temperature would change in steps of 1.6 to 3 per cent of the temperature.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.model.retrieval import Temperature
from toolkit.training.zero.deepspeed_import import deepspeed
from toolkit.training.zero.state import fragments


class ExactTemperature:
    """Copies the optimizer's float32 value of the temperature's logarithm to the model, on all ranks.

    Does nothing if the model is in float32.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, temperature: Temperature, world_size: int) -> None:
        """Find the value; at ZeRO 1 to 3 one of the ranks has it."""
        self.temperature = temperature
        parameter = temperature.log_temperature
        self.needed = parameter.dtype != torch.float32
        self._device = engine.device
        self._master: Tensor | None = None
        self._share = temperature.learned and world_size > 1 and engine.zero_optimization_stage() > 0
        if not temperature.learned:
            self._master = torch.tensor([temperature.initial_log])
        elif self.needed:
            names = {id(each): name for name, each in engine.module.named_parameters()}
            masters = [each.master for each in fragments(engine) if each.name == names[id(parameter)]]
            self._master = masters[0] if masters else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current value; every rank calls this after the optimizer's weights have changed."""
        if not self.needed:
            return
        value = torch.zeros(1, device=self._device) if self._master is None else self._master.clone().to(self._device)
        if self._share:
            dist.all_reduce(value)  # zero on all ranks but the one that has it
        self.temperature.exact = value


@torch.no_grad()
def gather_masters(engine: deepspeed.DeepSpeedEngine, rank: int, world_size: int) -> dict[str, Tensor]:
    """Collect the optimizer's float32 weights; every rank calls this.

    Returns:
        On rank 0 the complete trained parameters by their names in the engine's module, on the CPU; else empty.
    """
    local_fragments: dict[str, list] = {}
    for fragment in fragments(engine):
        local_fragments.setdefault(fragment.name, []).append(fragment)
    shared = world_size > 1 and engine.zero_optimization_stage() > 0
    masters = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        flat = torch.zeros(shape.numel(), device=engine.device)
        for fragment in local_fragments.get(name, ()):
            flat[fragment.start : fragment.stop] = fragment.master.to(flat.device)
        if shared:
            dist.reduce(flat, 0)  # each element is on one rank, and zero on the others
        if rank == 0:
            masters[name] = flat.view(shape).cpu()
    return masters
