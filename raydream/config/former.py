"""What became of the settings of earlier releases, for whoever still names them."""

import re

_RENAMED: list[tuple[str, str]] = [
    (r"cluster\.backend", "cluster.kernels"),
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
_CONSTANTS: list[tuple[str, str]] = [
    (r"prior\.exhibit\.mode_std", "MODE_STD in raydream/priors/exhibit.py"),
    (r"prior\.exhibit\.object_radius", "OBJECT_RADIUS in raydream/priors/exhibit_modes.py"),
    (r"prior\.exhibit\.ambient", "AMBIENT in raydream/priors/exhibit_modes.py"),
    (r"stages\.\d+\.scene\.grid\.features_per_level", "FEATURES_PER_LEVEL in raydream/scene/field.py"),
    (r"stages\.\d+\.scene\.occupancy_threshold", "THRESHOLD in raydream/scene/occupancy.py"),
    (r"stages\.\d+\.scene\.occupancy_decay", "DECAY in raydream/scene/occupancy.py"),
    (r"stages\.\d+\.scene\.background_color\b.*", "GREY in raydream/scene/nerf.py"),
    (r"stages\.\d+\.shading\.(ambient|diffuse)", "AMBIENT, DIFFUSE in raydream/scene/nerf.py"),
    (r"stages\.\d+\.shading\.light_distance\b.*", "LIGHT_DISTANCE in raydream/scene/nerf.py"),
]


def what_became_of(path: str) -> str | None:
    """Where a setting of before is to be found today; None for one that never was."""
    for old, now in _RENAMED:
        if re.fullmatch(old, path):
            return f"it is called {re.sub(old, now, path)} now"
    constant = next((now for old, now in _CONSTANTS if re.fullmatch(old, path)), None)
    return None if constant is None else f"it is a constant now, {constant}"
