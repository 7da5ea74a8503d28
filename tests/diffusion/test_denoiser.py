"""The frozen prior and its LoRA on a tiny prior with random weights: what must be equal is equal to the bit."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_prior import TEXT_WIDTH, make_tiny_prior
from torch import Tensor

from raydream.diffusion import guidance
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.lora import LoraDenoiser
from raydream.types import Condition

CPU = torch.device("cpu")
NUM_VIEWS = 3


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("priors")
    return {kind: make_tiny_prior(root / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, priors: dict[str, Path]) -> Path:
    return priors[request.param]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(folder, dtype, CPU)


def views(seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    z_t = torch.randn(NUM_VIEWS, 4, 16, 16, generator=generator)
    text = torch.randn(NUM_VIEWS, 7, TEXT_WIDTH, generator=generator)
    c2w = torch.randn(NUM_VIEWS, 4, 4, generator=generator)
    cond = Condition(text, c2w, torch.full((NUM_VIEWS,), 45.0), torch.ones(NUM_VIEWS))
    return z_t, torch.tensor([20, 500, 980]), cond


def with_camera(cond: Condition, c2w: Tensor, weight: list[float]) -> Condition:
    return Condition(cond.text, c2w, cond.fov_y_deg, torch.tensor(weight))


def state_of(lora: LoraDenoiser) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lora.trainable().items()}


@torch.no_grad()
def take(lora: LoraDenoiser, state: dict[str, Tensor]) -> None:
    for name, parameter in lora.trainable().items():
        parameter.copy_(state[name])


def fit(lora: LoraDenoiser, num_steps: int, lr: float = 1e-2) -> list[float]:
    """A few steps of the LoRA's own objective on one batch; gives the losses."""
    z_0, t, cond = views(1)
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(2))
    abar_t = lora.frozen.alphas_cumprod[t]
    z_t, target = (
        guidance.add_noise(z_0, noise, abar_t),
        guidance.lora_target(lora.prediction_type, z_0, noise, abar_t),
    )
    optimiser = torch.optim.AdamW(lora.trainable().values(), lr=lr)
    losses = []
    for _ in range(num_steps):
        loss = (lora.predict(z_t, t, cond) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_the_noise_is_the_one_that_diffusers_implies(folder: Path) -> None:
    """Oracle: DDIMScheduler.step's own estimate of the clean latent, from the plain UNet's answer."""
    frozen, (z_t, t, cond) = load(folder), views()
    plain = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        eps, answer = frozen.eps(z_t, t, cond), plain(z_t, t, cond.text).sample
    for view in range(NUM_VIEWS):
        z_0 = scheduler.step(answer[view], int(t[view]), z_t[view]).pred_original_sample
        abar = scheduler.alphas_cumprod[t[view]]
        # at small t the noise is what is left after a cancellation
        expected = (z_t[view] - abar.sqrt() * z_0) / (1 - abar).sqrt()
        torch.testing.assert_close(eps[view], expected, rtol=1e-4, atol=1e-4)
    assert frozen.prediction_type == scheduler.config.prediction_type
    torch.testing.assert_close(frozen.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-5, atol=0)


def test_the_lora_starts_as_the_frozen_model(folder: Path) -> None:
    frozen, (z_t, t, cond) = load(folder), views()
    with torch.no_grad():
        before = frozen.eps(z_t, t, cond)
        lora = LoraDenoiser(frozen, rank=4, seed=0)
        assert torch.equal(lora.eps(z_t, t, cond), before)


def test_training_moves_the_lora_and_not_the_frozen_model(folder: Path) -> None:
    frozen, (z_t, t, cond) = load(folder), views()
    weights = {name: value.clone() for name, value in frozen.unet.state_dict().items()}
    with torch.no_grad():
        before = frozen.eps(z_t, t, cond)
    lora = LoraDenoiser(frozen, rank=4, seed=0)
    losses = fit(lora, 8)
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        assert not torch.allclose(lora.eps(z_t, t, cond), before, atol=1e-3)
        assert torch.equal(frozen.eps(z_t, t, cond), before)
    kept = {
        name.replace(".base_layer", ""): value
        for name, value in frozen.unet.state_dict().items()
        if "lora_" not in name
    }
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], value) for name, value in weights.items())


def test_only_what_is_trainable_has_a_gradient(folder: Path) -> None:
    frozen = load(folder)
    lora = LoraDenoiser(frozen, rank=4, seed=0)
    fit(lora, 2)  # the first step leaves the zero of each last layer
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in lora.trainable().values())
    ours = {id(value) for value in lora.trainable().values()}
    others = [value for value in frozen.unet.parameters() if id(value) not in ours]
    assert others
    assert not any(value.requires_grad or value.grad is not None for value in others)


def test_a_frozen_pass_between_forward_and_backward_loses_nothing(folder: Path) -> None:
    frozen, (z_t, t, cond) = load(folder), views()
    lora = LoraDenoiser(frozen, rank=4, seed=0)
    gradients = []
    for interrupted in (False, True):
        loss = lora.predict(z_t, t, cond).square().mean()
        if interrupted:
            with torch.no_grad():
                frozen.eps(z_t, t, cond), lora.eps(z_t, t, cond)
        for value in lora.trainable().values():
            value.grad = None
        loss.backward()
        gradients.append(
            {name: value.grad.clone() for name, value in lora.trainable().items() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() == lora.trainable().keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_an_error_inside_a_lora_pass_leaves_the_frozen_model(folder: Path) -> None:
    frozen, (z_t, t, cond) = load(folder), views()
    lora = LoraDenoiser(frozen, rank=4, seed=0)
    fit(lora, 2)
    with torch.no_grad():
        before = frozen.eps(z_t, t, cond)
        with pytest.raises(RuntimeError):
            lora.eps(z_t, t, Condition(cond.text[..., :-1], cond.c2w, cond.fov_y_deg, cond.camera_weight))
        assert torch.equal(frozen.eps(z_t, t, cond), before)


def test_a_dropped_camera_is_not_seen_and_the_others_are(folder: Path) -> None:
    lora, (z_t, t, cond) = LoraDenoiser(load(folder), rank=4, seed=0), views()
    fit(lora, 4)
    with torch.no_grad():
        here = lora.eps(z_t, t, with_camera(cond, cond.c2w, [0.0, 1.0, 1.0]))
        moved = lora.eps(z_t, t, with_camera(cond, cond.c2w + 1, [0.0, 1.0, 1.0]))
        seen = lora.eps(z_t, t, with_camera(cond, cond.c2w, [1.0, 1.0, 1.0]))
    assert torch.equal(here[0], moved[0])
    assert (here[1:] - moved[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (here[0] - seen[0]).abs().max() > 1e-3
    assert torch.equal(here[1:], seen[1:])  # dropped for each view on its own


def test_the_camera_is_not_an_affine_map(folder: Path) -> None:
    """SweetDreamer's camera branch has no non-linearity; ours must tell the mean of two cameras from the two."""
    lora = LoraDenoiser(load(folder), rank=4, seed=0)
    fit(lora, 4)
    cameras = 3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two, middle = (lora._camera(camera) for camera in (*cameras, cameras.mean(dim=0)))
    assert ((one + two) / 2 - middle).abs().max() > 1e-3


def test_prediction_and_noise_agree(folder: Path) -> None:
    lora, (z_t, t, cond) = LoraDenoiser(load(folder), rank=4, seed=0), views()
    fit(lora, 2)
    with torch.no_grad():
        answer, eps = lora.predict(z_t, t, cond), lora.eps(z_t, t, cond)
    if lora.prediction_type == "v_prediction":
        answer = guidance.eps_from_v(answer, z_t, lora.frozen.alphas_cumprod[t])
    assert torch.equal(answer, eps)


@pytest.mark.slow
def test_a_saved_state_continues_in_another_process(folder: Path, tmp_path: Path) -> None:
    lora, (z_t, t, cond) = LoraDenoiser(load(folder), rank=4, seed=0), views()
    fit(lora, 3)
    save_file(state_of(lora), tmp_path / "lora.safetensors")
    other = LoraDenoiser(load(folder), rank=4, seed=1)
    assert list(other.trainable()) == list(lora.trainable()) == sorted(lora.trainable())
    take(other, load_file(tmp_path / "lora.safetensors"))
    with torch.no_grad():
        assert torch.equal(other.eps(z_t, t, cond), lora.eps(z_t, t, cond))
    assert fit(other, 3) == fit(lora, 3)


def test_diffusers_reads_the_lora_part_itself(folder: Path) -> None:
    """Oracle: the library's own loader of LoRA files, on a plain UNet."""
    lora, (z_t, t, cond) = LoraDenoiser(load(folder), rank=4, seed=0), views()
    fit(lora, 3)
    state = state_of(lora)
    take(lora, {name: 0 * value if name.startswith("camera.") else value for name, value in state.items()})
    plain = load(folder)
    plain.unet.load_lora_adapter(
        {name: value for name, value in state.items() if name.startswith("unet.")}, prefix="unet"
    )
    with torch.no_grad():
        torch.testing.assert_close(plain.eps(z_t, t, cond), lora.eps(z_t, t, cond), rtol=1e-5, atol=1e-5)


def test_the_start_depends_on_the_seed_only(folder: Path) -> None:
    torch.manual_seed(1)
    first = state_of(LoraDenoiser(load(folder), rank=4, seed=5))
    torch.manual_seed(2)
    second, third = (state_of(LoraDenoiser(load(folder), rank=4, seed=seed)) for seed in (5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    differs = {name for name in first if not torch.equal(first[name], third[name])}
    assert differs == {name for name in first if "lora_B" not in name and "linear_2" not in name}


def test_one_unet_carries_one_lora(folder: Path) -> None:
    frozen = load(folder)
    LoraDenoiser(frozen, rank=4, seed=0)
    with pytest.raises(ValueError, match=r"^prior: .*adapters"):
        LoraDenoiser(frozen, rank=4, seed=1)


def test_a_half_precision_prior_keeps_its_lora_in_full_precision(folder: Path) -> None:
    frozen, (z_t, t, cond) = load(folder, torch.bfloat16), views()
    lora = LoraDenoiser(frozen, rank=4, seed=0)
    assert frozen.unet.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in lora.trainable().values())
    with torch.no_grad():
        assert torch.equal(lora.eps(z_t, t, cond), frozen.eps(z_t, t, cond))
        assert frozen.eps(z_t, t, cond).dtype == torch.float32
        torch.testing.assert_close(frozen.eps(z_t, t, cond), load(folder).eps(z_t, t, cond), rtol=0.1, atol=0.1)
    losses = fit(lora, 8)
    assert losses[-1] < 0.9 * losses[0]


def test_other_predictions_are_refused(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with pytest.raises(ValueError, match=r"^prior: .*'sample'"):
        DiffusersDenoiser(unet, {"prediction_type": "sample"})
