"""``NerfScene``: what a particle of the first stage optimises, and how it is seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raydream.camera import camera_rays, cameras_to
from raydream.config.cluster import OutputConfig
from raydream.config.scene import LossConfig, NerfConfig, SceneConfig, ShadingConfig
from raydream.coordinates import Box, canonical_coordinates
from raydream.device import send
from raydream.scene import losses
from raydream.scene.background import BackgroundNetwork
from raydream.scene.field import RadianceField
from raydream.scene.isosurface import extract_surface, solid_box, solid_values
from raydream.scene.occupancy import OccupancyGrid
from raydream.scene.protocol import Draws
from raydream.seeds import generator_on
from raydream.store.tensors import odd_names
from raydream.types import Backend, Cameras, Mesh, Rays, RaySamples, Render, VolumeSamples

_OCCUPANCY = "occupancy"
SURFACE_RAYS = 5  # rays to a point of the surface: down the normal and from four sides
SURFACE_RAY_TILT_DEG = 45.0
SURFACE_STEPS_OUTSIDE, SURFACE_STEPS = 2, 10
AMBIENT, DIFFUSE = 0.1, 0.9  # DreamFusion's point light
LIGHT_DISTANCE = (1.6, 3.0)  # DreamFusion's 0.8 to 1.5, for cameras that stand twice as far away
GREY = (0.5, 0.5, 0.5)  # behind a scene without a background network

Shading = Literal["albedo", "lambertian", "textureless"]
SHADINGS: tuple[Shading, ...] = get_args(Shading)


@dataclass(frozen=True)
class Look:
    """How each view of a render is lit and what lies behind it; drawn by ``draw_look`` or fixed for a preview.

    ``background`` replaces the scene's own where ``replace_background`` is set.
    """

    shading: tuple[Shading, ...]
    light: Float[Tensor, "view 3"]
    background: Float[Tensor, "view 3"]
    replace_background: Bool[Tensor, " view"]

    @property
    def needs_normals(self) -> bool:
        return any(shading != "albedo" for shading in self.shading)

    def modes(self) -> Int[Tensor, " view"]:
        """Each view's place in ``SHADINGS``."""
        return torch.tensor([SHADINGS.index(shading) for shading in self.shading])


def shaded(
    albedo: Float[Tensor, "*place 3"],
    normal: Float[Tensor, "*place 3"],
    point: Float[Tensor, "*place 3"],
    light: Float[Tensor, "*#place 3"],
    mode: Int[Tensor, "*#place 1"],
) -> Float[Tensor, "*place 3"]:
    """By ``Look.modes``: albedo, albedo under a point light (ambient + diffuse * cosine), or that light on white
    (DreamFusion, appendix A.1).
    """
    lambert = (normal * F.normalize(light - point, dim=-1)).sum(-1, keepdim=True).clamp(min=0)
    lit = AMBIENT + DIFFUSE * lambert
    return torch.where(mode == 0, albedo, torch.where(mode == 1, albedo * lit, lit.expand_as(albedo)))


def plain_look(num_views: int, color: Sequence[float] | None = None) -> Look:
    """Albedo on the scene's own background, or on one colour."""
    background = torch.tensor([color if color is not None else GREY] * num_views, dtype=torch.float32)
    replaced = torch.full((num_views,), color is not None)
    shading: list[Shading] = ["albedo"] * num_views
    return Look(tuple(shading), torch.zeros(num_views, 3), background, replaced)


def draw_look(
    shading: ShadingConfig, scene: SceneConfig, cameras: Cameras, step: int, generator: torch.Generator
) -> Look:
    """DreamFusion's augmentation, for each view: a shading mode, a light near the camera, perhaps a random backdrop."""
    view = cameras.num_views
    u, v, b = torch.rand(3, view, generator=generator)
    modes: list[Shading] = ["albedo"] * view
    if step >= shading.albedo_steps:
        for i in range(view):
            if u[i] < shading.shaded_probability:
                modes[i] = "textureless" if v[i] < shading.textureless_probability else "lambertian"
    position = F.normalize(cameras.c2w[:, :3, 3].cpu().float(), dim=-1) + torch.randn(view, 3, generator=generator)
    low, high = LIGHT_DISTANCE
    distance = low + (high - low) * torch.rand(view, 1, generator=generator)
    light = F.normalize(position, dim=-1) * distance
    background = torch.rand(view, 3, generator=generator)
    if scene.random_background_grey:
        background = background[:, :1].expand(-1, 3)
    darkest, lightest = scene.random_background
    background = darkest + (lightest - darkest) * background
    return Look(tuple(modes), light, background, b < scene.random_background_probability)


class NerfScene(nn.Module):
    """A ``Scene``: radiance field, occupancy grid and background; renders are differentiable by every parameter."""

    def __init__(
        self,
        config: NerfConfig,
        shading: ShadingConfig,
        loss_weights: LossConfig,
        backend: Backend,
        device: torch.device,
        draws: Draws,
    ) -> None:
        super().__init__()
        self.config, self._shading, self._loss_weights = config, shading, loss_weights
        self._backend, self._device, self._draws = backend, device, draws
        init = draws("scene", 0)
        self.field = RadianceField(config, backend, init)
        self.background = BackgroundNetwork(init) if config.background == "network" else None
        self.to(device)
        self._grey = torch.tensor(GREY, device=device)
        self.step_size = 2 * config.radius * math.sqrt(3) / config.samples_per_diagonal
        self.occupancy = OccupancyGrid(config.occupancy_resolution, config.radius, device)

    def param_groups(self) -> list[dict[str, object]]:
        """Groups for Adam: the table learns faster than the small networks."""
        field = self.field
        groups: list[dict[str, object]] = [
            {"params": [field.table], "lr": self.config.lr_grid},
            {"params": [field.hidden, field.head], "lr": self.config.lr_network},
        ]
        if self.background is not None:
            groups.append({"params": list(self.background.parameters()), "lr": self.config.lr_background})
        return groups

    def after_step(self, step: int) -> None:
        """Now and then refreshes the occupancy grid from the field as it is."""
        if step % self.config.occupancy_every == 0:
            self.update_occupancy(self._draws("occupancy", step))

    def update_occupancy(self, generator: torch.Generator) -> None:
        """Refreshes the occupancy grid from the field as it is now."""
        self.occupancy.update(self.field.density, self.step_size, generator)

    def state(self) -> dict[str, Tensor]:
        """The parameters and the occupancy grid."""
        return {**self.state_dict(), _OCCUPANCY: self.occupancy.values}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """``ValueError`` where it is of a field of other sizes."""
        odd = odd_names(self.state(), state)
        if odd:
            raise ValueError(f"stages: a scene of other sizes cannot go on in this one ({odd[0]} differs)")
        self.load_state_dict({name: value for name, value in state.items() if name != _OCCUPANCY})
        self.occupancy.values = state[_OCCUPANCY].to(self._device)

    def render(self, cameras: Cameras, step: int, ccm_box: Box | None = None) -> Render:
        """The views of a training step: shaded, jittered and before the backgrounds that are drawn for it."""
        look = draw_look(self._shading, self.config, cameras, step, self._draws("look", step))
        normals = self._loss_weights.orientation.at(step) > 0
        return self.volume(cameras, look, self._draws("march", step), normals, ccm_box)

    def preview(self, cameras: Cameras) -> Render:
        return self.volume(cameras, plain_look(cameras.num_views, (0.0, 0.0, 0.0)))

    @torch.no_grad()
    def surface(self, output: OutputConfig) -> Mesh:
        """Where the density crosses a level, with the colours that renders show there."""
        from raydream.scene.finish import finish_mesh  # packages that only an export needs

        surface = extract_surface(
            self._density_anywhere,
            output.mesh_resolution,
            output.mesh_threshold or None,
            self.config.radius,
            self.occupancy.mask.cpu(),
        )
        return finish_mesh(surface, self.surface_color, output)

    def box(self) -> Box | None:
        measured = solid_box(self._density_anywhere, self.config.radius, self.occupancy.mask.cpu())
        return None if measured is None else Box(measured[0], measured[1])

    def solid_values(self, resolution: int) -> tuple[Float[Tensor, "x y z"], Float[Tensor, "2 3"]]:
        """What a mesh starts from: see ``isosurface.solid_values``."""
        return solid_values(self._density_anywhere, resolution, self.config.radius, self.occupancy.mask.cpu())

    def volume(
        self,
        cameras: Cameras,
        look: Look,
        generator: torch.Generator | None = None,
        normals: bool = False,
        ccm_box: Box | None = None,
    ) -> Render:
        """Volume-renders all views at once. With a generator, samples are jittered along their rays (training).

        ``ccm_box`` asks for the canonical coordinate map of that box. Depth is the distance from the camera along the
        ray, weighted by opacity: 0 where there is nothing, ``depth / opacity`` is where a ray ends on average.
        """
        here, config = self._device, self.config
        rays = camera_rays(cameras_to(cameras, here))
        draws = None if generator is None else generator_on(here, generator)
        jitter = torch.full((len(rays.origins),), 0.5, device=here)
        samples = self._march(rays, jitter if draws is None else torch.rand(jitter.shape, generator=draws, device=here))
        middle = (samples.t_start + samples.t_end) / 2
        points = _along_rays(rays, samples, middle)
        noise = None
        if draws is not None and config.density_noise > 0:
            noise = torch.randn(len(points), generator=draws, device=here) * config.density_noise
        if normals or look.needs_normals:
            density, albedo, normal = self._in_tiles(self.field.with_normals, points, noise)
        else:
            density, albedo = self._in_tiles(self.field, points, noise)
            normal = None
        color = albedo if normal is None else self._shade(albedo, normal, points, samples, look, cameras)
        channels = [color, middle[:, None]]
        channels += [normal] if normal is not None else []
        channels += [_canonical(points, ccm_box)] if ccm_box is not None else []
        accumulated, opacity, weights = self._backend.composite(density, torch.cat(channels, dim=-1), samples)
        images = self._images(accumulated, opacity, rays, cameras, look, normal is not None, ccm_box is not None)
        return replace(images, volume=VolumeSamples(rays, samples, weights, normal))

    @torch.no_grad()
    def surface_color(
        self, points: Float[Tensor, "point 3"], normals: Float[Tensor, "point 3"]
    ) -> Float[Tensor, "point 3"]:
        """The colour in [0, 1] that renders show at points of the object's surface, given the outward unit normals.

        A field's surface is no skin: rays take their colour from several steps before and behind it, and training sees
        only that mixture, so that the albedo at the point itself may be any. Short rays down the normal and from
        ``SURFACE_RAY_TILT_DEG`` around it are composited as in a render. Where they meet nothing the albedo remains.
        """
        points, normals = points.to(self._device), normals.to(self._device)
        color = 1e-3 * self.field.albedo(points)
        opacity = torch.full_like(color[:, :1], 1e-3)
        for direction in _surface_rays(normals):
            rays = Rays(points - SURFACE_STEPS_OUTSIDE * self.step_size * direction, direction)
            jitter = torch.full((len(points),), 0.5, device=self._device)
            samples = self._backend.march(rays, self.occupancy.mask, self.config.radius, self.step_size, jitter)
            samples = _nearest(samples, SURFACE_STEPS * self.step_size)
            density, albedo = self.field(_along_rays(rays, samples, (samples.t_start + samples.t_end) / 2))
            accumulated, seen, _ = self._backend.composite(density, albedo, samples)
            color, opacity = color + accumulated, opacity + seen[:, None]
        return color / opacity

    def _in_tiles(
        self,
        field: Callable[..., tuple[Tensor, ...]],
        points: Float[Tensor, "sample 3"],
        noise: Float[Tensor, " sample"] | None,
    ) -> tuple[Tensor, ...]:
        """What a field says of points, all at once or in tiles, whose hidden layers are computed again on the way back:
        only places and answers are kept of them.
        """
        size = self.config.tile_samples
        if not size or len(points) <= size or not torch.is_grad_enabled():
            return field(points, noise)
        noises = [None] * -(-len(points) // size) if noise is None else noise.split(size)
        answers = [
            checkpoint(field, tile, own, use_reentrant=False, preserve_rng_state=False)
            for tile, own in zip(points.split(size), noises)
        ]
        return tuple(torch.cat(parts) for parts in zip(*answers))

    def _march(self, rays: Rays, jitter: Float[Tensor, " ray"]) -> RaySamples:
        """Samples in occupied cells; with ``min_alpha`` or ``min_transmittance`` only those that can be seen, found by
        a look at their density that keeps no graph.

        nerfacc's rule (``OccGridEstimator.sampling``): while space is thinner than ``min_alpha`` on average, the
        average stands for it, so that a thin fog does not vanish at once.
        """
        config = self.config
        samples = self._backend.march(rays, self.occupancy.mask, config.radius, self.step_size, jitter)
        if not (config.min_alpha or config.min_transmittance):
            return samples
        with torch.no_grad():
            density = self.field.density(_along_rays(rays, samples, (samples.t_start + samples.t_end) / 2))
            min_alpha = self.occupancy.values.mean().clamp(max=config.min_alpha)
        return self._backend.prune(density, samples, min_alpha, config.min_transmittance)

    def regularizers(self, render: Render, step: int) -> dict[str, Float[Tensor, ""]]:
        """Those of ``LossConfig``; the ones with weight 0 are left out."""
        opacity, volume = render.opacity.reshape(-1), render.volume
        assert volume is not None

        def orientation() -> Float[Tensor, ""]:
            assert volume.normals is not None, "orientation needs a render with normals"
            return losses.orientation(volume.weights, volume.normals, volume.rays.directions, volume.samples)

        found: dict[str, Callable[[], Tensor]] = {
            "sparsity": lambda: losses.sparsity(opacity),
            "opaqueness": lambda: losses.opaqueness(opacity),
            "orientation": orientation,
            "z_variance": lambda: losses.z_variance(volume.weights, volume.samples),
        }
        weights = {name: getattr(self._loss_weights, name).at(step) for name in found}
        return {name: weight * found[name]() for name, weight in weights.items() if weight}

    def _density_anywhere(self, points: Float[Tensor, "point 3"]) -> Float[Tensor, " point"]:
        return self.field.density(points.to(self._device))

    def _shade(
        self,
        albedo: Float[Tensor, "sample 3"],
        normal: Float[Tensor, "sample 3"],
        points: Float[Tensor, "sample 3"],
        samples: RaySamples,
        look: Look,
        cameras: Cameras,
    ) -> Float[Tensor, "sample 3"]:
        """Each view's shading of its samples."""
        view = samples.ray_index // (cameras.height_px * cameras.width_px)
        light, mode = (send(each, self._device)[view] for each in (look.light, look.modes()))
        return shaded(albedo, normal, points, light, mode[:, None])

    def _images(
        self,
        accumulated: Float[Tensor, "ray channel"],
        opacity: Float[Tensor, " ray"],
        rays: Rays,
        cameras: Cameras,
        look: Look,
        has_normal: bool,
        has_ccm: bool,
    ) -> Render:
        shape = (cameras.num_views, cameras.height_px, cameras.width_px)
        foreground = accumulated[:, :3].reshape(*shape, 3)
        alpha = opacity.reshape(*shape, 1)
        rgb = foreground + (1 - alpha) * self._backdrop(rays, cameras, look)
        normal = accumulated[:, 4:7].reshape(*shape, 3) if has_normal else None
        ccm = accumulated[:, -3:].reshape(*shape, 3) if has_ccm else None
        return Render(rgb, foreground, alpha, accumulated[:, 3].reshape(*shape, 1), normal, ccm)

    def _backdrop(self, rays: Rays, cameras: Cameras, look: Look) -> Float[Tensor, "view h w 3"]:
        shape = (cameras.num_views, cameras.height_px, cameras.width_px, 3)
        own = self._grey.expand(shape) if self.background is None else self.background(rays.directions).reshape(shape)
        drawn = send(look.background, self._device)[:, None, None, :].expand(shape)
        return torch.where(send(look.replace_background, self._device)[:, None, None, None], drawn, own)


def _along_rays(rays: Rays, samples: RaySamples, distance: Float[Tensor, " sample"]) -> Float[Tensor, "sample 3"]:
    """The points at a distance on each sample's ray; one gather of whole rows is several times faster than two."""
    ray = torch.cat([rays.origins, rays.directions], dim=-1).index_select(0, samples.ray_index)
    return torch.addcmul(ray[:, :3], ray[:, 3:], distance[:, None])


def _surface_rays(normals: Float[Tensor, "point 3"]) -> Float[Tensor, "direction point 3"]:
    """Unit directions of rays that reach a surface: against its normal and, tilted, from around it."""
    axis = F.one_hot(normals.abs().argmin(-1), 3).to(normals)
    across = F.normalize(torch.linalg.cross(normals, axis), dim=-1)
    beside = torch.linalg.cross(normals, across)
    tilt = math.radians(SURFACE_RAY_TILT_DEG)
    up, out = math.cos(tilt) * normals, math.sin(tilt)
    turns = [2 * math.pi * k / (SURFACE_RAYS - 1) for k in range(SURFACE_RAYS - 1)]
    around = [up + out * (math.cos(turn) * across + math.sin(turn) * beside) for turn in turns]
    return -torch.stack([normals, *around])


def _nearest(samples: RaySamples, distance: float) -> RaySamples:
    """The samples that begin within a distance of their rays' origins."""
    kept = samples.t_start < distance
    ray_index = samples.ray_index[kept]
    counts = torch.bincount(ray_index, minlength=len(samples.counts))
    return RaySamples(ray_index, samples.t_start[kept], samples.t_end[kept], counts.cumsum(0) - counts, counts)


def _canonical(points: Float[Tensor, "sample 3"], box: Box) -> Float[Tensor, "sample 3"]:
    """Canonical coordinates in [0, 1]; what lies outside the box, such as thin fog, is seen on its faces."""
    here = Box(*(send(corner.to(points.dtype), points.device) for corner in (box.minimum, box.maximum)))
    return canonical_coordinates(points, here).clamp(0, 1)
