"""Views per second of CPU time, side by side with general tools where they are installed.

Every tool answers the same question, one sample in the middle of each pixel: which face, where on it, how far; what it
has to build for an asset (a tree, a buffer on the device) counts, spread over the asset's views. CPU time, not the
clock: it is that of all threads, and other programs on the machine change it little. ``rows`` is all of this project's
own way from a file to encoded rows, with the settings of a recipe.

python tests/support/rendering_speed.py                 # prints the table of docs/benchmarks.md
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import trimesh
from render_jobs import library_records

from raydream.assets.asset import Asset, normalise_asset
from raydream.assets.libraries import AssetRecord
from raydream.assets.load import load_record
from raydream.backend import load_backend
from raydream.backend.edges import find_edges
from raydream.camera import camera_rays, clip_from_world, orbit_cameras
from raydream.config.render import LibraryConfig, ViewConfig, make_recipe
from raydream.types import Cameras
from raydream.views.render import draw_cameras, render_record

SIZES_PX = (64, 256, 512)
Tool = Callable[[Asset, Cameras], np.ndarray]  # the visible face at each pixel, -1 where there is none


def measure(records: Sequence[AssetRecord], views: ViewConfig) -> dict[str, dict[int, float]]:
    """Views per CPU second of each tool at each size in ``SIZES_PX``, over these assets.

    AssertionError if a tool does not see what ours sees: a figure for another picture would be worth nothing.
    """
    tools = installed_tools()
    assets = [normalise_asset(load_record(record)) for record in records]
    figures: dict[str, dict[int, float]] = {name: {} for name in [*tools, "rows"]}
    backend = load_backend("auto", "cpu")
    render_record(records[0], views, backend)
    for image_px in SIZES_PX:
        config = replace(views, image_px=image_px)
        every = [draw_cameras(config, record.uid)[0] for record in records]
        truth = [tools["raydream"](asset, cameras) >= 0 for asset, cameras in zip(assets, every)]
        for name, tool in tools.items():
            tool(assets[0], every[0])  # compilers and drivers start on nobody's time
            spent = 0.0
            for asset, cameras, solid in zip(assets, every, truth):
                begin = time.process_time()
                faces = tool(asset, cameras)
                spent += time.process_time() - begin
                assert ((faces >= 0) != solid).mean() < 0.01, (name, asset.uid, image_px)
            figures[name][image_px] = len(records) * views.num_views / spent
        begin = time.process_time()
        for record in records:
            render_record(record, config, backend)
        figures["rows"][image_px] = len(records) * views.num_views / (time.process_time() - begin)
    return figures


def format_figures(figures: dict[str, dict[int, float]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| views/s/core | " + " | ".join(f"{px} px" for px in SIZES_PX) + " |", "|---" * (len(SIZES_PX) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[px]:.0f}" for px in SIZES_PX) + " |" for name, row in figures.items()]
    return "\n".join(lines)


def installed_tools() -> dict[str, Tool]:
    """Our rasteriser and those of embreex, Mitsuba, moderngl and Open3D that this machine has."""
    tools: dict[str, Tool] = {"raydream": _raydream}
    makers = {"embreex": lambda: _embree, "open3d": lambda: _open3d, "mitsuba": _mitsuba, "moderngl": _moderngl}
    for name, make in makers.items():
        if importlib.util.find_spec(name) is not None:
            tools[name] = make()
    return tools


def _raydream(asset: Asset, cameras: Cameras) -> np.ndarray:
    clip = torch.nn.functional.pad(asset.vertices, (0, 1), value=1.0) @ clip_from_world(cameras).transpose(1, 2)
    fragments = load_backend("auto", "cpu").rasterize(clip, asset.faces, cameras.height_px, cameras.width_px)
    return fragments.face.numpy()


def _embree(asset: Asset, cameras: Cameras) -> np.ndarray:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    scene = EmbreeScene()
    TriangleMesh(scene, asset.vertices[asset.faces].numpy())
    rays = camera_rays(cameras)
    found = scene.run(rays.origins.numpy(), rays.directions.numpy(), output=1)  # face, u, v and distance
    return found["primID"].reshape(cameras.num_views, cameras.height_px, cameras.width_px)


def _open3d(asset: Asset, cameras: Cameras) -> np.ndarray:
    import open3d

    scene = open3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(asset.vertices.numpy(), asset.faces.numpy().astype(np.uint32))
    rays = camera_rays(cameras)
    found = scene.cast_rays(open3d.core.Tensor(torch.cat([rays.origins, rays.directions], dim=-1).numpy()))
    face = found["primitive_ids"].numpy().astype(np.int64)
    face[face == scene.INVALID_ID] = -1
    return face.reshape(cameras.num_views, cameras.height_px, cameras.width_px)


def _mitsuba() -> Tool:
    """Embree's preliminary hits, many rays at once; needs LLVM's library (``DRJIT_LIBLLVM_PATH``)."""
    import drjit
    import mitsuba

    mitsuba.set_variant("llvm_ad_rgb")
    drjit.set_thread_count(1)

    def draw(asset: Asset, cameras: Cameras) -> np.ndarray:
        mesh = mitsuba.Mesh("asset", len(asset.vertices), asset.num_faces)
        parameters = mitsuba.traverse(mesh)
        parameters["vertex_positions"] = asset.vertices.numpy().ravel()
        parameters["faces"] = asset.faces.numpy().astype(np.uint32).ravel()
        parameters.update()
        scene = mitsuba.load_dict({"type": "scene", "asset": mesh})
        rays = camera_rays(cameras)
        ends = (mitsuba.Vector3f(part.numpy().T.copy()) for part in (rays.origins, rays.directions))
        found = scene.ray_intersect_preliminary(mitsuba.Ray3f(*ends), coherent=True)
        drjit.eval(found.t, found.prim_uv, found.prim_index)
        face = np.where(np.isfinite(found.t.numpy()), found.prim_index.numpy().astype(np.int64), -1)
        return face.reshape(cameras.num_views, cameras.height_px, cameras.width_px)

    return draw


def mesh_step_ratios(cases: Sequence[tuple[int, int]], repeats: int) -> dict[tuple[int, int], float]:
    """How many times the CPU time of our kernels plain torch takes, by subdivisions of a sphere and size in pixels: one
    view is rasterised, interpolated and antialiased, and differentiated by places and colours.
    """
    ratios = {}
    for subdivisions, image_px in cases:
        sphere = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.8)
        faces = torch.tensor(np.asarray(sphere.faces)).long()
        edges, vertices = find_edges(faces), torch.tensor(np.asarray(sphere.vertices), dtype=torch.float32)
        angle, distance, fov = torch.tensor([[30.0], [3.0], [45.0]])
        projection = clip_from_world(orbit_cameras(angle, angle, distance, fov, image_px, image_px))
        clip = torch.nn.functional.pad(vertices, (0, 1), value=1.0) @ projection.transpose(1, 2)
        clip, colors = clip.requires_grad_(), vertices.abs().requires_grad_()
        upstream = torch.rand(1, image_px, image_px, 3)
        spent: dict[str, list[float]] = {"ours": [], "reference": []}
        for _ in range(repeats + 1):  # the first compiles
            for name, times in spent.items():
                backend, begin = load_backend(name, "cpu"), time.thread_time()
                fragments = backend.rasterize(clip, faces, image_px, image_px)
                image = backend.antialias(backend.interpolate(colors, faces, fragments), clip, edges, fragments)
                torch.autograd.grad(image, (clip, colors), upstream)
                times.append(time.thread_time() - begin)
        ours, reference = (sorted(times[1:])[repeats // 2] for times in spent.values())
        ratios[subdivisions, image_px] = reference / ours
    return ratios


def _moderngl() -> Tool:
    import moderngl

    context = moderngl.create_standalone_context(backend="egl")
    context.enable(moderngl.DEPTH_TEST)
    program = context.program(
        vertex_shader="""#version 330
            uniform mat4 clip_from_world; in vec3 position; in vec2 weight; out vec2 where; out float distance_;
            void main() {
                gl_Position = clip_from_world * vec4(position, 1); where = weight; distance_ = gl_Position.w;
            }""",
        fragment_shader="""#version 330
            in vec2 where; in float distance_; out vec4 found;
            void main() { found = vec4(gl_PrimitiveID, where, distance_); }""",
    )
    frames: dict[int, moderngl.Framebuffer] = {}
    weights = np.array([[1, 0], [0, 1], [0, 0]], np.float32)

    def draw(asset: Asset, cameras: Cameras) -> np.ndarray:
        size_px = cameras.height_px
        if size_px not in frames:
            color = context.texture((size_px, size_px), 4, dtype="f4")
            frames[size_px] = context.framebuffer([color], context.depth_renderbuffer((size_px, size_px)))
        corners = asset.vertices[asset.faces].numpy().reshape(-1, 3)
        packed = np.concatenate([corners, np.tile(weights, (asset.num_faces, 1))], axis=1, dtype=np.float32)
        buffer = context.buffer(packed.tobytes())
        array = context.vertex_array(program, [(buffer, "3f 2f", "position", "weight")])
        faces = np.empty((cameras.num_views, size_px, size_px), np.int64)
        frames[size_px].use()
        for view, matrix in enumerate(clip_from_world(cameras).numpy()):
            frames[size_px].clear(-1.0)
            program["clip_from_world"].write(np.ascontiguousarray(matrix.T).tobytes())
            array.render()
            found = np.frombuffer(frames[size_px].read(components=4, dtype="f4"), np.float32)
            faces[view] = found.reshape(size_px, size_px, 4)[::-1, :, 0]
        array.release()
        buffer.release()
        return faces

    return draw


def main() -> None:
    """The table on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", default="", help="a folder of assets (default: $RAYDREAM_ASSETS)")
    parser.add_argument("--count", type=int, default=40, help="how many of them, evenly over the folder")
    args = parser.parse_args()
    torch.set_num_threads(1)  # else the tools pay for torch's idle threads
    records, _ = library_records(LibraryConfig(args.assets))
    sample = records[:: max(1, len(records) // args.count)]
    views = replace(make_recipe("prior").views, num_views=8, images=ViewConfig().images)
    print(f"{len(sample)} assets, {views.num_views} views each\n\n{format_figures(measure(sample, views))}\n")
    for (subdivisions, image_px), ratio in mesh_step_ratios([(3, 64), (5, 128), (5, 256), (6, 512)], 5).items():
        print(f"mesh step, {20 * 4**subdivisions} faces, {image_px} px: {ratio:.1f} times as fast as plain torch")


if __name__ == "__main__":
    main()
