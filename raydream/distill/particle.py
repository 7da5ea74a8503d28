"""``Particle``: one scene being optimised. A plain class; the runtime decides whether it lives in a Ray actor.

The autograd graph stays inside between ``render`` and ``apply``. Both carry their step: a doubled or stale call changes
nothing. Every random draw depends on (seed, purpose, particle, step), so that a replayed step is the same step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from raydream.backend import load_backend
from raydream.camera import orbit_cameras, sample_elevations, sample_uniform, stratified_azimuths
from raydream.config import strict_json
from raydream.config.actors import ParticleConfig
from raydream.config.branches import BranchConfig
from raydream.config.run import RunConfig
from raydream.coordinates import Box, encode_ccm
from raydream.device import describe, own_device
from raydream.diffusion.latent import LatentCodec, normal_latent, normal_picture, random_turn, resize, round_trip_loss
from raydream.diffusion.layout import latent_px
from raydream.distill.finite import NonFinite, all_finite
from raydream.distill.messages import Message, from_wire, pack_views, read_figures
from raydream.distill.snapshot import load_snapshot, optimizer_arrays, restore_optimizer, save_snapshot
from raydream.priors.find import resolve_agp_prior, resolve_prior
from raydream.priors.kinds import prior_kind
from raydream.scene.kinds import make_scene, take_over
from raydream.scene.protocol import Scene
from raydream.seeds import generator
from raydream.stopwatch import Stopwatch
from raydream.types import Cameras, Latents, Render, Views

if TYPE_CHECKING:
    from raydream.distill.artefacts import ExportFigures
    from raydream.store.run_folder import FileDigest

_SCENE, _FINITE = "scene/", "finite"


@dataclass(frozen=True)
class Seen:
    """A step's render; its latents, by kind of render, hold the graph."""

    cameras: Cameras
    render: Render
    latents: dict[str, Latents]


@dataclass(frozen=True)
class Pending:
    """A step that waits for its gradients; without ``seen`` it is rendered again when they are there."""

    step: int
    seen: Seen | None
    spent: dict[str, float]


class Particle:
    """A scene with its optimiser, driven one step at a time. ``codec`` is for its pictures, ``map_px`` the size of its
    coordinate maps, ``normal_px`` of normals that are latents, where a branch is on them; ``kernels`` names those that
    the scene was given.
    """

    def __init__(
        self,
        config: ParticleConfig,
        device: torch.device,
        scene: Scene,
        codec: LatentCodec | None,
        map_px: int = 0,
        kernels: str = "",
        normal_px: int = 0,
    ) -> None:
        self.config, self.device, self.scene, self.codec, self.map_px = config, device, scene, codec, map_px
        self.kernels, self.step, self.normal_px = kernels, config.first_step, normal_px
        self.box = torch.tensor([[-1.0] * 3, [1.0] * 3])  # where an object lies
        self.optimizer = torch.optim.Adam(scene.param_groups(), betas=(0.9, 0.99), eps=1e-15, fused=True)
        self._full_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._pending: Pending | None = None
        self._non_finite = NonFinite()
        self.gradient_scale = 1.0  # what passes through a VAE in float16 may be too large for it

    def hardware(self) -> str:
        """What it computes on, and with whose kernels."""
        return f"{describe(self.device)}, kernels {self.kernels}"

    def render(self, step: int) -> Message:
        """The latents of this particle's cameras of a step; keeps the graph for ``apply`` of the same step, unless that
        is to render again: with a graph here too, lest other kernels or another order give other bits.
        """
        if step != self.step:
            raise RuntimeError(f"particle {self.config.index} stands at step {self.step}, asked to render step {step}")
        watch = Stopwatch(self.device)
        self._pending = None  # what an earlier call has left is not held beside its successor
        if self.map_px:
            self._measure_box(step)
        seen = self._see(step)
        self._pending = Pending(step, None if self.config.renders_again else seen, watch.figures("render"))
        cameras = seen.cameras
        where = (cameras.c2w, cameras.fov_y_deg, cameras.azimuth_deg, cameras.elevation_deg)
        return pack_views({name: Views(z, *where) for name, z in seen.latents.items()}, step, self.config.wire_dtype)

    def apply(self, step: int, *gradients: np.ndarray) -> dict[str, float]:
        """One optimiser step along the branches' gradients of each view's latents, in the order of the stage's
        branches; stale or doubled calls are dropped. Where the scene's gradients are not finite nothing moves, and all
        are half as large within the backward pass from then on.
        """
        if self._pending is None or self._pending.step != step or step != self.step:
            return {}
        watch = Stopwatch(self.device)
        pending, self._pending = self._pending, None
        stage, here, measured = self.config.stage, self._here(step), dict[str, Tensor]()
        seen = pending.seen or self._see(step)
        total = torch.zeros((), device=self.device)
        for branch, gradient in zip(stage.branches, gradients, strict=True):
            latents = seen.latents[branch.render]
            direction = from_wire(gradient, self.device) / len(latents)
            total = total + branch.weight.at(here) * (latents * direction).sum()
            measured[f"loss/{branch.render}"] = 0.5 * len(latents) * direction.square().sum()
        regularizers = self.scene.regularizers(seen.render, here) | self._round_trip(seen, here)
        total = total + sum(regularizers.values(), torch.zeros_like(total))
        self.optimizer.zero_grad(set_to_none=True)
        (total * self.gradient_scale).backward()
        finite = self._move(stage.lr_scale.at(here))
        self.step = step + 1
        self.scene.after_step(self._here(self.step))
        measured |= {f"loss/{name}": value for name, value in regularizers.items()}
        measured["scene/opacity"] = seen.render.opacity.mean()
        figures = read_figures(measured | {_FINITE: finite})
        if not figures.pop(_FINITE):
            self.gradient_scale /= 2
            figures["non_finite/particles"] = 1.0
        self._non_finite.note(
            f"the gradient of particle {self.config.index}", step, "non_finite/particles" not in figures
        )
        if seen.render.volume is not None:
            figures["scene/samples"] = float(len(seen.render.volume.weights))
        return figures | pending.spent | watch.figures("apply")

    def _see(self, step: int) -> Seen:
        """This particle's views of a step: the same whenever it is asked, until the scene moves."""
        cameras, draws = step_cameras(self.config, step), generator(self.config.seed, "codec", self.config.index, step)
        box = Box(self.box[0], self.box[1]) if self.map_px else None
        render = self.scene.render(cameras, self._here(step), box)
        latents: dict[str, Latents] = {}
        for branch in self.config.stage.branches:
            match branch.render:
                case "rgb":
                    assert self.codec is not None
                    latents["rgb"] = self.codec.encode(render, draws)
                case "normal":
                    latents["normal"] = self._normals(branch, render, step, draws)
                case "ccm":
                    latents["ccm"] = encode_maps(render, self.map_px)
        return Seen(cameras, render, latents)

    def _move(self, lr_scale: float) -> Bool[Tensor, ""]:
        """One step of the optimiser along the gradients that are there, if all of them are finite: that is decided
        where they are, and nobody waits for the answer.
        """
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        finite = all_finite(gradients)
        if self.gradient_scale != 1:
            torch._foreach_div_(gradients, self.gradient_scale)
        for group, full_lr in zip(groups, self._full_lrs):
            group["lr"] = full_lr * lr_scale
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # torch's own way to tell it
        self.optimizer.step()
        return finite

    @torch.no_grad()
    def look_at(self, azimuth_deg: list[float], elevation_deg: float, image_px: int) -> np.ndarray:
        """Pictures for people, uint8 ``[view, h, w, 4]``, straight colour and alpha: albedo, from mid-range cameras."""
        render = self.scene.preview(self._preview_cameras(azimuth_deg, elevation_deg, image_px))
        color = render.foreground / render.opacity.clamp(min=1e-4)
        picture = torch.cat([color.clamp(0, 1), render.opacity.clamp(0, 1)], dim=-1)
        return (picture * 255).round().to(torch.uint8).cpu().numpy()

    def export(self, uri: str) -> "ExportFigures":
        """Writes this particle's mesh, film and picture into the run folder."""
        from raydream.distill.artefacts import export_particle  # packages that a step does not need

        stage = self.config.stage
        shaded = stage.shading.albedo_steps < stage.num_steps  # else whatever light there is, is in the albedo
        unlit = {"auto": not shaded, "lit": False, "unlit": True}[self.config.output.material]
        index, output = self.config.index, self.config.output
        return export_particle(self.scene, self._preview_cameras, self.look_at, index, output, unlit, uri)

    def snapshot(self) -> Message:
        """Everything that a later step depends on, as arrays."""
        state = self.scene.state()
        arrays = {f"{_SCENE}{name}": value.detach().cpu().numpy().copy() for name, value in state.items()}
        arrays["box"] = self.box.numpy().copy()
        arrays["step"] = np.array(self.step, dtype=np.int64)
        arrays["gradient_scale"] = np.array(self.gradient_scale, dtype=np.float64)
        return arrays | optimizer_arrays(self.optimizer)

    def restore(self, arrays: Message) -> int:
        """Takes a snapshot's state and returns its step; a render in flight is forgotten."""
        self.scene.load_state(_scene_state(arrays))
        self.box = torch.from_numpy(np.array(arrays["box"]))
        restore_optimizer(self.optimizer, arrays)
        self.step, self._pending = int(arrays["step"]), None
        self.gradient_scale = float(arrays["gradient_scale"])
        return self.step

    def save(self, uri: str, step: int) -> "dict[str, FileDigest]":
        """Writes this particle's file of a checkpoint and says what is in it."""
        assert step == self.step, f"asked to save step {step} at step {self.step}"
        return save_snapshot(uri, step, self._file, self.snapshot())

    def load(self, uri: str, step: int) -> int:
        """Goes back to a committed checkpoint."""
        return self.restore(load_snapshot(uri, step, self._file))

    def start_from(self, uri: str, step: int) -> None:
        """Begins with the scene of a checkpoint, of this run's stage before or of another run. The optimiser is new.

        ``ValueError`` where this scene cannot go on from that kind, or from other sizes.
        """
        arrays = load_snapshot(uri, step, self._file)

        def before() -> Scene:
            from raydream.store.run_folder import RunFolder  # nor does a step need this

            run = strict_json.loads(RunConfig, RunFolder.open(uri).read_config())
            backend = load_backend(self.config.backend, self.device.type, self.config.deterministic)
            stage = run.stages[run.stage_at(step - 1)]
            return make_scene(stage, backend, self.device, lambda purpose, at: generator(run.seed, purpose, 0, at))

        take_over(self.scene, _scene_state(arrays), before)
        self.box = torch.from_numpy(np.array(arrays["box"]))

    @property
    def _file(self) -> str:
        return f"particle_{self.config.index:03d}.safetensors"

    def _here(self, step: int) -> int:
        """The step as the stage counts."""
        return step - self.config.first_step

    def _normals(self, branch: BranchConfig, render: Render, step: int, draws: torch.Generator) -> Latents:
        """As the latent itself in a stage's first steps, then as a picture."""
        if self._here(step) < branch.latent_steps:
            turn = random_turn(generator(self.config.seed, "turn", self.config.index, step))
            return normal_latent(render, turn, self.normal_px)
        assert self.codec is not None
        return self.codec.encode(normal_picture(render), draws)

    def _round_trip(self, seen: Seen, here: int) -> dict[str, Float[Tensor, ""]]:
        weight = self.config.stage.losses.round_trip.at(here)
        if weight == 0:
            return {}
        assert self.codec is not None
        assert "rgb" in seen.latents, "round_trip needs a branch on pictures"
        again = self.codec.decode(seen.latents["rgb"])
        return {"round_trip": weight * round_trip_loss(seen.render.rgb, again)}

    def _measure_box(self, step: int) -> None:
        """The object's box, measured on a schedule; the last one stays while nothing is solid."""
        branch = self.config.stage.branch("ccm")
        assert branch is not None
        if self._here(step) % branch.geometric_prior.box_every == 0:
            measured = self.scene.box()
            self.box = self.box if measured is None else torch.stack([measured.minimum, measured.maximum])

    def _preview_cameras(self, azimuth_deg: list[float], elevation_deg: float, image_px: int) -> Cameras:
        camera = self.config.stage.camera
        middles = (elevation_deg, sum(camera.distance) / 2, sum(camera.fov_y_deg) / 2)
        elevation, distance, fov = (torch.full((len(azimuth_deg),), middle) for middle in middles)
        return orbit_cameras(torch.tensor(azimuth_deg), elevation, distance, fov, image_px, image_px)


def _scene_state(arrays: Message) -> dict[str, Tensor]:
    """The scene's part of a snapshot."""
    state = {name.removeprefix(_SCENE): array for name, array in arrays.items() if name.startswith(_SCENE)}
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def import_particle() -> None:
    """Nothing: a process that is sent this function has imported all that a particle needs."""


def make_particle(config: ParticleConfig) -> Particle:
    """A particle at the beginning of its stage, with all that its settings name."""
    torch.set_num_threads(1)
    device = own_device()
    backend, seed, index = load_backend(config.backend, device.type, config.deterministic), config.seed, config.index

    def draws(purpose: str, step: int) -> torch.Generator:
        return generator(seed, purpose, index, config.first_step + step)

    scene = make_scene(config.stage, backend, device, draws)
    normals = config.stage.branch("normal")
    codec = prior_kind(config.prior).codec(device) if config.stage.branch("rgb") or normals else None
    normal_px = latent_px(resolve_prior(config.prior.source)) if normals and normals.latent_steps else 0
    maps = config.stage.branch("ccm")
    map_px = latent_px(resolve_agp_prior(maps.geometric_prior.prior, config.prior.source)) if maps else 0
    return Particle(config, device, scene, codec, map_px, backend.name, normal_px)


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
    image_px = int(camera.image_px.at(step - config.first_step))
    return orbit_cameras(
        plan[config.index],
        sample_elevations((view,), camera.elevation_deg, camera.uniform_sphere_probability, draws),
        sample_uniform((view,), camera.distance, draws),
        sample_uniform((view,), camera.fov_y_deg, draws),
        image_px,
        image_px,
    )
