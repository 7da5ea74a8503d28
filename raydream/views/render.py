"""An asset becomes rows: its cameras, drawn from (seed, uid, view) alone, and what they see of it."""

import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from raydream.assets.asset import Asset, AssetError, normalise_asset
from raydream.assets.files import read_limited
from raydream.assets.libraries import AssetRecord
from raydream.assets.load import DEFAULT_LIMITS, load_record
from raydream.assets.procedural import PROCEDURAL
from raydream.assets.raster import AssetViews, render_asset, shade
from raydream.camera import orbit_cameras, select_views, wrap_degrees
from raydream.config.render import ImageKind, ViewConfig
from raydream.coordinates import tight_box, unit_coordinates
from raydream.seeds import generator
from raydream.types import Backend, Cameras
from raydream.views.schema import encode_image, views_table

_SAMPLES_AT_ONCE = 2**22  # a sample costs some 70 bytes on its way: views of large images are rendered a few at a time


def render_record(record: AssetRecord, config: ViewConfig, backend: Backend) -> pa.Table:
    """All views of one asset as rows of ``views_schema``.

    Raises AssetError: the reasons of ``load_asset``, ``hash_mismatch`` where the file is not the one that the record
    describes (its licence and captions may be another's), or ``blank`` where its views show nothing.
    """
    sha256 = None if record.path.parts[:1] == (PROCEDURAL,) else _file_sha256(record)
    asset = load_record(record)
    cameras, distance = draw_cameras(config, record.uid)
    images = render_images(_normalised(asset, config), cameras, config, backend)
    placed = {
        "c2w": cameras.c2w.numpy(),
        "fov_y_deg": cameras.fov_y_deg.numpy(),
        "azimuth_deg": cameras.azimuth_deg.numpy(),
        "elevation_deg": cameras.elevation_deg.numpy(),
        "distance": distance.numpy(),
    }
    told = (asset.num_source_faces, asset.warnings)
    return views_table(config, record, sha256 or _asset_sha256(asset), told, placed, images)


def draw_cameras(config: ViewConfig, uid: str) -> tuple[Cameras, Float[Tensor, " view"]]:
    """The cameras of an object and their distances: a function of the settings, the uid and the view's number alone.

    Elevation, distance and field of view are uniform in their ranges; so is the azimuth, or each view has its own part
    of the range (from a starting point of the object's own, where the range is the whole circle).
    """
    start = torch.rand(1, generator=generator(config.seed, f"views/{uid}", 0, 0))
    draws = [torch.rand(4, generator=generator(config.seed, f"views/{uid}", i, 1)) for i in range(config.num_views)]
    azimuth_u, elevation_u, distance_u, fov_u = torch.stack(draws).unbind(-1)
    low, high = config.azimuth_deg
    if config.stratified_azimuth:
        azimuth_u = (torch.arange(config.num_views) + azimuth_u) / config.num_views
        if high - low >= 360:
            azimuth_u = azimuth_u + start
    azimuth = wrap_degrees(low + (high - low) * azimuth_u)
    elevation, distance, fov = (
        low_high[0] + (low_high[1] - low_high[0]) * u
        for low_high, u in (
            (config.elevation_deg, elevation_u),
            (config.distance, distance_u),
            (config.fov_y_deg, fov_u),
        )
    )
    return orbit_cameras(azimuth, elevation, distance, fov, config.image_px, config.image_px), distance


def render_images(asset: Asset, cameras: Cameras, config: ViewConfig, backend: Backend) -> dict[ImageKind, np.ndarray]:
    """Encoded images ``[view, h, w, channel]`` of each kind that is asked for, of a normalised asset.

    Raises AssetError ``blank`` where no view shows anything of it: what is nowhere seen teaches nothing.
    """
    at_once = max(1, _SAMPLES_AT_ONCE // (config.image_px * config.supersample) ** 2)
    parts: dict[ImageKind, list[np.ndarray]] = {kind: [] for kind in config.images}
    seen = False
    for first in range(0, cameras.num_views, at_once):
        some = select_views(cameras, slice(first, first + at_once))
        views = render_asset(asset, some, backend, config.supersample)
        seen = seen or bool((views.alpha > 0).any())
        for kind, images in parts.items():
            images.append(encode_image(kind, _image(kind, views, some, config).numpy()))
    if not seen:
        raise AssetError("blank", f"none of its {cameras.num_views} views shows anything of it")
    return {kind: np.concatenate(images) for kind, images in parts.items()}


def _image(
    kind: ImageKind, views: AssetViews, cameras: Cameras, config: ViewConfig
) -> Float[Tensor, "view h w channel"]:
    covered = views.alpha > 0
    match kind:
        case "rgb":
            return views.rgb
        case "alpha":
            return views.alpha
        case "lit":
            return views.rgb * shade(views, cameras, config.ambient)
        case "shade":
            return torch.where(covered, shade(views, cameras, config.ambient), 0.0)
        case "depth":
            image = views.depth
        case "normal":
            image = views.normal
        case "ccm":
            image = views.ccm
    return torch.where(covered, image / views.alpha, 0.0)


def _normalised(asset: Asset, config: ViewConfig) -> Asset:
    if config.normalise == "sphere":
        return normalise_asset(asset)
    points = asset.vertices.double()  # far-off objects lose digits in float32 otherwise
    return replace(asset, vertices=unit_coordinates(points, tight_box(points)).to(asset.vertices.dtype))


def _file_sha256(record: AssetRecord) -> str:
    found = hashlib.sha256(read_limited(record.path, DEFAULT_LIMITS.max_bytes)).hexdigest()
    if record.sha256 is not None and found != record.sha256:
        raise AssetError("hash_mismatch", f"the record says {record.sha256[:16]}..., the file is {found[:16]}...")
    return found


def _asset_sha256(asset: Asset) -> str:
    digest = hashlib.sha256()
    for tensor in (asset.vertices, asset.faces, asset.corner_colors):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
