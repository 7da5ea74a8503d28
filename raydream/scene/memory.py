"""How much memory there is, and what a texture takes while it is made."""

import math
from pathlib import Path

_MEMORY, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_BASE_BYTES, _TEXEL_BYTES = 200_000_000, 260  # measured: 237 MB at 512 x 512 texels and 425 MB at 1024 x 1024
_SHARE = 0.8  # of what is free: others want some, too
_SMALLEST_PX = 16


def free_bytes(memory: Path = _MEMORY, group: Path = _GROUP) -> float:
    """What the system can give, and a container may have; infinite where neither says (not Linux)."""
    free = [math.inf]
    try:
        lines = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
        free.append(1024 * float(lines["MemAvailable"].split()[0]))
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            free.append(float(most) - float((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # an older kernel, or no such group
        return min(free)
    return min(free)


def texture_that_fits(size_px: int, free: float) -> int:
    """The size, halved until making it takes no more than four fifths of what is free."""
    while size_px > _SMALLEST_PX and _BASE_BYTES + _TEXEL_BYTES * size_px**2 > _SHARE * free:
        size_px = max(_SMALLEST_PX, size_px // 2)
    return size_px
