"""What settings of earlier releases are called now, for whoever still names them."""

import re

_FORMER: list[tuple[str, str]] = [
    (r"method", "stages.0.branches.0.method, or --method"),
    (r"stages\.(\d+)\.guidance\b(.*)", r"stages.\1.branches.0\2"),
    (r"stages\.(\d+)\.geometry\.agp", r"stages.\1.branches.1.geometric_prior.source, or --agp"),
    (
        r"stages\.(\d+)\.geometry\.(prior|denoise_steps|text_noise|box_every)",
        r"stages.\1.branches.1.geometric_prior.\2",
    ),
    (r"stages\.(\d+)\.geometry\.ori_weight", r"stages.\1.branches.0.weight"),
    (r"stages\.(\d+)\.geometry\.align_weight", r"stages.\1.branches.1.weight"),
    (r"stages\.(\d+)\.geometry\b(.*)", r"stages.\1.branches.1\2"),
]


def present_name(path: str) -> str | None:
    """What a setting of before is called now; None for one that never was."""
    return next((re.sub(old, now, path) for old, now in _FORMER if re.fullmatch(old, path)), None)
