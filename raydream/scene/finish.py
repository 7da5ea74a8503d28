"""From any scene's surface to the mesh that a run leaves behind, as its settings ask."""

from dataclasses import replace

from raydream.config.cluster import OutputConfig
from raydream.scene.cleaning import close_mesh, decimate_mesh, keep_largest_piece
from raydream.scene.memory import free_bytes, texture_that_fits
from raydream.scene.normal_map import bake_normals
from raydream.scene.texture import ColorFunction, bake_texture
from raydream.types import Mesh


def finish_mesh(surface: Mesh, color_fn: ColorFunction, output: OutputConfig) -> Mesh:
    """The surface decimated, closed where that is wanted, unwrapped and painted by ``color_fn`` (``bake_texture``),
    with the form that decimation took in a normal map. ``note`` tells where a mesh could not be closed, or a texture
    had to be smaller than asked to be made in the memory that is free.
    """
    if output.mesh_pieces == "largest":
        surface = keep_largest_piece(surface)
    mesh, notes = decimate_mesh(surface, output.mesh_max_faces), []
    if output.mesh_watertight:
        closed = close_mesh(mesh)
        if closed is None:
            notes.append("not made watertight: its surface bounds no solid")
        mesh = closed or mesh
    free = free_bytes()
    size_px = texture_that_fits(output.texture_px, free)
    if size_px < output.texture_px:
        notes.append(f"its texture has {size_px} px, not {output.texture_px}: {free / 1e9:.1f} GB of memory are free")
    mesh = bake_texture(mesh, color_fn, size_px)
    if output.normal_map:
        mesh = bake_normals(mesh, surface)
    return replace(mesh, roughness=output.roughness, metallic=output.metallic, note="; ".join(notes))
