"""``Score`` over a whole diffusers prior: every gradient and loss against diffusers' own UNet, every pass counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from tiny_prior import make_tiny_prior
from tiny_score import GUIDANCE, LEARNER, NEGATIVE, PROMPT, SCALE, SEED, learn, new_score, views_of
from torch import Tensor

from raydream.config.branches import BranchConfig
from raydream.config.names import MethodName
from raydream.diffusion.text import encode_prompts
from raydream.distill.messages import Message
from raydream.distill.score import Score
from raydream.schedule import Constant, Linear
from raydream.seeds import generator


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("priors")
    return {kind: make_tiny_prior(root / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, priors: dict[str, Path]) -> Path:
    return priors[request.param]


@pytest.fixture
def epsilon(priors: dict[str, Path]) -> Path:
    return priors["epsilon"]


@contextmanager
def unet_calls(score: Score) -> Iterator[list[int]]:
    """The number of views in each pass through the UNet."""
    sizes: list[int] = []
    hook = score.branches["rgb"].denoiser.unet.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0]))
    )
    yield sizes
    hook.remove()


class PlainDiffusers:
    """What diffusers itself says of one view: the UNet of the folder and, beside it, one that wears the LoRA."""

    def __init__(self, folder: Path, score: Score) -> None:
        self.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.frozen = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
        self.lora = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
        if score.learner is not None:
            state = {name: value.detach().clone() for name, value in score.learner.trainable().items()}
            self.lora.load_lora_adapter({k: v for k, v in state.items() if k.startswith("unet.")}, prefix="unet")
            self.lora.class_embedding = TimestepEmbedding(16, self.lora.time_embedding.linear_2.out_features)
            camera = {k.removeprefix("camera."): v for k, v in state.items() if k.startswith("camera.")}
            self.lora.class_embedding.load_state_dict(camera)
        sides = [", front view", ", side view", ", back view", ", overhead view"]
        self.texts = encode_prompts(folder, [PROMPT, NEGATIVE, *(PROMPT + s for s in sides)], torch.device("cpu"))

    @torch.no_grad()
    def eps(self, z_t: Tensor, t: int, text: Tensor, camera: Tensor | None = None) -> Tensor:
        unet = self.frozen if camera is None else self.lora
        answer = unet(z_t[None], t, text[None], class_labels=None if camera is None else camera.reshape(1, 16)).sample[
            0
        ]
        abar = self.scheduler.alphas_cumprod[t]
        return (
            answer
            if self.scheduler.config.prediction_type == "epsilon"
            else abar**0.5 * answer + (1 - abar) ** 0.5 * z_t
        )

    def draw(
        self, purpose: str, owner: int, step: int, z_0: Tensor, low: int, high: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t, noise and z_t of one message, the last by diffusers' scheduler."""
        draws = generator(SEED, purpose, owner, step)
        t = torch.randint(low, high + 1, (len(z_0),), generator=draws)
        noise = torch.randn(z_0.shape, generator=draws)
        return t, noise, self.scheduler.add_noise(z_0, noise, t)


def side_of(message: Message, view: int) -> str:
    azimuth, elevation = abs(float(message["azimuth_deg"][view])), float(message["elevation_deg"][view])
    if elevation > 60:
        return PROMPT + ", overhead view"
    return PROMPT + (", front view" if azimuth < 45 else ", back view" if azimuth > 135 else ", side view")


def gradient_by_hand(
    method: MethodName, eps: Tensor, reference: Tensor, z_0: Tensor, noise: Tensor, abar: Tensor
) -> Tensor:
    if method != "sjc":
        return (1 - abar) * (eps - reference)
    sigma = ((1 - abar) / abar) ** 0.5
    perturbed = z_0 + sigma * noise
    denoised = perturbed - sigma * eps
    return -(denoised - z_0) / sigma


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vsd", "sds", "sjc"])
def test_guide_is_the_formula(folder: Path, method: MethodName) -> None:
    """View by view with diffusers' own UNets; particles have 2, 1 and 3 views, and each gets its own gradient."""
    score, step = learn(new_score(folder, method), 3), 3
    plain, messages, timesteps = PlainDiffusers(folder, score), views_of(step, (2, 1, 3)), []
    *gradients, stats = score.guide(step, "rgb", range(3), *messages)
    for index, (gradient, message) in enumerate(zip(gradients, messages, strict=True)):
        assert gradient.shape == message["latents/rgb"].shape
        z_0, c2w = torch.from_numpy(message["latents/rgb"]), torch.from_numpy(message["c2w"])
        t, noise, z_t = plain.draw("guide", index, step, z_0, 20, 980)
        for view, at in enumerate(t.tolist()):
            negative, positive = (
                plain.eps(z_t[view], at, plain.texts[text]) for text in (NEGATIVE, side_of(message, view))
            )
            reference = noise[view]
            if method == "vsd":
                reference = plain.eps(z_t[view], at, plain.texts[PROMPT], c2w[view])
                assert (reference - plain.eps(z_t[view], at, plain.texts[PROMPT])).abs().max() > 0.02
            eps = negative + SCALE * (positive - negative)
            abar = plain.scheduler.alphas_cumprod[at]
            expected = gradient_by_hand(method, eps, reference, z_0[view], noise[view], abar)
            # float32 in batches of another size, and guidance of 7.5 multiplies the rounding by 14
            torch.testing.assert_close(torch.from_numpy(gradient[view]), expected, rtol=1e-3, atol=2e-4)
        timesteps.append(t)
    assert stats["guide/t"] == pytest.approx(float(torch.cat(timesteps).float().mean()))


def test_perp_neg_is_the_formula(epsilon: Path) -> None:
    """The positive text lies between two sides; what the other sides say across it is pushed away from."""
    score = new_score(epsilon, "sds", replace(GUIDANCE, perp_neg=True))
    plain, messages = PlainDiffusers(epsilon, score), views_of(0, (2, 1, 3))
    *gradients, _ = score.guide(0, "rgb", range(3), *messages)
    for index, (gradient, message) in enumerate(zip(gradients, messages, strict=True)):
        z_0, angles = torch.from_numpy(message["latents/rgb"]), (message["azimuth_deg"], message["elevation_deg"])
        t, noise, z_t = plain.draw("guide", index, 0, z_0, 20, 980)
        texts = score.branches["rgb"].texts.perp_neg_texts(*(torch.from_numpy(angle) for angle in angles))
        for view, at in enumerate(t.tolist()):
            uncond = plain.eps(z_t[view], at, plain.texts[NEGATIVE])
            direction = plain.eps(z_t[view], at, texts.positive[view]) - uncond
            eps = uncond + SCALE * direction
            for negative, weight in zip(texts.negatives[:, view], texts.weights[:, view]):
                away = plain.eps(z_t[view], at, negative) - uncond
                eps = eps + SCALE * weight * (away - (away * direction).sum() / direction.square().sum() * direction)
            expected = (1 - plain.scheduler.alphas_cumprod[at]) * (eps - noise[view])
            torch.testing.assert_close(torch.from_numpy(gradient[view]), expected, rtol=1e-3, atol=1e-3)


def test_fit_is_the_formula(folder: Path) -> None:
    """The loss of a learner that has learned a little: the mean over all views, some of which lose their camera."""
    score = learn(new_score(folder), 3)
    plain, messages, errors = PlainDiffusers(folder, score), views_of(3), []
    for index, message in enumerate(messages):
        z_0, c2w = torch.from_numpy(message["latents/rgb"]), torch.from_numpy(message["c2w"])
        t, noise, z_t = plain.draw("fit0", index, 3, z_0, 0, 999)
        keep = torch.rand(len(z_0), generator=generator(SEED, "fit0/camera", index, 3)) >= LEARNER.camera_dropout
        for view, at in enumerate(t.tolist()):
            with torch.no_grad():
                text, camera = plain.texts[PROMPT][None], (c2w[view] * keep[view]).reshape(1, 16)
                answer = plain.lora(z_t[view][None], at, text, class_labels=camera).sample[0]
            is_v = plain.scheduler.config.prediction_type == "v_prediction"
            target = plain.scheduler.get_velocity(z_0[view], noise[view], t[view]) if is_v else noise[view]
            errors.append((answer - target).square().mean())
    assert score.fit(3, range(3), *messages)["loss/fit"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("guidance", "method", "guide_calls"),
    [
        (GUIDANCE, "vsd", [12, 6]),  # negative and positive in one batch, then the LoRA, conditional only
        (replace(GUIDANCE, scale=1.0), "vsd", [6, 6]),
        (replace(GUIDANCE, perp_neg=True), "vsd", [24, 6]),
        (GUIDANCE, "sds", [12]),
        (replace(GUIDANCE, scale=1.0), "sjc", [6]),
    ],
)
def test_no_pass_is_wasted(
    epsilon: Path, monkeypatch: pytest.MonkeyPatch, guidance: BranchConfig, method: MethodName, guide_calls: list[int]
) -> None:
    """So many views go through the UNet in each pass, and no VAE exists: neither to decode nor to encode."""

    def no_vae(*args: object, **settings: object) -> None:
        raise AssertionError("the score model touched a VAE")

    for name in ("__init__", "encode", "decode"):
        monkeypatch.setattr(AutoencoderKL, name, no_vae)
    score, messages = new_score(epsilon, method, guidance), views_of(0)
    with unet_calls(score) as calls:
        score.guide(0, "rgb", range(3), *messages)
        assert calls == guide_calls
        score.fit(0, range(3), *messages)
        assert calls[len(guide_calls) :] == ([6] if method == "vsd" else [])


def test_a_particles_gradient_does_not_depend_on_its_company(epsilon: Path) -> None:
    score, messages = learn(new_score(epsilon), 3), views_of(3)
    *together, _ = score.guide(3, "rgb", [0, 1, 2], *messages)
    for members in ([0, 2], [1]):
        *parts, _ = score.guide(3, "rgb", members, *[messages[i] for i in members])
        for index, part in zip(members, parts, strict=True):
            np.testing.assert_allclose(part, together[index], rtol=1e-3, atol=2e-4)
    draws = [torch.from_numpy(gradient).flatten() for gradient in together]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.5


def test_clipping_timesteps_and_wire_follow_the_settings(epsilon: Path) -> None:
    annealed = Linear(0.9, 0.3, 0, 10)
    guidance = replace(GUIDANCE, t_min=Constant(0.3), t_max=annealed, gradient_clip=Linear(0.5, 0.02, 0, 10))
    score = new_score(epsilon, "sds", guidance)
    for step, bound in ((0, 0.5), (10, 0.02)):
        *gradients, stats = score.guide(step, "rgb", range(3), *views_of(step))
        assert max(np.abs(gradient).max() for gradient in gradients) == np.float32(bound)
        assert (stats["guide/t"] == 300) == (step == 10)
    score.config = replace(score.config, wire_dtype="float16")
    *gradients, _ = score.guide(0, "rgb", range(3), *views_of(0))
    assert {gradient.dtype for gradient in gradients} == {np.dtype(np.float16)}


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_t_is_one_for_all_views(epsilon: Path, shared: bool) -> None:
    """In every replica the same, at every step another; what is learned has its own t for each view all the same."""
    score, seen = new_score(epsilon, "vsd", replace(GUIDANCE, shared_t=shared)), []
    score.branches["rgb"].denoiser.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    score.guide(0, "rgb", range(3), *views_of(0))
    score.fit(0, range(3), *views_of(0))
    score.guide(1, "rgb", [2], *views_of(1)[2:])
    score.guide(1, "rgb", [0], *views_of(1)[:1])
    guided, reference, fitted, third, _, first, _ = seen
    assert guided == 2 * reference
    assert (len(set(guided)) == 1) == shared
    assert (set(third) == set(first) and len(set(first)) == 1) == shared
    assert set(guided) != set(first)
    assert len(set(fitted)) == 6
