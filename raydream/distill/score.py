"""``Score``: the one model that all particles share. ``guide`` answers with gradients, ``fit`` learns from the views.

SDS is VSD with another reference: the drawn noise instead of the learned model (and then nothing is learned).
Replicas hold the same learned model: each takes a share of the particles, and their gradients are summed before every
update.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.backend import load_backend
from raydream.config.actors import ScoreConfig
from raydream.config.names import RenderKind
from raydream.device import describe, own_device, send
from raydream.diffusion import guidance
from raydream.diffusion.graphs import CudaRecorder, Graphed, GraphedDenoiser, Record
from raydream.distill.branches import Branch, condition
from raydream.distill.finite import NonFinite, all_finite
from raydream.distill.messages import LATENTS, Message, num_views, to_wire, unpack_views
from raydream.distill.snapshot import load_snapshot, optimizer_arrays, restore_optimizer, save_snapshot
from raydream.precision import tf32
from raydream.priors.geometric import load_agp
from raydream.priors.kinds import prior_kind
from raydream.priors.protocol import LearnedReference
from raydream.schedule import Schedule
from raydream.seeds import generator
from raydream.stopwatch import Stopwatch
from raydream.store.tensors import odd_names
from raydream.types import Condition, Denoiser, Latents, Views

if TYPE_CHECKING:
    from raydream.store.run_folder import FileDigest

Figures = dict[str, float]
# Of a loss whose gradients pass through float16, where most of a LoRA's would be 0: without it the median tensor's
# cosine to the float32 gradient is .897 at Stable Diffusion 2.1's size, with it 1.0.
HALF_LOSS_SCALE = 2.0**16
_HALF_ADAM_EPS = 1e-15  # there gradients of lora_A are about 1e-7, beside which Adam's usual 1e-8 counts; threestudio's
_FILE, _LEARNED, _SHARE = "score.safetensors", "learned/", "share"
_STREAMS: dict[RenderKind, str] = {
    "rgb": "guide",
    "normal": "guide_normals",
    "ccm": "guide_maps",
}  # names of streams of random numbers, which are part of every seed


class Score:
    """Frozen priors, a branch for each, with the learned reference of the pictures' one where a method has any. All
    draws depend on (seed, purpose, particle, step), not on the replica.
    """

    def __init__(
        self,
        config: ScoreConfig,
        device: torch.device,
        branches: Sequence[Branch],
        learner: LearnedReference | None,
        record: Record | None = None,
    ) -> None:
        """With ``record`` all passes of the models are recorded once and then repeated (``Graphed``)."""
        self.config, self.device, self.step = config, device, config.first_step
        self.branches = {branch.config.render: branch for branch in branches}
        self.learner = learner
        self.learned = learner.trainable() if learner is not None else {}
        settings, is_half = config.learner, learner is not None and learner.dtype == torch.float16
        eps = _HALF_ADAM_EPS if is_half else 1e-8
        self.optimizer = (
            torch.optim.AdamW(self.learned.values(), settings.lr, eps=eps, weight_decay=settings.weight_decay)
            if self.learned
            else None
        )
        self.loss_scale = HALF_LOSS_SCALE if is_half else 1.0
        self._non_finite = NonFinite()
        self._reference: Denoiser | None = learner
        self._pull: Callable[..., tuple[Tensor, ...]] | None = None
        if learner is not None:
            self._pull = partial(loss_and_gradients, learner, list(self.learned.values()))
        if record is not None:
            self._record_all(record)

    def _record_all(self, record: Record) -> None:
        for render, branch in self.branches.items():
            graphed = GraphedDenoiser(f"the {render} prior's pass", branch.denoiser, record)
            self.branches[render] = replace(branch, denoiser=graphed)
        if self.learner is not None and self._pull is not None:
            self._reference = GraphedDenoiser("the learned reference's pass", self.learner, record)
            self._pull = Graphed("the learned reference's fit", self._pull, record)

    def hardware(self) -> str:
        """What it computes on, and with whose kernels where its prior has any use for them."""
        if self.config.prior.mixture is None:  # modes are rasterised, nothing else is
            return describe(self.device)
        return f"{describe(self.device)}, kernels {load_backend(self.config.backend, self.device.type).name}"

    @torch.no_grad()
    def guide(
        self, step: int, render: RenderKind, particles: Sequence[int], *messages: Message
    ) -> list[np.ndarray | Figures]:
        """One branch's gradient by each particle's latents, ``[view, latent, h, w]`` each, in one batch over all
        particles; last come figures. That of a view is 0 where it is not finite (``NonFinite``).
        """
        watch = Stopwatch(self.device)
        branch = self.branches[render]
        if step != self.step and branch.config.learns and self.learned:
            raise RuntimeError(f"the score model has learned {self.step} steps, asked to guide step {step}")
        views = unpack_views(messages, step, self.device, render)
        here, sizes = step - self.config.first_step, [num_views(message) for message in messages]
        t_range = _t_range(branch.config.t_min, branch.config.t_max, here)
        times, noise = self._draw(_STREAMS[render], step, particles, messages, *t_range, render, branch.config.shared_t)
        t = send(times, self.device)
        text = branch.text(views, self.config.seed, particles, sizes)
        pulls = [
            branch.gradient(here, part, told, at, drawn, partial(self._learned_eps, part))
            for part, told, at, drawn in self._parts(views, text, t, noise)
        ]
        gradient = torch.cat(pulls).cpu()  # one copy and one wait for all that is asked of the device
        finite = gradient.isfinite().flatten(1).all(1)
        kept = torch.where(finite[:, None, None, None], gradient, 0.0)
        gradients = [to_wire(part, self.config.wire_dtype) for part in kept.split(sizes)]
        figures = watch.figures("guide") | ({"guide/t": float(times.float().mean())} if render != "ccm" else {})
        for particle, part in zip(particles, finite.split(sizes)):
            self._non_finite.note(f"the {render} gradient of particle {particle}", step, bool(part.all()))
        num_zeroed = int((~finite).sum())
        return [*gradients, figures | ({"non_finite/views": num_zeroed} if num_zeroed else {})]

    def fit(self, step: int, particles: Sequence[int], *messages: Message) -> Figures:
        """All of a step's updates of the learned reference where there is one replica; a doubled call is dropped."""
        if step != self.step or not self.learned:
            return {}
        watch, losses = Stopwatch(self.device), []
        skipped: Figures = {}
        for round_index in range(self.config.learner.fits_per_step):
            loss, gradients = self._fit_gradients(step, round_index, particles, messages)
            skipped |= self._update(step, gradients)
            losses.append(loss)
        self.step = step + 1
        return {"loss/fit": float(np.mean(torch.stack(losses).tolist()))} | skipped | watch.figures("fit")

    def warm_up(self, step: int, particles: Sequence[int], *messages: Message) -> Figures:
        """Extra updates on a stage's first views, before any particle moves: the reference learns where they start."""
        loss = torch.zeros(())
        for round_index in range(self.config.learner.warm_up_fits if self.learned else 0):
            loss, gradients = self._fit_gradients(step, round_index, particles, messages, is_warm_up=True)
            self._update(step, gradients)
        return {"loss/fit": float(loss)}

    def fit_gradients(self, step: int, round_index: int, particles: Sequence[int], *messages: Message) -> Message:
        """This replica's share of the gradient of one update and, last in the same array, of the loss; ``fit_update``
        sums over replicas.
        """
        loss, gradients = self._fit_gradients(step, round_index, particles, messages)
        share = torch.cat([part.flatten() for part in (*gradients.values(), loss)])
        return {_SHARE: to_wire(share, "float32")}

    def fit_update(self, step: int, is_last_round: bool, *shares: Message) -> Figures:
        """One update with the sum of all replicas' shares, taken in their order: the same in every replica."""
        if step != self.step or not self.learned:
            return {}
        together = np.stack([share[_SHARE] for share in shares])
        total = send(torch.from_numpy(together), self.device).sum(0)
        *parts, _ = total.split([*map(Tensor.numel, self.learned.values()), 1])
        gradients = {name: part.view_as(own) for (name, own), part in zip(self.learned.items(), parts)}
        skipped = self._update(step, gradients)
        if is_last_round:
            self.step = step + 1
        return {"loss/fit": float(sum(together[:, -1]))} | skipped

    def snapshot(self) -> Message:
        """Everything that a later step depends on, as arrays; the frozen prior is not in it."""
        arrays = {f"{_LEARNED}{name}": p.detach().cpu().numpy().copy() for name, p in self.learned.items()}
        arrays["step"] = np.array(self.step, dtype=np.int64)
        if self.optimizer is None:
            return arrays
        return arrays | optimizer_arrays(self.optimizer) | {"loss_scale": np.array(self.loss_scale, dtype=np.float64)}

    def restore(self, arrays: Message) -> int:
        """Takes a snapshot's state and returns its step; ``ValueError`` where it is of another learned reference."""
        if not self._take_learned(arrays):
            raise ValueError("resume: the checkpoint's learned reference has other parameters than this run's")
        if self.optimizer:
            restore_optimizer(self.optimizer, arrays)
            self.loss_scale = float(arrays["loss_scale"])
        self.step = int(arrays["step"])
        return self.step

    def save(self, uri: str, step: int) -> "dict[str, FileDigest]":
        """Writes the learned reference's file of a checkpoint; all replicas hold the same, so one of them writes."""
        assert step == self.step or not self.learned, f"asked to save step {step} at step {self.step}"
        return save_snapshot(uri, step, _FILE, self.snapshot())

    def load(self, uri: str, step: int) -> int:
        """Goes back to a committed checkpoint."""
        return self.restore(load_snapshot(uri, step, _FILE))

    def start_from(self, uri: str, step: int) -> bool:
        """Begins with what was learned until a checkpoint, of this run's stage before or of another run; says whether
        there was anything of this kind. The optimiser is new.
        """
        return bool(self.learned) and self._take_learned(load_snapshot(uri, step, _FILE))

    @torch.no_grad()
    def _take_learned(self, arrays: Message) -> bool:
        found = {name.removeprefix(_LEARNED): a for name, a in arrays.items() if name.startswith(_LEARNED)}
        if odd_names(self.learned, found):
            return False
        for name, parameter in self.learned.items():
            parameter.copy_(torch.from_numpy(np.array(found[name])))
        return True

    def _learned_eps(self, views: Views, z_t: Latents, t: Int[Tensor, " view"]) -> Latents:
        """The learned reference's noise; it is told the prompt without view words (ProlificDreamer)."""
        assert self._reference is not None
        text = self.branches["rgb"].texts.prompt_embeddings(views.num_views)
        return self._reference.eps(z_t, t, condition(views, text))

    def _fit_gradients(
        self,
        step: int,
        round_index: int,
        particles: Sequence[int],
        messages: Sequence[Message],
        is_warm_up: bool = False,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss and gradient of one update, as this replica's share of the mean over the views of *all* particles."""
        learner, branch = self.learner, self.branches["rgb"]
        assert learner is not None
        assert self._pull is not None
        copies = self.config.learner.timesteps_per_view
        repeated = [m for m in messages for _ in range(copies)]
        views = unpack_views(repeated, step, self.device)
        owners = [p * copies + k for p in particles for k in range(copies)]
        purpose, drawn_for = f"fit{round_index}", -1 - step if is_warm_up else step
        times, noise = self._draw(purpose, drawn_for, owners, repeated, 0, 999)
        t = send(times, self.device)
        keep = torch.cat([
            torch.rand(num_views(m), generator=generator(self.config.seed, f"{purpose}/camera", owner, drawn_for))
            for owner, m in zip(owners, repeated)
        ])  # fmt: skip
        weight = send((keep >= self.config.learner.camera_dropout).float(), self.device)
        total_views = self.config.num_particles * copies * num_views(messages[0])
        numbers = [torch.full((), float(number), device=self.device) for number in (total_views, self.loss_scale)]
        losses: list[Tensor] = []
        summed: list[Tensor] = []
        for part, at, drawn, told in self._parts(views, t, noise, weight):
            abar = branch.alphas_cumprod[at]
            z_t = guidance.add_noise(part.latents, drawn, abar)
            cond = condition(part, branch.texts.prompt_embeddings(part.num_views), told)
            target = guidance.lora_target(learner.prediction_type, part.latents, drawn, abar)
            fields = cond.text, cond.c2w, cond.fov_y_deg, cond.camera_weight
            loss, *gradients = self._pull(*numbers, target, z_t, at, *fields)
            summed = list(torch._foreach_add(summed, gradients)) if summed else gradients
            losses.append(loss)
        return torch.stack(losses).sum(), dict(zip(self.learned, summed))

    def _parts(self, views: Views, *of_views: Tensor) -> Iterator[tuple[Any, ...]]:
        """So many views at a time as the budget says, each time with what belongs to them: all times alike where that
        is possible, and the last one smaller where not.
        """
        total = views.num_views
        size = -(-total // -(-total // (self.config.views_at_once or total)))
        fields = list(vars(views).values())
        for parts in zip(*(tensor.split(size) for tensor in (*fields, *of_views))):
            yield Views(*parts[: len(fields)]), *parts[len(fields) :]

    def _update(self, step: int, gradients: Mapping[str, Tensor]) -> Figures:
        """One step of the optimiser; where a gradient is not finite none, and half the loss scale from then on. All
        replicas are given the same gradients, so they decide alike.
        """
        assert self.optimizer is not None
        finite = bool(all_finite(list(gradients.values())))
        self._non_finite.note("the learned reference's gradient", step, finite)
        if not finite:
            self.loss_scale /= 2
            return {"non_finite/fits": 1.0}
        learner = self.config.learner
        for name, parameter in self.learned.items():
            parameter.grad = gradients[name]
        warm_up = min(1.0, (step - self.config.first_step + 1) / max(1, learner.lr_warm_up_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learner.lr * warm_up
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {}

    def _draw(
        self,
        purpose: str,
        step: int,
        owners: Sequence[int],
        messages: Sequence[Message],
        t_min: int,
        t_max: int,
        render: str = "rgb",
        shared_t: bool = False,
    ) -> tuple[Int[Tensor, " view"], Latents]:
        """Timestep, still with the host, and noise for each view, from a stream of each particle's own."""
        ts, noises = [], []
        for owner, message in zip(owners, messages):
            draws, shape = generator(self.config.seed, purpose, owner, step), message[f"{LATENTS}{render}"].shape
            t = guidance.draw_timesteps(shape[0], t_min, t_max, draws)
            if shared_t:
                shared = generator(self.config.seed, "shared_t", 0, step)
                t = guidance.draw_timesteps(1, t_min, t_max, shared).expand(len(t))
            ts.append(t)
            noises.append(torch.randn(shape, generator=draws))
        return torch.cat(ts), send(torch.cat(noises), self.device)


def loss_and_gradients(
    learner: LearnedReference,
    parameters: Sequence[torch.nn.Parameter],
    total_views: Float[Tensor, ""],
    loss_scale: Float[Tensor, ""],
    target: Latents,
    z_t: Latents,
    t: Int[Tensor, " view"],
    *cond: Tensor,
) -> tuple[Tensor, ...]:
    """These views' share of the mean loss over ``total_views``, and its gradient by each parameter; no number in it is
    the host's, so that all of it can be recorded.
    """
    error = (learner.predict(z_t, t, Condition(*cond)) - target).square().flatten(1).mean(1)
    loss = error.sum() / total_views
    with tf32():
        gradients = torch.autograd.grad(loss * loss_scale, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g / loss_scale for p, g in zip(parameters, gradients)]
    return loss.detach(), *filled


def import_score() -> None:
    """Nothing: a process that is sent this function has imported all that a score model needs."""


def make_score(config: ScoreConfig) -> Score:
    """A replica with all that its settings name, loaded; ``ValueError`` naming the field for what cannot be had."""
    torch.set_num_threads(1)
    device = own_device()
    kind, init = prior_kind(config.prior), generator(config.seed, "learner", 0, 0)
    branches, learner = [], None
    for branch in config.branches:
        if branch.render == "ccm":
            parts = load_agp(branch, config, device)
        else:
            denoiser, alphas = kind.denoiser(config.prompt, config.backend, device)
            parts = denoiser, kind.texts(config.prompt, config.negative_prompt, branch, config.backend, device), alphas
            learner = kind.learner(denoiser, config.learner, init) if branch.learns else learner
        branches.append(Branch(branch, *parts))
    return Score(config, device, branches, learner, _recorder(config, device))


def _recorder(config: ScoreConfig, device: torch.device) -> Record | None:
    """An exact score has no UNet whose launches would count."""
    is_recorded = config.graphs and device.type == "cuda" and config.prior.mixture is None
    return CudaRecorder() if is_recorded else None


def _t_range(t_min: Schedule, t_max: Schedule, step: int) -> tuple[int, int]:
    low, high = int(1000 * t_min.at(step)), int(1000 * t_max.at(step))
    return min(low, 999), min(max(low, high), 999)
