"""Import of DeepSpeed: without a GPU its accelerator is set to the CPU, which avoids its warnings."""

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import deepspeed.ops

if not torch.cuda.is_available():
    # Its first use compiles for half a minute, and a compile that was killed blocks every later run; gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", r"`torch\.distributed", FutureWarning)  # DeepSpeed calls what torch has renamed

__all__ = ["deepspeed"]
