"""What a finished particle becomes: a textured mesh, a turntable film and a picture."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from raydream.config import OutputConfig
from raydream.scene.export import write_glb, write_png, write_turntable
from raydream.scene.isosurface import EmptyMeshError, extract_mesh
from raydream.scene.nerf import NerfScene
from raydream.scene.texture import bake_texture
from raydream.store import MESH, PREVIEW, TURNTABLE, RunFolder, particle_file

_log = logging.getLogger(__name__)
_TURNTABLE_FPS = 24
_PAPER = 245  # the light grey behind pictures for people

Stats = dict[str, float | int | str | None]


def on_paper(pictures: np.ndarray) -> list[np.ndarray]:
    """Straight-alpha pictures, uint8 ``[view, h, w, 4]``, on light grey: a list of ``[h, w, 3]``."""
    alpha = pictures[..., 3:].astype(np.float32) / 255
    mixed = pictures[..., :3] * alpha + _PAPER * (1 - alpha)
    return list(mixed.round().astype(np.uint8))


def export_particle(
    scene: NerfScene,
    look_at: Callable[[list[float], float, int], np.ndarray],
    index: int,
    output: OutputConfig,
    unlit: bool,
    uri: str,
) -> Stats:
    """Writes mesh.glb, turntable.mp4 and preview.png into the run folder and tells what came out.

    ``look_at`` is ``Particle.look_at``; ``unlit`` marks a mesh whose albedo holds its light. A particle without a
    surface still gets its film and picture; ``note`` says why it has no mesh.
    """
    run = RunFolder.open(uri)
    azimuths = [360 * frame / output.turntable_frames for frame in range(output.turntable_frames)]
    frames = on_paper(np.concatenate([look_at([azimuth], 15.0, output.turntable_px) for azimuth in azimuths]))
    run.write_bytes(particle_file(index, TURNTABLE), write_turntable(frames, _TURNTABLE_FPS))
    still = on_paper(look_at([30.0], 15.0, max(256, output.turntable_px)))[0]
    run.write_bytes(particle_file(index, PREVIEW), write_png(still))
    try:
        glb, stats = _mesh(scene, output, unlit)
    except EmptyMeshError as error:
        _log.warning("particle %d: %s", index, error)
        return {"vertices": 0, "faces": 0, "note": str(error)}
    run.write_bytes(particle_file(index, MESH), glb)
    return stats


@torch.no_grad()
def _mesh(scene: NerfScene, output: OutputConfig, unlit: bool) -> tuple[bytes, Stats]:
    device = scene.occupancy.values.device

    def density(points: Tensor) -> Tensor:
        return scene.field.density(points.to(device))

    def albedo(points: Tensor) -> Tensor:
        return scene.field.albedo(points.to(device))

    mesh = extract_mesh(
        density,
        output.mesh_resolution,
        output.mesh_threshold or None,
        scene.config.radius,
        output.mesh_max_faces,
        scene.occupancy.mask.cpu(),
    )
    textured = bake_texture(mesh, albedo, output.texture_px)
    return write_glb(textured, unlit), {"vertices": len(mesh.vertices), "faces": len(mesh.faces)}
