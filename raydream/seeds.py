"""Random generators that depend on what is drawn, not on when: a resumed or replayed run draws the same numbers."""

import hashlib

import torch


def generator(seed: int, role: str, index: int, step: int) -> torch.Generator:
    """A CPU generator for one purpose of one actor at one step; any other purpose, actor or step has another stream."""
    digest = hashlib.blake2b(f"{seed}/{role}/{index}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def generator_on(device: torch.device, source: torch.Generator) -> torch.Generator:
    """``source`` itself for a CPU; else a generator of the device, seeded by a draw of it: many numbers are drawn where
    they are needed, instead of copied there.
    """
    if device.type == "cpu":
        return source
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=source)))
