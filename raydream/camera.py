"""The one place for camera conventions: orbits, rays, projection, view bins, and the cameras of a step.

World: right-handed, +y up. A camera looks down its own -z with +x to the right and +y up (OpenGL, glTF). Azimuth 0 is
the front of an object: the camera stands on +z and looks along -z; azimuth grows towards +x, elevation towards +y.
Row 0 of an image is its top; pixel centres lie at +0.5.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.device import send
from raydream.types import Cameras, Rays

ViewBin = Literal["front", "side", "back", "overhead"]


def orbit_cameras(
    azimuth_deg: Float[Tensor, " view"],
    elevation_deg: Float[Tensor, " view"],
    distance: Float[Tensor, " view"],
    fov_y_deg: Float[Tensor, " view"],
    height_px: int,
    width_px: int,
) -> Cameras:
    """Cameras on spheres around the origin that look at it, with the world's +y up in the image."""
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    sin_a, cos_a, sin_e, cos_e = azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()
    backward = torch.stack([cos_e * sin_a, sin_e, cos_e * cos_a], dim=-1)  # camera +z
    right = torch.stack([cos_a, torch.zeros_like(cos_a), -sin_a], dim=-1)  # exact also at the poles
    up = torch.stack([-sin_e * sin_a, cos_e, -sin_e * cos_a], dim=-1)
    c2w = torch.zeros(len(azimuth_deg), 4, 4, dtype=azimuth_deg.dtype, device=azimuth_deg.device)
    c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2] = right, up, backward
    c2w[:, :3, 3] = backward * distance[:, None]
    c2w[:, 3, 3] = 1.0
    return Cameras(c2w, fov_y_deg, azimuth_deg, elevation_deg, height_px, width_px)


def camera_rays(cameras: Cameras) -> Rays:
    """One ray through each pixel centre, ordered view, row, column; origins are the camera centres."""
    h, w = cameras.height_px, cameras.width_px
    dtype, device = cameras.c2w.dtype, cameras.c2w.device
    tangent = torch.tan(torch.deg2rad(cameras.fov_y_deg) / 2)[:, None, None]
    x = ((torch.arange(w, dtype=dtype, device=device) + 0.5) / w * 2 - 1)[None, None, :] * tangent * (w / h)
    y = (1 - (torch.arange(h, dtype=dtype, device=device) + 0.5) / h * 2)[None, :, None] * tangent
    view = cameras.num_views
    x, y = x.expand(view, h, w), y.expand(view, h, w)
    local = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    directions = torch.einsum("vij,vhwj->vhwi", cameras.c2w[:, :3, :3], local)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    origins = cameras.c2w[:, None, None, :3, 3].expand_as(directions)
    return Rays(origins.reshape(-1, 3), directions.reshape(-1, 3))


def clip_from_world(cameras: Cameras, near: float = 0.01, far: float = 100.0) -> Float[Tensor, "view 4 4"]:
    """OpenGL projection times view matrix; clip ``w`` is the distance along the viewing axis in scene units."""
    rotation = cameras.c2w[:, :3, :3]
    view = torch.zeros_like(cameras.c2w)
    view[:, :3, :3] = rotation.transpose(1, 2)
    view[:, :3, 3] = -torch.einsum("vji,vj->vi", rotation, cameras.c2w[:, :3, 3])
    view[:, 3, 3] = 1.0
    focal = 1.0 / torch.tan(torch.deg2rad(cameras.fov_y_deg) / 2)
    projection = torch.zeros_like(view)
    projection[:, 0, 0] = focal * cameras.height_px / cameras.width_px
    projection[:, 1, 1] = focal
    projection[:, 2, 2] = (near + far) / (near - far)
    projection[:, 2, 3] = 2 * near * far / (near - far)
    projection[:, 3, 2] = -1.0
    return projection @ view


def wrap_degrees(angle_deg: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same angle in [-180, 180)."""
    return (angle_deg + 180) % 360 - 180


def view_bins(
    azimuth_deg: Float[Tensor, " view"],
    elevation_deg: Float[Tensor, " view"],
    front_deg: float = 45.0,
    back_deg: float = 45.0,
    overhead_deg: float = 60.0,
) -> list[ViewBin]:
    """The word for each view: overhead above ``overhead_deg``, front and back within so many degrees of 0 and 180."""
    bins: list[ViewBin] = []
    for azimuth, elevation in zip(wrap_degrees(azimuth_deg).abs().tolist(), elevation_deg.tolist()):
        if elevation > overhead_deg:
            bins.append("overhead")
        elif azimuth <= front_deg:
            bins.append("front")
        elif azimuth >= 180 - back_deg:
            bins.append("back")
        else:
            bins.append("side")
    return bins


def stratified_azimuths(
    num_particles: int, views_per_particle: int, generator: torch.Generator
) -> Float[Tensor, "particle view"]:
    """Azimuths in [-180, 180) with exactly one in each of ``num_particles * views_per_particle`` equal sectors.

    A particle's own views lie in different ``360 / views_per_particle`` sectors, so that it is seen from all around in
    each step (Fantasia3D stratifies by rank; this stratifies over all particles of the step).
    """
    sector = 360.0 / (num_particles * views_per_particle)
    ranks = torch.stack([torch.randperm(num_particles, generator=generator) for _ in range(views_per_particle)], dim=1)
    stratum = ranks + num_particles * torch.arange(views_per_particle)
    offset = 360.0 * torch.rand((), generator=generator)
    within = torch.rand(num_particles, views_per_particle, generator=generator)
    return wrap_degrees(offset + sector * (stratum + within))


def sample_elevations(
    shape: tuple[int, ...],
    range_deg: tuple[float, float],
    uniform_sphere_probability: float,
    generator: torch.Generator,
) -> Float[Tensor, "*shape"]:
    """Elevations in a band: uniform by area on the sphere with the given probability, else uniform in degrees.

    Uniform by area means uniform in sin(elevation) between the sines of *both* ends of the band.
    """
    low, high = (math.radians(value) for value in range_deg)
    u, choice = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    by_degrees = torch.rad2deg(low + (high - low) * u)
    sine = math.sin(low) + (math.sin(high) - math.sin(low)) * u
    by_area = torch.rad2deg(torch.asin(sine.clamp(-1, 1)))
    return torch.where(choice < uniform_sphere_probability, by_area, by_degrees)


def sample_uniform(
    shape: tuple[int, ...], low_high: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Uniform numbers in ``[low, high)``."""
    return low_high[0] + (low_high[1] - low_high[0]) * torch.rand(shape, generator=generator)


def cameras_to(cameras: Cameras, device: torch.device) -> Cameras:
    """The cameras on a device: some hundred bytes, where their rays would be megabytes."""
    return Cameras(
        send(cameras.c2w, device),
        send(cameras.fov_y_deg, device),
        send(cameras.azimuth_deg, device),
        send(cameras.elevation_deg, device),
        cameras.height_px,
        cameras.width_px,
    )


def select_views(cameras: Cameras, index: slice) -> Cameras:
    """A part of the cameras."""
    return Cameras(
        cameras.c2w[index],
        cameras.fov_y_deg[index],
        cameras.azimuth_deg[index],
        cameras.elevation_deg[index],
        cameras.height_px,
        cameras.width_px,
    )
