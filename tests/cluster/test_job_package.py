"""What `ray job submit --working-dir .` uploads of a checkout that has been worked in, by Ray's own reckoning."""

import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[2]
CODE = ("jobs", "raydream", "serve")
LEFT_BEHIND = (
    "outputs/views/shard-00000.parquet",
    "outputs/prior/prior/unet/diffusion_pytorch_model.safetensors",
    "runs/20260131-120000-exhibit/checkpoints/00000008/particle-000.safetensors",
    "my chairs/particles/003/mesh.glb",
    "checkpoints/score.safetensors",
    "views.zip",
    ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so",
    "env/lib/libtorch.so",
    "raydream.egg-info/PKG-INFO",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The checkout's own files, and beside them what people leave there."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in (*CODE, "tests", "docs") or (path.is_file() and path.name != ".git"):
            (folder / path.name).symlink_to(path)
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(100))
    return folder


def packed(folder: Path, file: Path, include_gitignore: bool) -> list[str]:
    create_package(str(folder), file, include_gitignore=include_gitignore, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(file) as package:
        return [name for name in package.namelist() if not name.endswith("/")]


@pytest.mark.parametrize("include_gitignore", [True, False])
def test_a_job_uploads_the_code_and_nothing_else(checkout: Path, tmp_path: Path, include_gitignore: bool) -> None:
    names = packed(checkout, tmp_path / "package.zip", include_gitignore)
    assert {name.partition("/")[0] for name in names} == {*CODE, "pyproject.toml"}
    assert not any(name.startswith("serve/page/") for name in names), "the page's sources; its bundle is serve/static"
    assert (tmp_path / "package.zip").stat().st_size < 50_000_000, "Ray takes 104,857,600 bytes"


def test_a_job_uploads_all_of_the_code(checkout: Path, tmp_path: Path) -> None:
    names = set(packed(checkout, tmp_path / "package.zip", include_gitignore=True))
    needed = [path for part in CODE for path in (ROOT / part).rglob("*") if path.is_file()]
    needed = [path for path in needed if not {"__pycache__", "page"} & set(path.parts)]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
