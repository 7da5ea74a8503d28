"""A glTF 2.0 scene as parts in world space at its rest pose: nodes, instances, morph weights, skins, materials.

trimesh is not used here because it silently ignores skins, morph weights, sparse accessors and compression, and takes
broken files without an error. Source for all rules: the glTF 2.0 specification.
"""

import math

import numpy as np

from raydream.assets.error import AssetError
from raydream.assets.gltf_file import GltfFile, read_gltf
from raydream.assets.gltf_materials import Layer, MaterialReader
from raydream.assets.images import AssetSource
from raydream.assets.parts import Material, Part

TRIANGLES, TRIANGLE_STRIP, TRIANGLE_FAN = 4, 5, 6
# What a wrong type or a missing key in a stranger's JSON ends in; anything else is a mistake of ours.
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


def load_gltf_parts(data: bytes, source: AssetSource) -> list[Part]:
    """The parts of a .glb or .gltf file; every failure is an AssetError."""
    try:
        with np.errstate(all="ignore"):  # NaN and infinity are looked for where they matter
            return _Scene(read_gltf(data, source)).parts()
    except MALFORMED as error:
        raise AssetError("malformed", f"{type(error).__name__}: {error}"[:200]) from error


class _Scene:
    """One pass over a file; holds what is shared between nodes."""

    def __init__(self, file: GltfFile) -> None:
        self.file = file
        self.nodes = [file.item("nodes", index) for index in range(len(file.items("nodes")))]
        if len(self.nodes) > file.source.limits.max_nodes:
            raise AssetError("too_large", f"{len(self.nodes)} nodes")
        self.world = self._world_matrices()
        self.materials = MaterialReader(file)
        self.num_vertices = self.num_faces = 0

    def parts(self) -> list[Part]:
        """All primitives of all drawn nodes."""
        parts = []
        for index in self._drawn_nodes():
            node = self.nodes[index]
            if "mesh" not in node:
                continue
            mesh = self.file.item("meshes", node["mesh"])
            weights = node.get("weights", mesh.get("weights", []))
            for primitive in mesh["primitives"]:
                for matrices in self._placements(index):
                    part = self._part(primitive, matrices, weights, node.get("skin"))
                    if part is not None:
                        parts.append(part)
        return parts

    def _world_matrices(self) -> np.ndarray:
        """``[node, 4, 4]``; AssetError ``node_cycle`` where the nodes are not a forest."""
        parent = [-1] * len(self.nodes)
        for index, node in enumerate(self.nodes):
            for child in node.get("children", []):
                self.file.item("nodes", child)
                if parent[child] >= 0:
                    raise AssetError("node_cycle", f"node {child} has two parents")
                parent[child] = index
        world = np.zeros((len(self.nodes), 4, 4))
        stack = [index for index, above in enumerate(parent) if above < 0]
        num_reached = 0
        while stack:
            index = stack.pop()
            num_reached += 1
            local = _local_matrix(self.nodes[index])
            world[index] = local if parent[index] < 0 else world[parent[index]] @ local
            stack.extend(self.nodes[index].get("children", []))
        if num_reached < len(self.nodes):
            raise AssetError("node_cycle", f"{len(self.nodes) - num_reached} nodes hang on themselves")
        return world

    def _drawn_nodes(self) -> list[int]:
        scenes = self.file.items("scenes")
        if scenes:
            stack = list(self.file.item("scenes", self.file.root.get("scene", 0)).get("nodes", []))
        else:
            below = {child for node in self.nodes for child in node.get("children", [])}
            stack = [index for index in range(len(self.nodes)) if index not in below]
        drawn: dict[int, None] = {}
        while stack:
            index = stack.pop()
            self.file.item("nodes", index)
            if index not in drawn:
                drawn[index] = None
                stack.extend(self.nodes[index].get("children", []))
        return sorted(drawn)

    def _placements(self, index: int) -> list[np.ndarray]:
        """Where a node's mesh stands: once, or at each of its EXT_mesh_gpu_instancing places."""
        attributes = self.nodes[index].get("extensions", {}).get("EXT_mesh_gpu_instancing", {}).get("attributes")
        if attributes is None:
            return [self.world[index]]
        columns = {name.lower(): self.file.accessor(accessor) for name, accessor in attributes.items()}
        columns = {name: columns[name] for name in ("translation", "rotation", "scale") if name in columns}
        num_instances = min(map(len, columns.values()))
        if num_instances > self.file.source.limits.max_nodes:
            raise AssetError("too_large", f"{num_instances} instances")
        rows = [{name: column[i] for name, column in columns.items()} for i in range(num_instances)]
        return [self.world[index] @ _local_matrix(row) for row in rows]

    def _part(self, primitive: dict, matrix: np.ndarray, weights: list, skin: object) -> Part | None:
        mode = primitive.get("mode", TRIANGLES)
        attributes = primitive["attributes"]
        if mode not in (TRIANGLES, TRIANGLE_STRIP, TRIANGLE_FAN) or "POSITION" not in attributes:
            self.file.source.warn("points_or_lines_skipped")
            return None
        spec = self.file.item("accessors", attributes["POSITION"])
        if "KHR_draco_mesh_compression" in primitive.get("extensions", {}) and "bufferView" not in spec:
            raise AssetError("draco_compression")
        self._spend(spec["count"], 0)
        positions = self._attribute(primitive, "POSITION", 3, spec["count"])
        if positions is None:
            raise AssetError("malformed", "POSITION is not a VEC3")
        normals = self._attribute(primitive, "NORMAL", 3, len(positions))
        positions = self._morph(primitive, positions, weights)
        triangles = self._triangles(primitive, mode, len(positions))
        self._spend(0, len(triangles))
        if skin is None:
            linear, positions = matrix[:3, :3], positions @ matrix[:3, :3].T + matrix[:3, 3]
            mirrored = np.linalg.det(linear) < 0
            normals = None if normals is None else normals @ _of_size_one(_cofactor(linear)).T
        else:
            blend = self._skin_matrices(primitive, skin, len(positions))
            positions = np.einsum("vij,vj->vi", blend[:, :3, :3], positions) + blend[:, :3, 3]
            mirrored = len(blend) > 0 and np.median(np.linalg.det(blend[:, :3, :3])) < 0
            normals = None if normals is None else np.einsum("vij,vj->vi", _of_size_one(blend[:, :3, :3]), normals)
        if mirrored:
            triangles = triangles[:, [0, 2, 1]]
        material, uv, colors = self._colouring(primitive, len(positions))
        return Part(positions, triangles, material, normals, uv, colors)

    def _spend(self, num_vertices: int, num_faces: int) -> None:
        self.num_vertices += num_vertices
        self.num_faces += num_faces
        limits = self.file.source.limits
        if self.num_vertices > limits.max_vertices or self.num_faces > limits.max_faces:
            raise AssetError("too_large", f"over {self.num_vertices} vertices, {self.num_faces} faces")

    def _attribute(self, primitive: dict, name: str, width: int, count: int) -> np.ndarray | None:
        """A vertex attribute as float64; None where it is absent, or unusable (with a warning)."""
        if name not in primitive["attributes"]:
            return None
        values = self.file.accessor(primitive["attributes"][name])
        if values.shape != (count, width):
            self.file.source.warn(f"{name.lower()}_ignored")
            return None
        return values.astype(np.float64)

    def _triangles(self, primitive: dict, mode: int, num_vertices: int) -> np.ndarray:
        """``[face, 3]`` vertex indices, without the faces whose indices lead nowhere."""
        if "indices" in primitive:
            values = self.file.accessor(primitive["indices"])
            if values.dtype.kind not in "iu" or values.shape[1] != 1:
                raise AssetError("malformed", "indices are not integers")
            indices = values[:, 0].astype(np.int64)
        else:
            indices = np.arange(num_vertices)
        if mode == TRIANGLES:
            triangles = indices[: len(indices) // 3 * 3].reshape(-1, 3)
        elif mode == TRIANGLE_STRIP:
            triangles = np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=-1)
            triangles[1::2] = triangles[1::2][:, [1, 0, 2]]
        else:
            triangles = np.stack([np.broadcast_to(indices[:1], len(indices[2:])), indices[1:-1], indices[2:]], axis=-1)
        valid = ((triangles >= 0) & (triangles < num_vertices)).all(axis=1)
        if not valid.all():
            self.file.source.warn("faces_out_of_range_dropped")
        return triangles[valid]

    def _morph(self, primitive: dict, positions: np.ndarray, weights: list) -> np.ndarray:
        for weight, target in zip(weights, primitive.get("targets", [])):
            if not math.isfinite(weight):
                raise AssetError("non_finite", "morph weight")
            if weight and "POSITION" in target:
                offset = self.file.accessor(target["POSITION"])
                if offset.shape != positions.shape:
                    self.file.source.warn("morph_target_ignored")
                else:
                    positions = positions + weight * offset
        return positions

    def _skin_matrices(self, primitive: dict, skin_index: object, num_vertices: int) -> np.ndarray:
        """``[vertex, 4, 4]`` blended joint matrices; the node's own transform plays no part (glTF 2.0, 3.7.3.1)."""
        skin = self.file.item("skins", skin_index)
        for joint in skin["joints"]:
            self.file.item("nodes", joint)
        joint_matrices = self.world[skin["joints"]]
        if "inverseBindMatrices" in skin:
            inverse_bind = self.file.accessor(skin["inverseBindMatrices"])[: len(joint_matrices)]
            joint_matrices = joint_matrices @ inverse_bind.reshape(-1, 4, 4).transpose(0, 2, 1)
        blend = np.zeros((num_vertices, 4, 4))
        total = np.zeros(num_vertices)
        for group in range(8):
            joints = self._attribute(primitive, f"JOINTS_{group}", 4, num_vertices)
            weights = self._attribute(primitive, f"WEIGHTS_{group}", 4, num_vertices)
            if joints is None or weights is None:
                break
            if not np.isfinite(weights).all():
                self.file.source.warn("skin_weights_replaced")
                weights = np.where(np.isfinite(weights).all(axis=1, keepdims=True), weights, [1.0, 0.0, 0.0, 0.0])
            if (joints >= len(joint_matrices)).any():
                raise AssetError("bad_reference", "a vertex names a joint that the skin lacks")
            blend += np.einsum("vj,vjab->vab", weights, joint_matrices[joints.astype(np.int64)])
            total += weights.sum(axis=1)
        if (total <= 0).any():
            self.file.source.warn("skin_weights_replaced")
            blend[total <= 0], total[total <= 0] = joint_matrices[0], 1.0
        return blend / total[:, None, None]

    def _colouring(self, primitive: dict, num_vertices: int) -> tuple[Material, np.ndarray | None, np.ndarray | None]:
        """Material, texture coordinates and vertex colours; what shines is in the material, where one image can hold
        it, else left out with a warning.
        """
        index = primitive.get("material")
        base, glow = self.materials.layers(index)
        colors, uv = self._colors(primitive, num_vertices), self._texture_uv(primitive, base, num_vertices)
        if glow is None or index is None:
            return base.material, uv, colors
        glow_uv = self._texture_uv(primitive, glow, num_vertices)
        if glow.texture and glow_uv is None:
            return base.material, uv, colors
        black = not base.material.factor[:3].any()
        if colors is not None and (black or (colors[:, :3] >= 1).all()):
            colors = np.concatenate([np.ones((num_vertices, 3)), colors[:, 3:]], axis=1)
        elif colors is not None:
            self.file.source.warn("emissive_ignored", glow.texture_name)  # vertex colours would paint it too
            return base.material, uv, colors
        joined = self.materials.joined(index, _lie_apart(base, glow, uv, glow_uv))
        if joined is None:
            self.file.source.warn("emissive_ignored", glow.texture_name)
            return base.material, uv, colors
        return joined, uv if glow_uv is None else glow_uv, colors

    def _colors(self, primitive: dict, num_vertices: int) -> np.ndarray | None:
        """Linear RGBA of each vertex."""
        if "COLOR_0" not in primitive["attributes"]:
            return None
        values = self.file.accessor(primitive["attributes"]["COLOR_0"])
        if len(values) != num_vertices or values.shape[1] not in (3, 4) or values.dtype.kind != "f":
            self.file.source.warn("color_0_ignored")
            return None
        return values if values.shape[1] == 4 else np.concatenate([values, np.ones((num_vertices, 1))], axis=1)

    def _texture_uv(self, primitive: dict, layer: Layer, num_vertices: int) -> np.ndarray | None:
        """The texture coordinates that the colour uses, after KHR_texture_transform."""
        texture = layer.texture
        if not texture:
            return None
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        channel = transform.get("texCoord", texture.get("texCoord", 0))
        uv = self._attribute(primitive, f"TEXCOORD_{channel}", 2, num_vertices)
        if uv is None:
            self.file.source.warn("texture_coordinates_missing", layer.texture_name)
        if uv is None or not transform:
            return uv
        angle = float(transform.get("rotation", 0.0))
        cos, sin = math.cos(angle), math.sin(angle)
        scaled = uv * np.asarray(transform.get("scale", [1, 1]), np.float64)
        rotated = scaled @ np.array([[cos, -sin], [sin, cos]])  # counter-clockwise, with v down
        return rotated + np.asarray(transform.get("offset", [0, 0]), np.float64)


def _lie_apart(base: Layer, glow: Layer, uv: np.ndarray | None, glow_uv: np.ndarray | None) -> bool:
    """Whether two images lie otherwise on a surface; many files repeat the same coordinates for each texture."""
    if uv is None or glow_uv is None:
        return False
    one, other = base.material, glow.material
    return (one.wrap, one.smooth) != (other.wrap, other.smooth) or not np.allclose(uv, glow_uv, atol=1e-5)


def _local_matrix(node: dict) -> np.ndarray:
    """A node's transform from its matrix or its translation, rotation and scale; AssetError ``non_finite``."""
    if "matrix" in node:
        matrix = np.asarray(node["matrix"], np.float64).reshape(4, 4).T
    else:
        x, y, z, w = _unit_quaternion(node.get("rotation", (0, 0, 0, 1)))
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        matrix = np.eye(4)
        matrix[:3, :3] = rotation * np.asarray(node.get("scale", (1, 1, 1)), np.float64)
        matrix[:3, 3] = np.asarray(node.get("translation", (0, 0, 0)), np.float64)
    if not np.isfinite(matrix).all():
        raise AssetError("non_finite", "a node's transform")
    return matrix


def _unit_quaternion(value: object) -> np.ndarray:
    quaternion = np.asarray(value, np.float64).reshape(4)
    length = np.linalg.norm(quaternion)
    return quaternion / length if length > 0 else np.array([0.0, 0.0, 0.0, 1.0])


def _of_size_one(matrices: np.ndarray) -> np.ndarray:
    """Matrices by the power of two that brings them near 1: a small scale must not pass for normals of no length."""
    _, exponent = np.frexp(np.abs(matrices).max(initial=0.0))
    return np.ldexp(matrices, -exponent)


def _cofactor(matrix: np.ndarray) -> np.ndarray:
    """What carries normals: ``det(M) M^-T`` with the sign of det taken out; defined also for flattening transforms."""
    a, b, c = matrix.T
    cofactor = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
    return -cofactor if np.linalg.det(matrix) < 0 else cofactor
