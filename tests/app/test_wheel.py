"""A wheel holds all that runs: it is built, installed into an empty folder, and used far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("raydream", "serve", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, lest a build folder in the checkout decide what is in it."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        else:
            shutil.copy(ROOT / name, sources)
    folder = tmp_path_factory.mktemp("wheel")
    words = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(sources)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    words = [*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(words, check=True)
    return folder


def raydream(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The console script of the installed wheel, with its folder before everything else and far from the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    script = [sys.executable, str(installed / "bin" / "raydream")]
    return subprocess.run(
        [*script, *words], cwd=installed.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_a_wheel_holds_all_that_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    needed = [path for part in ("raydream", "serve") for path in (ROOT / part).rglob("*.py")]
    needed += [path for path in (ROOT / "serve" / "static").iterdir()]
    needed += [path for name in ("embedded", "embedded_agp") for path in (ROOT / "raydream/priors" / name).rglob("*")]
    needed += [ROOT / "raydream" / "py.typed", ROOT / "raydream/report/report.css"]
    needed += (ROOT / "raydream").rglob("*.json")
    assert {path.relative_to(ROOT).as_posix() for path in needed if path.is_file()} == names


def test_an_installed_wheel_teaches_its_commands_and_resolves_a_run(installed: Path) -> None:
    started = time.monotonic()
    done = raydream(installed, "--help")
    took_s = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("run", "train-prior", "serve", "doctor"))
    assert took_s < 20, "no torch, no Ray: well under a second on a machine that is not loaded"
    done = raydream(installed, "run", "--dry-run", "--preset", "embedded", "--n", "3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 3


def test_an_installed_wheel_finds_its_own_weights_and_page(installed: Path) -> None:
    program = (
        "import raydream, serve; from pathlib import Path; from raydream.priors.find import resolve_prior, resolve_agp;"
        "print(raydream.__file__, serve.__file__); resolve_prior('embedded'); resolve_agp('embedded');"
        "assert (Path(serve.__file__).parent / 'static' / 'index.html').is_file()"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=installed, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.split())
