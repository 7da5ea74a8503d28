"""Which device a process computes on, what people call it, and how numbers get there."""

import torch
from torch import Tensor


def own_device() -> torch.device:
    """The GPU that torch sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU's memory, before this process has taken any; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def describe(device: torch.device) -> str:
    """The device, and for a GPU its card: "cuda (NVIDIA H100 80GB HBM3)"."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def send(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device was given to do before."""
    pinned = host.pin_memory() if device.type == "cuda" else host
    return pinned.to(device, non_blocking=True)
