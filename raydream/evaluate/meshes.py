"""What is evaluated: the meshes of a run folder, or those of any folder, with what is known of their making."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raydream.assets.asset import Asset, AssetError
from raydream.assets.files import SUFFIXES
from raydream.assets.load import load_asset
from raydream.config import strict_json
from raydream.config.evaluate import EvaluateConfig
from raydream.config.prior import ExhibitConfig
from raydream.config.run import RunConfig
from raydream.store.run_folder import CONFIG, MESH, RunFolder, particle_file
from raydream.store.storage import LocalFiles


@dataclass(frozen=True)
class ParticleMesh:
    """A mesh, or the reason why there is none."""

    name: str
    asset: Asset | None
    file_bytes: int
    note: str = ""


@dataclass(frozen=True)
class RunMeshes:
    """All particles of a run. ``prior`` is what made them, a diffusers folder or alias; ``exhibit`` the other kind."""

    uri: str
    label: str
    prompt: str
    method: str
    seed: int
    prior: str
    exhibit: ExhibitConfig | None
    particles: tuple[ParticleMesh, ...]
    write: Callable[[str, bytes], object]  # puts a file beside what was evaluated


def read_meshes(uri: str, settings: EvaluateConfig) -> RunMeshes:
    """The particles of a run folder (a path or URI), or, where there is no run, the mesh files right in a local folder.

    Raises ValueError naming ``run`` where there are neither, and ``prompt`` where a folder of meshes comes without.
    """
    path = Path(uri).expanduser()
    if "://" not in uri and not path.is_dir():
        raise ValueError(f"run: {uri!r} is not a folder")
    if "://" not in uri and not (path / CONFIG).is_file():
        return _mesh_folder(path.resolve(), settings)
    run = RunFolder.open(uri)
    config = strict_json.loads(RunConfig, run.read_config())
    return RunMeshes(
        run.uri,
        settings.label or f"{config.preset} {config.method}",
        settings.prompt or config.prompt,
        config.method,
        config.seed,
        config.prior.source,
        config.prior.mixture,
        tuple(_particle(run, index) for index in range(config.n)),
        run.write_bytes,
    )


def _particle(run: RunFolder, index: int) -> ParticleMesh:
    name = particle_file(index, MESH)
    if not run.exists(name):
        return ParticleMesh(f"{index:03d}", None, 0, "no mesh was exported")
    data = run.read_bytes(name)
    with tempfile.TemporaryDirectory() as folder:  # the run may lie in an object store
        path = Path(folder) / MESH
        path.write_bytes(data)
        return _load(path, f"{index:03d}")


def _mesh_folder(folder: Path, settings: EvaluateConfig) -> RunMeshes:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"run: {str(folder)!r} has neither {CONFIG} nor mesh files ({', '.join(SUFFIXES)})")
    if not settings.prompt:
        raise ValueError("prompt: a folder of meshes does not say what they should be; give --prompt")
    particles, label = tuple(_load(path, path.stem) for path in paths), settings.label or folder.name
    return RunMeshes(str(folder), label, settings.prompt, "", 0, "", None, particles, LocalFiles(folder).write)


def _load(path: Path, name: str) -> ParticleMesh:
    try:
        return ParticleMesh(name, load_asset(path, name), path.stat().st_size)
    except AssetError as error:
        return ParticleMesh(name, None, 0, str(error))
