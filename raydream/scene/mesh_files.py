"""A finished mesh in the other formats that people ask for: OBJ, STL, PLY and USDZ, +y up, in the world's units."""

import numpy as np
import trimesh
from jaxtyping import UInt8

from raydream.scene.export import normal_picture, to_uint8, write_png
from raydream.scene.texture import vertex_normals
from raydream.types import Mesh


def mesh_files(mesh: Mesh, kind: str, stem: str, unlit: bool = False) -> dict[str, bytes]:
    """The files of one format by their names, which begin with ``stem``. STL has the form alone; PLY the texture's
    colour at each vertex. Where light is in the albedo, ``unlit`` makes USDZ's material send it out by itself; the
    others have no such thing. Raises ValueError for a mesh without a texture.
    """
    if mesh.texture is None or mesh.uv is None:
        raise ValueError(f"mesh.texture: {kind} needs a baked texture")
    match kind:
        case "obj":
            return _obj(mesh, stem)
        case "stl":
            return {f"{stem}.stl": trimesh.exchange.stl.export_stl(_welded(mesh))}
        case "ply":
            return {f"{stem}.ply": trimesh.exchange.ply.export_ply(_welded(mesh), vertex_normal=True)}
        case "usdz":
            from raydream.scene.usdz_file import write_usdz  # an optional package

            return {f"{stem}.usdz": write_usdz(mesh, unlit)}
        case _:
            raise ValueError(f"mesh_formats: unknown {kind!r}; choose of obj, stl, ply, usdz")


def _obj(mesh: Mesh, stem: str) -> dict[str, bytes]:
    """With the metallic-roughness lines that Blender and others read beside the old ones."""
    vertices, faces = mesh.vertices.numpy(), mesh.faces.numpy() + 1
    lines = ["# raydream", f"mtllib {stem}.mtl", "o asset"]
    lines += [f"v {x:.7g} {y:.7g} {z:.7g}" for x, y, z in vertices]
    lines += [f"vt {u:.7g} {v:.7g}" for u, v in mesh.uv.numpy()] if mesh.uv is not None else []
    lines += [f"vn {x:.5g} {y:.5g} {z:.5g}" for x, y, z in vertex_normals(vertices, mesh.faces.numpy())]
    lines += ["usemtl baked", *(f"f {a}/{a}/{a} {b}/{b}/{b} {c}/{c}/{c}" for a, b, c in faces)]
    material = ["newmtl baked", "Kd 1 1 1", "Ks 0 0 0", f"Pr {mesh.roughness:g}", f"Pm {mesh.metallic:g}"]
    material.append(f"map_Kd {stem}.png")
    files = {f"{stem}.png": write_png(_picture(mesh))}
    if mesh.normal_map is not None:
        material.append(f"norm {stem}_normal.png")
        files[f"{stem}_normal.png"] = write_png(normal_picture(mesh.normal_map))
    files[f"{stem}.mtl"] = ("\n".join(material) + "\n").encode()
    files[f"{stem}.obj"] = ("\n".join(lines) + "\n").encode()
    return files


def _welded(mesh: Mesh) -> trimesh.Trimesh:
    """One vertex where the cuts of the texture have several, with the mean of their colours."""
    points, place = np.unique(mesh.vertices.numpy(), axis=0, return_inverse=True)
    place = place.reshape(-1)
    picture, uv = _picture(mesh), mesh.uv.numpy() if mesh.uv is not None else np.zeros((0, 2))
    side = np.array([picture.shape[1], picture.shape[0]])
    column, row = (np.stack([uv[:, 0], 1 - uv[:, 1]]) * side[:, None]).astype(np.int64).clip(0, side[:, None] - 1)
    colors = np.zeros((len(points), 3))
    np.add.at(colors, place, picture[row, column])
    colors /= np.bincount(place)[:, None]
    faces = place[mesh.faces.numpy()]
    normals = vertex_normals(points, faces)
    return trimesh.Trimesh(
        points, faces, vertex_normals=normals, vertex_colors=colors.round().astype(np.uint8), process=False
    )


def _picture(mesh: Mesh) -> UInt8[np.ndarray, "h w 3"]:
    assert mesh.texture is not None
    return to_uint8(mesh.texture)
