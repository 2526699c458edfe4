"""Peak throughput of a device, which utilization is relative to: its fastest dense matrix products."""

import time

import torch
import torch.distributed as dist

from toolkit.training.metrics.spans import Recorder

# TFLOP/s of dense matrix products: bf16 with float32 accumulation, TF32, float32; by a substring of the GPU's name, the
# first that matches. From NVIDIA's data sheets, which quote some with sparsity, twice these. V100 has no bf16 or TF32.
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
_MATRIX_SIZE = 2048  # rows and columns of the matrices that are multiplied to measure
_MEASURED_SECONDS = 1.0


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """Return TFLOP/s of dense matrix products on a device, and the source: a data sheet or a measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tf32 = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
        peak = table_peak(name, precision, tf32)
        if peak:
            kind = precision if precision != "fp32" else "TF32" if tf32 else "float32"
            return peak, f"{kind} of {name}, data sheet"
    return _measure_peak(device, precision), f"measured: matrices of {_MATRIX_SIZE} in {precision} on this machine"


def table_peak(name: str, precision: str, tf32: bool) -> float | None:
    """Look up TFLOP/s of a GPU by its name; None: it is not in the table, or does not support the precision."""
    for part, (bf16, with_tf32, fp32) in _PEAKS.items():
        if part in name:
            return bf16 if precision == "bf16" else with_tf32 if tf32 else fp32
    return None


def _measure_peak(device: torch.device, precision: str) -> float:
    """Time matrix products and return the best; ranks of one machine measure at the same time, as they train."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, _MATRIX_SIZE, _MATRIX_SIZE, device=device).to(dtype)
    dist.all_reduce(torch.zeros(1, device=device))  # all ranks begin together
    best, until = 0.0, time.perf_counter() + _MEASURED_SECONDS
    while not best or time.perf_counter() < until:
        with Recorder(device) as recorder:
            torch.mm(a, b)
            recorder.end_step()
        best = max(best, 2 * _MATRIX_SIZE**3 / sum(recorder.seconds()[0].values()))
    return best / 1e12
