"""From any scene's surface to the mesh that a run leaves behind, as its settings ask."""

from dataclasses import replace

from raydream.config.cluster import OutputConfig
from raydream.scene.cleaning import close_mesh, decimate_mesh, keep_largest_piece
from raydream.scene.normal_map import bake_normals
from raydream.scene.texture import ColorFunction, bake_texture
from raydream.types import Mesh


def finish_mesh(surface: Mesh, color_fn: ColorFunction, output: OutputConfig) -> Mesh:
    """The surface decimated, closed where that is wanted, unwrapped and painted by ``color_fn`` (``bake_texture``),
    with the form that decimation took in a normal map. ``note`` tells where a mesh could not be closed.
    """
    if output.mesh_pieces == "largest":
        surface = keep_largest_piece(surface)
    mesh, note = decimate_mesh(surface, output.mesh_max_faces), ""
    if output.mesh_watertight:
        closed = close_mesh(mesh)
        if closed is None:
            note = "not made watertight: its surface bounds no solid"
        mesh = closed or mesh
    mesh = bake_texture(mesh, color_fn, output.texture_px)
    if output.normal_map:
        mesh = bake_normals(mesh, surface)
    return replace(mesh, roughness=output.roughness, metallic=output.metallic, note=note)
