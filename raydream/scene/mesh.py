"""``MeshScene``: what a particle of a later stage optimises, a surface with a field of colours, and how it is seen."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from raydream.backend.edges import find_edges
from raydream.camera import cameras_to, clip_from_world
from raydream.config.cluster import OutputConfig
from raydream.config.scene import LossConfig, MeshConfig, NerfConfig, ShadingConfig
from raydream.coordinates import Box, canonical_coordinates, tight_box
from raydream.device import send
from raydream.scene import losses, mesh_geometry
from raydream.scene.field import RadianceField
from raydream.scene.isosurface import kept_surface
from raydream.scene.nerf import GREY, Look, NerfScene, draw_look, plain_look, shaded
from raydream.scene.protocol import Draws, EmptyMeshError
from raydream.scene.tetrahedra import grid_points, marching_tetrahedra
from raydream.store.tensors import odd_names
from raydream.types import Backend, Cameras, Mesh, MeshEdges, Render

_MARGIN = 0.2  # of an ellipsoid's box, around it
_BAND_CELLS = 2.0  # so far from an ellipsoid its values are 1 and -1


class MeshScene(nn.Module):
    """A ``Scene``: signed values and deformations at the points of a grid, whose surface is rasterised, and colours.

    ``values`` are positive inside. Renders are differentiable by all parameters, but for what colour a point has by
    where it lies. ``EmptyMeshError`` where the surface has vanished.
    """

    def __init__(
        self,
        config: MeshConfig,
        shading: ShadingConfig,
        loss_weights: LossConfig,
        backend: Backend,
        device: torch.device,
        draws: Draws,
    ) -> None:
        super().__init__()
        self.config, self._shading, self._loss_weights = config, shading, loss_weights
        self._backend, self._device, self._draws = backend, device, draws
        as_nerf = NerfConfig(
            radius=config.radius, grid=config.grid, hidden_width=config.hidden_width, bfloat16=config.bfloat16
        )
        self.field = RadianceField(as_nerf, backend, draws("scene", 0))
        values, box = _ellipsoid(config)
        self.values = nn.Parameter(values, requires_grad=not config.frozen)
        self.deformation = nn.Parameter(torch.zeros(*values.shape, 3), requires_grad=not config.frozen)
        self.extent: Tensor
        self.register_buffer("extent", box)
        self.to(device)
        self._frozen_mesh: Mesh | None = None
        self._frozen_edges: MeshEdges | None = None

    def param_groups(self) -> list[dict[str, object]]:
        config, field = self.config, self.field
        colors: list[dict[str, object]] = [
            {"params": [field.table], "lr": config.lr_grid},
            {"params": [field.hidden, field.head], "lr": config.lr_network},
        ]
        if config.frozen:
            return colors
        surface: list[dict[str, object]] = [
            {"params": [self.values], "lr": config.lr_values},
            {"params": [self.deformation], "lr": config.lr_deformation},
        ]
        return surface + colors

    def after_step(self, step: int) -> None:
        """Nothing to keep up."""

    def state(self) -> dict[str, Tensor]:
        """The parameters, and the box that the grid fills."""
        return self.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """``ValueError`` where it is of a scene of another kind or of other sizes."""
        odd = odd_names(self.state(), state)
        if odd:
            raise ValueError(f"stages: a scene of other sizes cannot go on in this one ({odd[0]} differs)")
        self.load_state_dict(dict(state))
        self._frozen_mesh = self._frozen_edges = None

    @torch.no_grad()
    def start_from_nerf(self, nerf: NerfScene) -> None:
        """Begins with a NeRF's surface, where export finds it, and its colours."""
        odd = odd_names(self.field.state_dict(), nerf.field.state_dict())
        if odd:
            raise ValueError(
                f"stages: scene.grid and scene.hidden_width of a mesh must be those of the NeRF that it starts from "
                f"({odd[0]} differs)"
            )
        values, box = nerf.solid_values(self.config.resolution + 1)
        self.field.load_state_dict(nerf.field.state_dict())
        self.values.copy_(values)
        self.deformation.zero_()
        self.extent.copy_(box)
        self._frozen_mesh = self._frozen_edges = None

    def render(self, cameras: Cameras, step: int, ccm_box: Box | None = None) -> Render:
        """The views of a training step, shaded and before the backgrounds that are drawn for it."""
        return self.views(
            cameras, draw_look(self._shading, self.config, cameras, step, self._draws("look", step)), ccm_box
        )

    def preview(self, cameras: Cameras) -> Render:
        return self.views(cameras, plain_look(cameras.num_views, (0.0, 0.0, 0.0)))

    def regularizers(self, render: Render, step: int) -> dict[str, Float[Tensor, ""]]:
        assert render.mesh is not None
        weights, mesh, opacity = self._loss_weights, render.mesh, render.opacity
        measures = {
            "sparsity": (weights.sparsity, lambda: losses.sparsity(opacity)),
            "opaqueness": (weights.opaqueness, lambda: losses.opaqueness(opacity)),
            "normal_consistency": (weights.normal_consistency, lambda: mesh_geometry.normal_consistency(mesh)),
            "laplacian": (weights.laplacian, lambda: mesh_geometry.laplacian(mesh)),
        }
        return {
            name: weight.at(step) * measure() for name, (weight, measure) in measures.items() if weight.at(step) > 0
        }

    @torch.no_grad()
    def surface(self, output: OutputConfig) -> Mesh:
        """The surface without small pieces, with the field's colours in its texture."""
        from raydream.scene.finish import finish_mesh  # packages that only an export needs

        mesh = self.mesh()
        surface = kept_surface(mesh.vertices.double().cpu().numpy(), mesh.faces.cpu().numpy())
        return finish_mesh(surface, lambda points, _: self.field.albedo(points.to(self._device)), output)

    @torch.no_grad()
    def box(self) -> Box | None:
        try:
            return tight_box(self.mesh().vertices.cpu())
        except EmptyMeshError:
            return None

    def mesh(self) -> Mesh:
        """The surface as it is, differentiable by values and deformations; a frozen one is made once."""
        if self._frozen_mesh is not None:
            return self._frozen_mesh
        mesh = Mesh(*marching_tetrahedra(self.values, self.deformation, self.extent[0], self.extent[1]))
        if self.config.frozen:
            self._frozen_mesh = mesh
        return mesh

    def views(self, cameras: Cameras, look: Look, ccm_box: Box | None = None) -> Render:
        """Rasterises all views at once, outlines blended. Depth is the distance along a pixel's ray, by opacity."""
        mesh, here = self.mesh(), cameras_to(cameras, self._device)
        clip = F.pad(mesh.vertices, (0, 1), value=1.0) @ clip_from_world(here).transpose(1, 2)
        fragments = self._backend.rasterize(clip, mesh.faces, cameras.height_px, cameras.width_px)
        attributes = torch.cat([mesh.vertices, mesh_geometry.smooth_normals(mesh)], dim=-1)
        point, normal = self._backend.interpolate(attributes, mesh.faces, fragments).split(3, dim=-1)
        seen = fragments.face >= 0
        normal = F.normalize(normal, dim=-1, eps=1e-6)
        color = self._colors(point, normal, seen, look)
        distance = (point - here.c2w[:, None, None, :3, 3]).norm(dim=-1, keepdim=True)
        channels = [color, torch.ones_like(distance), distance, normal]
        if ccm_box is not None:
            box = Box(ccm_box.minimum.to(point), ccm_box.maximum.to(point))
            channels.append(canonical_coordinates(point, box).clamp(0, 1))
        images = torch.cat(channels, dim=-1) * seen[..., None]
        images = self._backend.antialias(images, clip, self._edges_of(mesh), fragments)
        foreground, opacity, depth, normal, *ccm = images.split([3, 1, 1, 3, 3][: len(channels)], dim=-1)
        rgb = foreground + (1 - opacity) * self._backdrop(look)
        return Render(rgb, foreground, opacity, depth, normal, ccm[0] if ccm else None, mesh=mesh)

    def _edges_of(self, mesh: Mesh) -> MeshEdges:
        if not self.config.frozen:
            return find_edges(mesh.faces)
        if self._frozen_edges is None:
            self._frozen_edges = find_edges(mesh.faces)
        return self._frozen_edges

    def _colors(
        self,
        point: Float[Tensor, "view h w 3"],
        normal: Float[Tensor, "view h w 3"],
        seen: Bool[Tensor, "view h w"],
        look: Look,
    ) -> Float[Tensor, "view h w 3"]:
        """Each view's shading (see ``NerfScene``) of the field's albedo, which is asked for where something is seen."""
        albedo = torch.zeros_like(point)
        albedo[seen] = self.field.albedo(point.detach()[seen])
        if not look.needs_normals:
            return albedo
        light, mode = (send(each, self._device) for each in (look.light.to(point.dtype), look.modes()))
        return shaded(albedo, normal, point, light[:, None, None], mode[:, None, None, None])

    def _backdrop(self, look: Look) -> Float[Tensor, "view 1 1 3"]:
        grey = torch.tensor(GREY, device=self._device)
        color = torch.where(look.replace_background[:, None].to(self._device), look.background.to(self._device), grey)
        return color[:, None, None]


def _ellipsoid(config: MeshConfig) -> tuple[Float[Tensor, "nx ny nz"], Float[Tensor, "2 3"]]:
    """Values and box of an ellipsoid; values are its distance from near its surface, in cells, over ``_BAND_CELLS``."""
    radii = torch.tensor(config.radii)
    upper = ((1 + _MARGIN) * radii).clamp(max=config.radius)
    shape = torch.Size([config.resolution + 1] * 3)
    points = grid_points(torch.arange(shape.numel()), shape, -upper, upper)
    scaled = (points / radii).norm(dim=-1).clamp(min=1e-6)
    distance = scaled * (1 - scaled) / (points / radii.square()).norm(dim=-1).clamp(min=1e-6)
    band = _BAND_CELLS * 2 * upper.max() / config.resolution
    return (distance / band).clamp(-1, 1).reshape(shape), torch.stack([-upper, upper])
