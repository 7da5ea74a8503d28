"""What a finished particle becomes: a textured mesh, a turntable film and a picture."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from raydream.assets.asset import Asset
from raydream.backend import load_backend
from raydream.config.cluster import OutputConfig
from raydream.scene.export import TurntableError, write_glb, write_png, write_turntable
from raydream.scene.film import lit_pictures, mesh_asset
from raydream.scene.mesh_checks import check_mesh
from raydream.scene.mesh_files import mesh_files
from raydream.scene.protocol import EmptyMeshError, Scene
from raydream.store.run_folder import MESH, PREVIEW, TURNTABLE, RunFolder, particle_file
from raydream.types import Backend, Cameras, Mesh

_TURNTABLE_FPS = 24
_PAPER = 245  # the light grey behind pictures for people

ExportFigures = dict[str, float | int | str | None]
CamerasAt = Callable[[list[float], float, int], Cameras]  # by azimuths, an elevation and a size in pixels
LookAt = Callable[[list[float], float, int], np.ndarray]


def on_paper(pictures: np.ndarray) -> list[np.ndarray]:
    """Straight-alpha pictures, uint8 ``[view, h, w, 4]``, on light grey: a list of ``[h, w, 3]``."""
    alpha = pictures[..., 3:].astype(np.float32) / 255
    mixed = pictures[..., :3] * alpha + _PAPER * (1 - alpha)
    return list(mixed.round().astype(np.uint8))


def export_particle(
    scene: Scene, cameras_at: CamerasAt, look_at: LookAt, index: int, output: OutputConfig, unlit: bool, uri: str
) -> ExportFigures:
    """Writes mesh.glb, turntable.mp4 and preview.png into the run folder, and what else ``output`` asks for, and tells
    what came out. ``look_at`` gives pictures of the scene itself, uint8 ``[view, h, w, 4]`` with straight colour and
    alpha, from ``cameras_at``.

    ``unlit`` marks a mesh whose albedo holds its light: its film and picture are of the scene, those of any other are
    of the mesh under a lamp. A particle without a surface still gets its film and picture; ``note`` says why it has no
    mesh. What an earlier export left stays until all of the new is made, and where that has no mesh but the old one
    has, for good.
    """
    run = RunFolder.open(uri)
    files: dict[str, bytes] = {}
    stats: ExportFigures = {"vertices": 0, "faces": 0}
    notes: list[str] = []
    try:
        mesh = scene.surface(output)
        notes += filter(None, [mesh.note])
        files = _mesh_files(mesh, scene, output, unlit)
        asset, backend = mesh_asset(mesh), load_backend("auto", "cpu")
        checks = check_mesh(asset, len(files[MESH]), backend)
        stats = {"vertices": len(mesh.vertices), "faces": len(mesh.faces), **checks.figures()}
        if not unlit:
            look_at = partial(_look_at_mesh, asset, backend, cameras_at)
    except EmptyMeshError as error:
        notes.append(str(error))
        if run.exists(particle_file(index, MESH)):
            return {"note": f"its earlier export was kept, as now it has {notes[0]}"}
    azimuths = [360 * frame / output.turntable_frames for frame in range(output.turntable_frames)]
    frames = on_paper(np.concatenate([look_at([azimuth], 15.0, output.turntable_px) for azimuth in azimuths]))
    try:
        files[TURNTABLE] = write_turntable(frames, _TURNTABLE_FPS)
    except TurntableError as error:  # a mesh is worth having without its film
        notes.append(f"no new film: {error}")
    still = on_paper(look_at([30.0], 15.0, max(256, output.turntable_px)))[0]
    files[PREVIEW] = write_png(still)
    for name, data in files.items():
        run.write_bytes(particle_file(index, name), data)
    for old in run.list_files(Path(particle_file(index, MESH)).parent.as_posix()) if MESH in files else ():
        name = Path(old).name  # of a mesh that was exported before, in a format or size that is not asked for now
        if name.startswith(Path(MESH).stem) and name not in files:
            run.delete(old)
    return stats | ({"note": "; ".join(notes)} if notes else {})


def _mesh_files(mesh: Mesh, scene: Scene, output: OutputConfig, unlit: bool) -> dict[str, bytes]:
    files = {MESH: write_glb(mesh, unlit)}
    for kind in output.mesh_formats:
        files |= mesh_files(mesh, kind, Path(MESH).stem, unlit)
    for level, count in enumerate(output.mesh_lods, 1):
        coarse = scene.surface(replace(output, mesh_max_faces=count, mesh_lods=()))
        files[f"{Path(MESH).stem}_lod{level}.glb"] = write_glb(coarse, unlit)
    return files


def _look_at_mesh(
    asset: Asset, backend: Backend, cameras_at: CamerasAt, azimuths: list[float], elevation: float, image_px: int
) -> np.ndarray:
    """Pictures of a mesh, from the same cameras as those of its scene."""
    return lit_pictures(asset, cameras_at(azimuths, elevation, image_px), backend)
