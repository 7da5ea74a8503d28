"""``Score``: the one model that all particles share. ``guide`` answers with gradients, ``fit`` learns from the views.

SDS is VSD with another reference: the drawn noise instead of the learned model (and then nothing is learned).
Replicas hold the same learned model: each takes a share of the particles, and their gradients are summed before every
update.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.config.run import ScoreConfig
from raydream.diffusion import guidance
from raydream.distill.geometry import GeometryBranch, load_geometry
from raydream.distill.messages import MAPS, Message, from_wire, to_wire, unpack_views
from raydream.distill.snapshot import load_snapshot, optimizer_arrays, restore_optimizer, save_snapshot
from raydream.priors.load import Prior, load_prior
from raydream.schedule import Schedule
from raydream.seeds import generator
from raydream.store.run_folder import FileDigest
from raydream.types import Condition, Views

Stats = dict[str, float]
_FILE = "score.safetensors"


class Score:
    """A frozen prior with its learned reference. All draws depend on (seed, purpose, particle, step), not on the
    replica.
    """

    def __init__(self) -> None:
        self.step = 0
        self.geometry: GeometryBranch | None = None

    def setup(self, config: ScoreConfig) -> dict[str, str]:
        """Loads the prior (the constructor stays light)."""
        torch.set_num_threads(1)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.use(load_prior(config, self.device))
        self.geometry = load_geometry(config, self.device)
        return {"device": self.device.type}

    def use(self, prior: Prior) -> None:
        """Takes a prior that exists already."""
        self.prior = prior
        self.learned = prior.learner.trainable() if prior.learner is not None else {}
        learner = self.config.learner
        self.optimizer = (
            torch.optim.AdamW(self.learned.values(), learner.lr, weight_decay=learner.weight_decay)
            if self.learned
            else None
        )
        self.step = 0

    @torch.no_grad()
    def guide(self, step: int, particles: Sequence[int], *messages: Message) -> list[np.ndarray | Stats]:
        """The gradient by each particle's latents, ``[view, 4, h, w]`` each, in one batch over all particles; last
        come figures.
        """
        started, cpu = time.perf_counter(), time.thread_time()
        if step != self.step and self.learned:
            raise RuntimeError(f"the score model has learned {self.step} steps, asked to guide step {step}")
        views = unpack_views(messages, step, self.device)
        t, noise = self._draw(
            "guide", step, particles, messages, *_t_range(self.config.guidance.t_min, self.config.guidance.t_max, step)
        )
        abar = self.prior.alphas_cumprod[t]
        z_t = guidance.add_noise(views.latents, noise, abar)
        eps_prior = self._guided_eps(z_t, t, views)
        if self.config.method == "sjc":
            gradient = guidance.sjc_gradient(eps_prior, views.latents, noise, abar)
        else:
            reference = noise if self.prior.learner is None else self._learned_eps(z_t, t, views)
            w_t = guidance.weight(self.config.guidance.weighting, abar)
            gradient = guidance.distillation_gradient(eps_prior, reference, w_t)
        gradient = guidance.clip_gradient(gradient, self.config.guidance.gradient_clip.at(step))
        sizes = [len(message["latents"]) for message in messages]
        gradients = [to_wire(part, self.config.wire_dtype) for part in gradient.split(sizes)]
        stats = {
            "time/guide_s": time.perf_counter() - started,
            "cpu/guide_s": time.thread_time() - cpu,
            "guide/t": float(t.float().mean()),
        }
        return [*gradients, stats]

    def guide_maps(self, step: int, particles: Sequence[int], *messages: Message) -> list[np.ndarray | Stats]:
        """The aligned geometric prior's gradient by each particle's maps, in one batch; last come figures."""
        assert self.geometry is not None, "a run without an AGP has no maps"
        started, cpu = time.perf_counter(), time.thread_time()
        views = unpack_views(messages, step, self.device, MAPS)
        geometry = self.config.geometry
        t_range = _t_range(geometry.t_min, geometry.t_max, step)
        t, noise = self._draw("guide_maps", step, particles, messages, *t_range, MAPS)
        sizes = [len(message[MAPS]) for message in messages]
        text = self.geometry.heard(self.config.seed, particles, sizes[0])
        weighting, denoise_steps = self.config.guidance.weighting, int(geometry.denoise_steps.at(step))
        gradient = self.geometry.gradient(views, text, t, noise, weighting, denoise_steps)
        gradients = [to_wire(part, self.config.wire_dtype) for part in gradient.split(sizes)]
        spent = {"time/guide_s": time.perf_counter() - started, "cpu/guide_s": time.thread_time() - cpu}
        return [*gradients, spent]

    def fit(self, step: int, particles: Sequence[int], *messages: Message) -> Stats:
        """All of a step's updates of the learned reference where there is one replica; a doubled call is dropped."""
        if step != self.step or not self.learned:
            return {}
        started, cpu = time.perf_counter(), time.thread_time()
        losses = []
        for round_index in range(self.config.learner.fits_per_step):
            loss, gradients = self._fit_gradients(step, round_index, particles, messages)
            self._update(step, gradients)
            losses.append(loss)
        self.step = step + 1
        spent = {"time/fit_s": time.perf_counter() - started, "cpu/fit_s": time.thread_time() - cpu}
        return {"loss/fit": float(np.mean(losses))} | spent

    def warm_up(self, particles: Sequence[int], *messages: Message) -> Stats:
        """Extra updates on the views of step 0, before any particle moves: the reference learns where they start."""
        loss = 0.0
        for round_index in range(self.config.learner.warm_up_fits if self.learned else 0):
            loss, gradients = self._fit_gradients(-1, round_index, particles, messages)
            self._update(-1, gradients)
        return {"loss/fit": loss}

    def fit_gradients(self, step: int, round_index: int, particles: Sequence[int], *messages: Message) -> Message:
        """This replica's share of the gradient of one update, to be summed over the replicas by ``fit_update``."""
        loss, gradients = self._fit_gradients(step, round_index, particles, messages)
        share = {name: gradient.cpu().numpy() for name, gradient in gradients.items()}
        return share | {"": np.array(loss, dtype=np.float32)}

    def fit_update(self, step: int, is_last_round: bool, *shares: Message) -> Stats:
        """One update with the sum of all replicas' shares, taken in their order: the same in every replica."""
        if step != self.step or not self.learned:
            return {}
        gradients = {
            name: torch.stack([from_wire(share[name], self.device) for share in shares]).sum(0) for name in self.learned
        }
        self._update(step, gradients)
        if is_last_round:
            self.step = step + 1
        return {"loss/fit": float(sum(share[""] for share in shares))}

    def snapshot(self) -> Message:
        """Everything that a later step depends on, as arrays; the frozen prior is not in it."""
        arrays = {f"learned/{name}": p.detach().cpu().numpy().copy() for name, p in self.learned.items()}
        arrays["step"] = np.array(self.step, dtype=np.int64)
        return arrays | (optimizer_arrays(self.optimizer) if self.optimizer else {})

    @torch.no_grad()
    def restore(self, arrays: Message) -> int:
        """Takes a snapshot's state and returns its step; ``ValueError`` where it is of another learned reference."""
        found = {name.removeprefix("learned/"): a for name, a in arrays.items() if name.startswith("learned/")}
        if {n: a.shape for n, a in found.items()} != {n: tuple(p.shape) for n, p in self.learned.items()}:
            raise ValueError("resume: the checkpoint's learned reference has other parameters than this run's")
        for name, parameter in self.learned.items():
            parameter.copy_(torch.from_numpy(np.array(found[name])))
        if self.optimizer:
            restore_optimizer(self.optimizer, arrays)
        self.step = int(arrays["step"])
        return self.step

    def save(self, uri: str, step: int) -> dict[str, FileDigest]:
        """Writes the learned reference's file of a checkpoint; all replicas hold the same, so one of them writes."""
        assert step == self.step or not self.learned, f"asked to save step {step} at step {self.step}"
        return save_snapshot(uri, step, _FILE, self.snapshot())

    def load(self, uri: str, step: int) -> int:
        """Goes back to a committed checkpoint."""
        return self.restore(load_snapshot(uri, step, _FILE))

    def _guided_eps(
        self, z_t: Float[Tensor, "view 4 h w"], t: Int[Tensor, " view"], views: Views
    ) -> Float[Tensor, "view 4 h w"]:
        """The frozen prior's answer under classifier-free guidance; all texts in one batch, none that is
        multiplied by 0.
        """
        config, texts, denoiser = self.config.guidance, self.prior.texts, self.prior.denoiser
        negative = texts.negative_embeddings(views.num_views)
        if config.perp_neg:
            perp = texts.perp_neg_texts(views.azimuth_deg, views.elevation_deg)
            stacked = torch.stack([negative, perp.positive, *perp.negatives])
            eps = guidance.eps_for_texts(denoiser.eps, z_t, t, self._condition(views, negative), stacked)
            positive = guidance.perp_neg(eps[0], eps[1], eps[2:], perp.weights.to(z_t))
            return guidance.classifier_free(eps[0], positive, config.scale)
        text = texts.view_embeddings(views.azimuth_deg, views.elevation_deg)
        if config.scale in (0, 1):
            return denoiser.eps(z_t, t, self._condition(views, text if config.scale else negative))
        stacked = torch.stack([negative, text])
        eps = guidance.eps_for_texts(denoiser.eps, z_t, t, self._condition(views, text), stacked)
        return guidance.classifier_free(eps[0], eps[1], config.scale)

    def _learned_eps(
        self, z_t: Float[Tensor, "view 4 h w"], t: Int[Tensor, " view"], views: Views
    ) -> Float[Tensor, "view 4 h w"]:
        assert self.prior.learner is not None
        return self.prior.learner.eps(
            z_t, t, self._condition(views, self.prior.texts.prompt_embeddings(views.num_views))
        )

    def _fit_gradients(
        self, step: int, round_index: int, particles: Sequence[int], messages: Sequence[Message]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of one update, as this replica's share of the mean over the views of *all* particles."""
        learner = self.prior.learner
        assert learner is not None
        copies = self.config.learner.timesteps_per_view
        repeated = [m for m in messages for _ in range(copies)]
        views = unpack_views(repeated, max(step, 0), self.device)
        owners = [p * copies + k for p in particles for k in range(copies)]
        purpose = f"fit{round_index}"
        t, noise = self._draw(purpose, step, owners, repeated, 0, 999)
        keep = torch.cat([
            torch.rand(len(m["latents"]), generator=generator(self.config.seed, f"{purpose}/camera", owner, step))
            for owner, m in zip(owners, repeated)
        ])  # fmt: skip
        weight = (keep >= self.config.learner.camera_dropout).float().to(self.device)
        abar = self.prior.alphas_cumprod[t]
        z_t = guidance.add_noise(views.latents, noise, abar)
        cond = self._condition(views, self.prior.texts.prompt_embeddings(views.num_views), weight)
        target = guidance.lora_target(learner.prediction_type, views.latents, noise, abar)
        error = (learner.predict(z_t, t, cond) - target).square().flatten(1).mean(1)
        total_views = self.config.num_particles * copies * len(messages[0]["latents"])
        loss = error.sum() / total_views
        parameters = list(self.learned.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
        return float(loss.detach()), dict(zip(self.learned, filled))

    def _update(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        assert self.optimizer is not None
        learner = self.config.learner
        for name, parameter in self.learned.items():
            parameter.grad = gradients[name]
        warm_up = min(1.0, (max(step, 0) + 1) / max(1, learner.lr_warm_up_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learner.lr * warm_up
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _draw(
        self,
        purpose: str,
        step: int,
        owners: Sequence[int],
        messages: Sequence[Message],
        t_min: int,
        t_max: int,
        latents: str = "latents",
    ) -> tuple[Int[Tensor, " view"], Float[Tensor, "view 4 h w"]]:
        """Timestep and noise for each view, from a stream of each particle's own."""
        ts, noises = [], []
        for owner, message in zip(owners, messages):
            draws = generator(self.config.seed, purpose, owner, step)
            t = guidance.draw_timesteps(len(message[latents]), t_min, t_max, draws)
            if purpose == "guide" and self.config.guidance.shared_t:
                shared = generator(self.config.seed, "shared_t", 0, step)
                t = guidance.draw_timesteps(1, t_min, t_max, shared).expand(len(t))
            ts.append(t)
            noises.append(torch.randn(message[latents].shape, generator=draws))
        return torch.cat(ts).to(self.device), torch.cat(noises).to(self.device)

    def _condition(
        self,
        views: Views,
        text: Float[Tensor, "view token width"],
        camera_weight: Float[Tensor, " view"] | None = None,
    ) -> Condition:
        weight = torch.ones(views.num_views, device=self.device) if camera_weight is None else camera_weight
        return Condition(text, views.c2w, views.fov_y_deg, weight)


def _t_range(t_min: Schedule, t_max: Schedule, step: int) -> tuple[int, int]:
    low, high = int(1000 * t_min.at(step)), int(1000 * t_max.at(step))
    return min(low, 999), min(max(low, high), 999)
