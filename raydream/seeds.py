"""Random generators that depend on what is drawn, not on when: a resumed or replayed run draws the same numbers."""

import hashlib

import torch


def generator(seed: int, role: str, index: int, step: int) -> torch.Generator:
    """A CPU generator for one purpose of one actor at one step; any other purpose, actor or step has another stream."""
    digest = hashlib.blake2b(f"{seed}/{role}/{index}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
