"""The operation count of a VSD step with Stable Diffusion 2.1's real shapes: the minimum, on meta tensors.

What is counted is ``Score`` itself, ``guide`` and ``fit``, with the real UNet and the real LoRA inside: messages, noise
and gradients are real numbers, and only the UNet's own tensors have no storage. What belongs to a particle is counted
on its VAE. Elementwise work (noise, guidance, AdamW) is not counted by torch; it is not 1 % of a pass.
"""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raydream.bench.sd21 import LORA_TFLOP, SD21_SCHEDULE, SD21_UNET, SD21_VAE, UNET_TFLOP, VAE_TFLOP
from raydream.config.actors import ScoreConfig
from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.prior import PriorConfig
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.guidance import alphas_cumprod
from raydream.diffusion.lora import LoraDenoiser
from raydream.diffusion.text import PerpNegTexts
from raydream.diffusion.vae import VaeCodec
from raydream.distill import score as score_module
from raydream.distill.branches import Branch
from raydream.distill.messages import Message, pack_views
from raydream.distill.score import Score
from raydream.types import Condition, Render, Views

pytestmark = pytest.mark.slow

META = torch.device("meta")


def sd21_denoiser_on_meta() -> DiffusersDenoiser:
    """The frozen UNet of Stable Diffusion 2.1 with shapes and no numbers."""
    with META:
        unet = UNet2DConditionModel(**SD21_UNET)
    return DiffusersDenoiser(unet, SD21_SCHEDULE)


def count_tflop(work: Callable[[], object]) -> float:
    """What ``work`` costs, matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def test_parameter_counts_of_stable_diffusion() -> None:
    frozen = sd21_denoiser_on_meta()
    assert sum(value.numel() for value in frozen.unet.parameters()) == 865_910_724
    trainable = LoraDenoiser(frozen, rank=4, seed=0).trainable()
    sizes = {
        part: sum(v.numel() for name, v in trainable.items() if name.startswith(part)) for part in ("unet.", "camera.")
    }
    assert sizes == {"unet.": 829_952, "camera.": 1_661_440}
    assert sum(value.numel() for value in trainable.values()) == sum(sizes.values())


class FromMeta(torch.autograd.Function):
    """Zeros on the CPU in place of a meta tensor, and a gradient back to it: the seam between numbers and shapes."""

    @staticmethod
    def forward(ctx: object, on_meta: Tensor) -> Tensor:
        return torch.zeros(on_meta.shape)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.to(META)


class OnMeta:
    """A denoiser with shapes and no numbers for callers that have numbers: same calls, same passes, answers 0."""

    def __init__(self, model: DiffusersDenoiser | LoraDenoiser) -> None:
        self._model, self.prediction_type, self.dtype = model, model.prediction_type, torch.float32

    def eps(self, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return FromMeta.apply(self._model.eps(z_t.to(META), t.to(META), to_meta(cond)))

    def predict(self, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return FromMeta.apply(self._model.predict(z_t.to(META), t.to(META), to_meta(cond)))

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return self._model.trainable()


class Sd21Texts:
    """Texts of Stable Diffusion 2.1's size; what they say costs nothing."""

    def prompt_embeddings(self, num_views: int) -> Tensor:
        return torch.zeros(num_views, 77, 1024)

    def negative_embeddings(self, num_views: int) -> Tensor:
        return self.prompt_embeddings(num_views)

    def view_embeddings(self, azimuth_deg: Tensor, elevation_deg: Tensor) -> Tensor:
        return self.prompt_embeddings(len(azimuth_deg))

    def perp_neg_texts(self, azimuth_deg: Tensor, elevation_deg: Tensor) -> PerpNegTexts:
        text = self.prompt_embeddings(len(azimuth_deg))
        return PerpNegTexts(text, torch.stack([text, text]), torch.zeros(2, len(text)))


def to_meta(cond: Condition) -> Condition:
    return Condition(*(getattr(cond, field.name).to(META) for field in fields(cond)))


def sd21_score(num_particles: int, branch: BranchConfig) -> Score:
    """The real score model over Stable Diffusion 2.1's shapes."""
    frozen, learner = sd21_denoiser_on_meta(), LearnerConfig()
    lora = OnMeta(LoraDenoiser(frozen, rank=4, seed=0)) if branch.learns else None
    config = ScoreConfig(0, num_particles, 0, "", "", (branch,), learner, 0, PriorConfig(), "reference", "float32")
    abar = alphas_cumprod(SD21_SCHEDULE).float()
    return Score(config, torch.device("cpu"), [Branch(branch, OnMeta(frozen), Sd21Texts(), abar)], lora)


def sd21_messages(num_particles: int, views: int) -> list[Message]:
    latents, angles = torch.zeros(views, 4, 64, 64), torch.zeros(views)
    message = pack_views(
        {"rgb": Views(latents, torch.eye(4).expand(views, 4, 4), angles, angles, angles)}, 0, "float32"
    )
    return [message] * num_particles


@pytest.mark.parametrize(
    ("branch", "guide", "fit"),
    [
        (BranchConfig(), 2 * UNET_TFLOP + UNET_TFLOP, LORA_TFLOP),
        (BranchConfig(scale=1.0), UNET_TFLOP + UNET_TFLOP, LORA_TFLOP),
        (BranchConfig(perp_neg=True), 4 * UNET_TFLOP + UNET_TFLOP, LORA_TFLOP),
        (BranchConfig(method="sds"), 2 * UNET_TFLOP, 0.0),
        (BranchConfig(method="csd"), 2 * UNET_TFLOP, 0.0),
    ],
)
def test_guide_and_fit_cost_the_minimum(
    branch: BranchConfig, guide: float, fit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Score`` itself, from messages to messages, for two particles of two views: the guidance's texts in the frozen
    model, one conditional LoRA pass, one LoRA training pass; no decoding, nothing twice.
    """
    monkeypatch.setattr(score_module, "all_finite", lambda tensors: torch.tensor(True))  # none of them has a number
    num_particles, views = 2, 2
    score, messages = sd21_score(num_particles, branch), sd21_messages(num_particles, views)
    before = list(score.learned.values())
    spent = count_tflop(lambda: score.guide(0, "rgb", range(num_particles), *messages))
    assert spent == pytest.approx(num_particles * views * guide, rel=0.01)
    spent = count_tflop(lambda: score.fit(0, range(num_particles), *messages))
    assert spent == pytest.approx(num_particles * views * fit, rel=0.01)
    assert score.step == (1 if before else 0)
    assert all(len(score.optimizer.state[value]) == 3 for value in before)  # every parameter was really updated


def test_encoding_a_view_costs_the_minimum() -> None:
    with META:
        vae = AutoencoderKL(**SD21_VAE)
        rgb = torch.empty(1, 512, 512, 3, requires_grad=True)
        opacity = torch.empty(1, 512, 512, 1)
    codec, render = VaeCodec(vae, 512, sample_posterior=False), Render(rgb, rgb, opacity, opacity)

    def encode() -> None:
        codec.encode(render, torch.Generator()).sum().backward()

    assert count_tflop(encode) == pytest.approx(VAE_TFLOP, rel=0.01)
    assert rgb.grad is not None
