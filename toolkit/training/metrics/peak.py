"""The peak that utilisation is measured against: a device's fastest dense matrix products."""

import time

import torch
import torch.distributed as dist

from toolkit.training.metrics.spans import Recorder

# TFLOP/s of dense matrix products: bf16 with float32 sums, TF32, float32; by a part of the GPU's name, the first that
# fits. From NVIDIA's data sheets, which quote some with sparsity, twice these. V100 has no units for bf16 and TF32.
_PEAKS: dict[str, tuple[float | None, float | None, float]] = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H100": (989.4, 494.7, 67.0),
    "H200 NVL": (835.0, 417.5, 60.0),
    "H200": (989.4, 494.7, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "RTX 4090": (165.2, 82.6, 82.6),
    "V100-PCIE": (None, None, 14.0),
    "V100": (None, None, 15.7),
}
_MEASURED = 2048  # side of the matrices by which a peak is measured
_MEASURED_SECONDS = 1.0


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """TFLOP/s of dense matrix products on a device, and where that is from: a table, or a measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tf32 = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
        peak = table_peak(name, precision, tf32)
        if peak:
            kind = precision if precision != "fp32" else "TF32" if tf32 else "float32"
            return peak, f"{kind} of {name}, data sheet"
    return _measure_peak(device, precision), f"measured: matrices of {_MEASURED} in {precision} on this machine"


def table_peak(name: str, precision: str, tf32: bool) -> float | None:
    """TFLOP/s of a known GPU by its name; None: it is not known, or has no units for that."""
    for part, (bf16, with_tf32, fp32) in _PEAKS.items():
        if part in name:
            return bf16 if precision == "bf16" else with_tf32 if tf32 else fp32
    return None


def _measure_peak(device: torch.device, precision: str) -> float:
    """The best of many matrix products; ranks of one machine measure at the same time, as they compute."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, _MEASURED, _MEASURED, device=device).to(dtype)
    dist.all_reduce(torch.zeros(1, device=device))  # so that none begins alone
    best, until = 0.0, time.perf_counter() + _MEASURED_SECONDS
    while not best or time.perf_counter() < until:
        with Recorder(device) as recorder:
            torch.mm(a, b)
            recorder.end_step()
        best = max(best, 2 * _MEASURED**3 / sum(recorder.seconds()[0].values()))
    return best / 1e12
