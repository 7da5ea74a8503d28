"""Opens a GLB in Blender and prints what is there as JSON: python tests/support/open_in_blender.py mesh.glb"""

import json
import sys

import bpy
import numpy as np

import bmesh  # isort: skip  (comes with bpy, and only after it)

bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.import_scene.gltf(filepath=sys.argv[1])
(item,) = (item for item in bpy.data.objects if item.type == "MESH")
mesh = item.data
mesh.calc_tangents()  # MikkTSpace
welded = bmesh.new()
welded.from_mesh(mesh)
bmesh.ops.remove_doubles(welded, verts=welded.verts, dist=1e-6)
nodes = {node.type: node for node in mesh.materials[0].node_tree.nodes}
shader = nodes["BSDF_PRINCIPLED"].inputs
(image,) = (link.from_node.image for link in shader["Base Color"].links)
print(
    json.dumps(
        {
            "corners": [list(item.matrix_world @ mesh.vertices[loop.vertex_index].co) for loop in mesh.loops],
            "uv": [list(place.uv) for place in mesh.uv_layers.active.data],
            "tangents": [[*loop.tangent, loop.bitangent_sign] for loop in mesh.loops],
            "bad_edges": sum(not edge.is_manifold for edge in welded.edges),
            "roughness": shader["Roughness"].default_value,
            "metallic": shader["Metallic"].default_value,
            "nodes": sorted(nodes),
            "image": [round(value * 255) for value in np.array(image.pixels[:]).reshape(-1, 4)[:, :3].reshape(-1)],
            "image_px": list(image.size),
            "colour_space": image.colorspace_settings.name,
        }
    )
)
