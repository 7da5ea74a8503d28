"""The worked examples of docs/extending.md: each patch is applied to a copy of the code, which then makes a run."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydream.config.run import RunConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
WEIGHTS = ("embedded", "embedded_agp")
SMALL = (
    "prior.image_px=16",
    "prior.exhibit.assets=procedural",
    "prior.exhibit.num_modes=3",
    "prior.exhibit.supersample=1",
    "stages.0.camera.image_px=16",
    "stages.0.learner.unet_channels=[16,16]",
    "stages.0.learner.warm_up_fits=0",
    "output.mesh_resolution=16",
    "output.texture_px=32",
    "output.turntable_frames=2",
)
TINT = ["--set", "prior.kind=tint", "--set", "prior.source=0.1,0.6,0.3", "--method", "sds"]
# a patch by its heading: the files it may touch, and the words of a run that needs it
PATCHES = {
    "An equation": (1, []),
    "A method": (2, ["--preset", "embedded", "--agp", "off", "--method", "fading", "--prompt", "a red chair"]),
    "A scene": (3, ["--set", "stages.0.scene.kind=billboard"]),
    "A kind of prior": (3, TINT),
}


def section(heading: str, language: str) -> str:
    text = GUIDE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return block


@pytest.mark.parametrize("heading", PATCHES)
def test_a_patch_applies_and_runs(heading: str, tmp_path: Path) -> None:
    num_files, words = PATCHES[heading]
    patch = section(heading, "diff")
    assert len(re.findall(r"^\+\+\+ b/", patch, re.MULTILINE)) == num_files
    copy = tmp_path / "code"
    copy_of_code(copy / "raydream", set(re.findall(r"^\+\+\+ b/raydream/(\w+)/", patch, re.MULTILINE)))
    applied = subprocess.run(
        ["git", "apply", "-"], cwd=copy, input=patch, capture_output=True, text=True, check=False, env=no_repository()
    )
    assert applied.returncode == 0, applied.stderr
    settings = [word for setting in SMALL if "--preset" not in words for word in ("--set", setting)]
    run = [sys.executable, "-m", "raydream.console", "run", "--runtime", "local", "--n", "1", "--steps", "2"]
    done = subprocess.run(
        [*run, *settings, *words, "--out", str(tmp_path / "run")],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "particles" / "000" / "preview.png").is_file()


def copy_of_code(folder: Path, rooms: set[str]) -> None:
    """Copies of some rooms beside links to all others, whose kernels are compiled already."""
    folder.mkdir(parents=True)
    for path in (ROOT / "raydream").iterdir():
        if path.name in rooms:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", *WEIGHTS))
        else:
            (folder / path.name).symlink_to(path)
    if "priors" in rooms:
        for name in WEIGHTS:
            (folder / "priors" / name).symlink_to(ROOT / "raydream" / "priors" / name)


def no_repository() -> dict[str, str]:
    """Git's environment where the copy lies in no repository, wherever temporary folders are."""
    return os.environ | {"GIT_CEILING_DIRECTORIES": "/", "GIT_DIR": "/nowhere"}


def test_a_second_stage_needs_settings_only() -> None:
    scope: dict[str, RunConfig] = {}
    exec(section("A second stage", "python"), scope)
    config = scope["config"]
    assert [stage.name for stage in config.stages] == ["nerf", "polish"]
    assert config.num_steps == 400
    assert dataclasses.replace(config, n=1).stages[1].start == "previous"
