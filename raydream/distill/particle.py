"""``Particle``: one scene being optimised. A plain class; the runtime decides whether it lives in a Ray actor.

The autograd graph stays inside between ``render`` and ``apply``. Both carry their step: a doubled or stale call changes
nothing. Every random draw depends on (seed, purpose, particle, step), so that a replayed step is the same step.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from raydream.backend import load_backend
from raydream.camera import orbit_cameras, sample_elevations, sample_uniform, stratified_azimuths
from raydream.config.run import ParticleConfig
from raydream.coordinates import Box, encode_ccm
from raydream.diffusion.latent import resize, round_trip_loss
from raydream.diffusion.layout import latent_px
from raydream.distill.artefacts import Eye, Stats, export_particle
from raydream.distill.messages import Message, from_wire, pack_views
from raydream.distill.snapshot import load_snapshot, optimizer_arrays, restore_optimizer, save_snapshot
from raydream.priors.find import resolve_agp_prior
from raydream.priors.load import load_codec
from raydream.scene.isosurface import solid_box
from raydream.scene.nerf import NerfRender, NerfScene, draw_look, plain_look
from raydream.seeds import generator
from raydream.store.run_folder import FileDigest
from raydream.types import Cameras, Render, Views


@dataclass(frozen=True)
class Pending:
    """A render that waits for its gradients; its latents and maps hold the graph."""

    step: int
    nerf: NerfRender
    latents: Float[Tensor, "view 4 h w"]
    maps: Float[Tensor, "view 4 mh mw"] | None
    spent: dict[str, float]


class Particle:
    """A scene with its optimiser and occupancy grid, driven one step at a time."""

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self.step = 0

    def setup(self, config: ParticleConfig) -> dict[str, str]:
        """Builds the scene (the constructor stays light, so that an actor is placed before anything heavy happens)."""
        torch.set_num_threads(1)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backend = load_backend(config.backend, self.device.type)
        init = generator(config.seed, "scene", config.index, 0)
        stage = config.stage
        self.scene = NerfScene(stage.scene, stage.shading, self.backend, self.device, init)
        self.codec = load_codec(config, self.device)
        self.map_px = map_px(config)
        self.box = torch.tensor([[-1.0] * 3, [1.0] * 3]) * stage.scene.radius
        self.optimizer = torch.optim.Adam(self.scene.param_groups(), betas=(0.9, 0.99), eps=1e-15, fused=True)
        self._full_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self._pending = 0, None
        self._refresh_occupancy()
        return {"backend": self.backend.name, "device": self.device.type}

    def render(self, step: int) -> Message:
        """The latents of this particle's cameras of a step; keeps the graph for ``apply`` of the same step."""
        if step != self.step:
            raise RuntimeError(f"particle {self.config.index} stands at step {self.step}, asked to render step {step}")
        started, cpu = time.perf_counter(), time.thread_time()
        stage, index, seed = self.config.stage, self.config.index, self.config.seed
        cameras = step_cameras(self.config, step)
        look = draw_look(stage.shading, stage.scene, cameras, step, generator(seed, "look", index, step))
        nerf = self.scene.render(
            cameras,
            look,
            generator(seed, "march", index, step),
            normals=stage.losses.orientation.at(step) > 0,
            ccm_box=self._box(step) if self.map_px else None,
        )
        latents = self.codec.encode(nerf.render, generator(seed, "codec", index, step))
        maps = encode_maps(nerf.render, self.map_px) if self.map_px else None
        spent = {"time/render_s": time.perf_counter() - started, "cpu/render_s": time.thread_time() - cpu}
        self._pending = Pending(step, nerf, latents, maps, spent)
        views = Views(latents, cameras.c2w, cameras.fov_y_deg, cameras.azimuth_deg, cameras.elevation_deg)
        return pack_views(views, step, self.config.wire_dtype, maps)

    def apply(self, step: int, gradient: np.ndarray, map_gradient: np.ndarray | None = None) -> dict[str, float]:
        """One optimiser step along the gradients of each view's latents and, with an AGP, of each view's map; stale
        or doubled calls are dropped.
        """
        if self._pending is None or self._pending.step != step or step != self.step:
            return {}
        started, cpu = time.perf_counter(), time.thread_time()
        pending, self._pending = self._pending, None
        nerf, latents, geometry = pending.nerf, pending.latents, self.config.stage.geometry
        direction = from_wire(gradient, self.device) / len(latents)
        regularizers = self.scene.regularizers(nerf, self.config.stage.losses, step)
        total = (latents * direction).sum()
        if map_gradient is not None:
            assert pending.maps is not None
            map_direction = from_wire(map_gradient, self.device) / len(latents)
            pull = (pending.maps * map_direction).sum()
            total = geometry.ori_weight.at(step) * total + geometry.align_weight.at(step) * pull
        round_trip = self.config.stage.losses.round_trip.at(step)
        if round_trip > 0:
            regularizers["round_trip"] = round_trip * round_trip_loss(nerf.render.rgb, self.codec.decode(latents))
        total = total + sum(regularizers.values(), latents.new_zeros(()))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        for group, full_lr in zip(self.optimizer.param_groups, self._full_lrs):
            group["lr"] = full_lr * self.config.stage.lr_scale.at(step)
        self.optimizer.step()
        self.step = step + 1
        if self.step % self.config.stage.scene.occupancy_every == 0:
            self._refresh_occupancy()
        stats = {f"loss/{name}": float(value.detach()) for name, value in regularizers.items()}
        stats["loss/rgb"] = 0.5 * len(latents) * float(direction.square().sum())
        if map_gradient is not None:
            stats["loss/ccm"] = 0.5 * len(latents) * float(map_direction.square().sum())
        stats["scene/opacity"] = float(nerf.render.opacity.detach().mean())
        stats["scene/samples"] = float(len(nerf.weights))
        return (
            stats
            | pending.spent
            | {"time/apply_s": time.perf_counter() - started, "cpu/apply_s": time.thread_time() - cpu}
        )

    @torch.no_grad()
    def look_at(self, azimuth_deg: list[float], elevation_deg: float, image_px: int) -> np.ndarray:
        """Pictures for people, uint8 ``[view, h, w, 4]`` with straight colour and alpha: albedo, from the middle
        of the ranges.
        """
        cameras = self._preview_cameras(azimuth_deg, elevation_deg, image_px)
        render = self.scene.render(cameras, plain_look(len(azimuth_deg), (0.0, 0.0, 0.0))).render
        color = render.foreground / render.opacity.clamp(min=1e-4)
        picture = torch.cat([color.clamp(0, 1), render.opacity.clamp(0, 1)], dim=-1)
        return (picture * 255).round().to(torch.uint8).cpu().numpy()

    def export(self, uri: str) -> Stats:
        """Writes this particle's mesh, film and picture into the run folder."""
        stage = self.config.stage
        shaded = stage.shading.albedo_steps < stage.num_steps  # else whatever light there is, is in the albedo
        unlit = {"auto": not shaded, "lit": False, "unlit": True}[self.config.output.material]
        eye = Eye(self._preview_cameras, self.look_at)
        return export_particle(self.scene, eye, self.config.index, self.config.output, unlit, uri)

    def snapshot(self) -> Message:
        """Everything that a later step depends on, as arrays."""
        arrays = {f"scene/{name}": p.detach().cpu().numpy().copy() for name, p in self.scene.state_dict().items()}
        arrays["occupancy"] = self.scene.occupancy.values.cpu().numpy().copy()
        arrays["box"] = self.box.numpy().copy()
        arrays["step"] = np.array(self.step, dtype=np.int64)
        return arrays | optimizer_arrays(self.optimizer)

    def restore(self, arrays: Message) -> int:
        """Takes a snapshot's state and returns its step; a render in flight is forgotten."""
        state = {name.removeprefix("scene/"): a for name, a in arrays.items() if name.startswith("scene/")}
        self.scene.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in state.items()})
        self.scene.occupancy.values = torch.from_numpy(np.array(arrays["occupancy"])).to(self.device)
        self.box = torch.from_numpy(np.array(arrays["box"]))
        restore_optimizer(self.optimizer, arrays)
        self.step, self._pending = int(arrays["step"]), None
        return self.step

    def save(self, uri: str, step: int) -> dict[str, FileDigest]:
        """Writes this particle's file of a checkpoint and says what is in it."""
        assert step == self.step, f"asked to save step {step} at step {self.step}"
        return save_snapshot(uri, step, self._file, self.snapshot())

    def load(self, uri: str, step: int) -> int:
        """Goes back to a committed checkpoint."""
        return self.restore(load_snapshot(uri, step, self._file))

    @property
    def _file(self) -> str:
        return f"particle_{self.config.index:03d}.safetensors"

    def _refresh_occupancy(self) -> None:
        draws = generator(self.config.seed, "occupancy", self.config.index, self.step)
        self.scene.update_occupancy(draws)

    def _box(self, step: int) -> Box:
        """The object's box, measured on a schedule; the last one stays while nothing is solid."""
        if step % self.config.stage.geometry.box_every == 0:
            device, occupancy = self.device, self.scene.occupancy
            measured = solid_box(
                lambda points: self.scene.field.density(points.to(device)), self.scene.config.radius, occupancy.mask
            )
            self.box = self.box if measured is None else measured
        return Box(self.box[0], self.box[1])

    def _preview_cameras(self, azimuth_deg: list[float], elevation_deg: float, image_px: int) -> Cameras:
        camera = self.config.stage.camera
        view = len(azimuth_deg)
        distance, fov = sum(camera.distance) / 2, sum(camera.fov_y_deg) / 2
        return orbit_cameras(
            torch.tensor(azimuth_deg),
            torch.full((view,), elevation_deg),
            torch.full((view,), distance),
            torch.full((view,), fov),
            image_px,
            image_px,
        )


def map_px(config: ParticleConfig) -> int:
    """The size of the maps that a run's AGP works on; 0 without one."""
    geometry = config.stage.geometry
    if geometry.agp == "off":
        return 0
    return latent_px(resolve_agp_prior(geometry.prior, config.prior.source))


def encode_maps(render: Render, size_px: int) -> Float[Tensor, "view 4 mh mw"]:
    """A render's canonical coordinate maps as an AGP's latents: pixels are joined as in its training, by their mean
    weighted by opacity.
    """
    assert render.ccm is not None
    maps = encode_ccm(render.ccm, render.opacity)
    return adaptive_avg_pool2d(maps, size_px) if maps.shape[-1] > size_px else resize(maps, size_px)


def step_cameras(config: ParticleConfig, step: int) -> Cameras:
    """This particle's cameras of a step: azimuths stratified over all particles, which all draw the same plan."""
    camera, view = config.stage.camera, config.stage.camera.views_per_particle
    plan = stratified_azimuths(config.num_particles, view, generator(config.seed, "azimuth", 0, step))
    draws = generator(config.seed, "camera", config.index, step)
    image_px = int(camera.image_px.at(step))
    return orbit_cameras(
        plan[config.index],
        sample_elevations((view,), camera.elevation_deg, camera.uniform_sphere_probability, draws),
        sample_uniform((view,), camera.distance, draws),
        sample_uniform((view,), camera.fov_y_deg, draws),
        image_px,
        image_px,
    )
