"""Memory: what was used."""

import resource
import sys

import torch

GIB = 2**30


def peak_memory(device: torch.device) -> int:
    """Most memory used so far, in bytes: allocated by PyTorch on a GPU, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
