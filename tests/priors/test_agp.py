"""The aligned geometric prior as a model: its shape, its camera, its files, and what its data mean."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from small_agp import LATENT_PX, NUM_OBJECTS, NUM_VIEWS, view_recipe, write_prior, write_views

from raydream.camera import orbit_cameras
from raydream.config.agp import AgpConfig, AgpDataConfig, AgpModelConfig
from raydream.coordinates import decode_ccm
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.guidance import add_noise
from raydream.diffusion.prompts import VIEW_WORDS
from raydream.diffusion.text import encode_prompts
from raydream.priors.agp import AgpDenoiser, fingerprint
from raydream.priors.find import AgpFacts, read_facts
from raydream.train.agp import plan as agp_plan
from raydream.train.agp.samples import (
    MemorySamples,
    Samples,
    camera_weights,
    check_views,
    draw_captions,
    latents_of,
    samples_of,
)
from raydream.train.agp.train import begin_from
from raydream.train.texts import CachedTexts
from raydream.types import Condition, Denoiser
from raydream.views.dataset import iterate_views
from raydream.views.view_set import ObjectCard

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SD21 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "prior")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_views(tmp_path_factory.mktemp("views"), view_recipe())


def _condition(prior: Path, azimuth_deg: list[float], weight: float = 1.0) -> Condition:
    number = len(azimuth_deg)
    cameras = orbit_cameras(
        torch.tensor(azimuth_deg), torch.zeros(number), torch.full((number,), 2.8), torch.full((number,), 45.0), 8, 8
    )
    text = CachedTexts.load(prior, CPU).encode(["a red crate"] * number)
    return Condition(text, cameras.c2w, cameras.fov_y_deg, torch.full((number,), weight))


def _stir(denoiser: AgpDenoiser) -> None:
    """Weights as after a training: none of the new parts is zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("rank", [0, 4])
def test_it_starts_as_its_prior_and_keeps_the_parametrisation(
    prior: Path, rank: int, generator: torch.Generator
) -> None:
    agp = AgpDenoiser.from_prior(prior, rank, 0, CPU)
    assert isinstance(agp, Denoiser)
    frozen = DiffusersDenoiser.load(prior, torch.float32, CPU)
    assert agp.model.prediction_type == frozen.prediction_type == "v_prediction"
    assert torch.equal(agp.model.alphas_cumprod, frozen.alphas_cumprod)
    cond, t = _condition(prior, [0.0, 90.0]), torch.tensor([10, 999])
    z = torch.randn(2, 4, LATENT_PX, LATENT_PX, generator=generator)
    with torch.no_grad():
        assert torch.allclose(agp.eps(z, t, cond), frozen.eps(z, t, cond), atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_eps_is_the_noise_whatever_the_unet_answers(
    prior: Path, prediction_type: str, generator: torch.Generator
) -> None:
    """A stand-in for the UNet that knows the truth, in either parametrisation."""
    unet = UNet2DConditionModel.from_pretrained(prior / "unet")
    agp = AgpDenoiser(unet, SCHEDULER | {"prediction_type": prediction_type}, AgpFacts(0, ""), 0)
    latents, noise = torch.randn(2, 2, 4, LATENT_PX, LATENT_PX, generator=generator)
    t = torch.tensor([30, 700])
    abar = agp.model.alphas_cumprod[t][:, None, None, None]
    truth = noise if prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * latents
    agp.model.call = lambda *given, **named: (truth,)
    z_t = add_noise(latents, noise, agp.model.alphas_cumprod[t])
    assert torch.allclose(agp.eps(z_t, t, _condition(prior, [0.0, 10.0])), noise, atol=1e-5)


def test_it_sees_the_camera_unless_that_is_dropped(prior: Path, generator: torch.Generator) -> None:
    agp = AgpDenoiser.from_prior(prior, 4, 0, CPU)
    _stir(agp)
    z = torch.randn(1, 4, LATENT_PX, LATENT_PX, generator=generator).expand(2, -1, -1, -1)
    t = torch.tensor([500, 500])
    with torch.no_grad():
        seen = agp.eps(z, t, _condition(prior, [0.0, 120.0]))
        blind = agp.eps(z, t, _condition(prior, [0.0, 120.0], weight=0.0))
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert torch.allclose(blind[0], blind[1], atol=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_saved_agp_comes_back_merged_and_frozen(
    prior: Path, tmp_path: Path, rank: int, generator: torch.Generator
) -> None:
    agp = AgpDenoiser.from_prior(prior, rank, 0, CPU)
    _stir(agp)
    agp.save(tmp_path)
    loaded = AgpDenoiser.load(tmp_path, prior, CPU)
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
    z, t, cond = torch.randn(1, 4, LATENT_PX, LATENT_PX, generator=generator), torch.tensor([400]), None
    cond = _condition(prior, [33.0])
    with torch.no_grad():
        expected = agp.eps(z, t, cond)
        error = (loaded.eps(z, t, cond) - expected).abs().max() / expected.abs().max()
    assert error < 5e-3  # weights are stored in float16
    assert read_facts(tmp_path).rank == rank


def test_the_files_of_another_prior_are_refused(prior: Path, tmp_path: Path) -> None:
    AgpDenoiser.from_prior(prior, 4, 0, CPU).save(tmp_path / "agp")
    other = write_prior(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"agp: .* another prior"):
        AgpDenoiser.load(tmp_path / "agp", other, CPU)
    with pytest.raises(ValueError, match=r"agp: .* not an AGP"):
        AgpDenoiser.load(tmp_path, prior, CPU)
    (tmp_path / "agp" / "agp.json").write_text(json.dumps({"rank": "x", "weird": 1}))
    with pytest.raises(ValueError, match=r"agp: .* not an AGP"):
        AgpDenoiser.load(tmp_path / "agp", prior, CPU)


def test_a_prior_whose_latent_has_other_channels_is_refused(tmp_path: Path) -> None:
    folder = write_prior(tmp_path / "prior")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    with pytest.raises(ValueError, match=r"prior: .* latent channels"):
        AgpDenoiser.from_prior(folder, 4, 0, CPU)


def test_a_fingerprint_is_that_of_the_weights_not_of_their_precision(prior: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(prior / "unet")
    same = fingerprint(unet)
    assert fingerprint(unet.half()) == same  # the file holds float16
    with torch.no_grad():
        unet.conv_in.bias[0] += 1
    assert fingerprint(unet) != same


def test_stable_diffusion_shapes_and_sizes() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21)
        assert sum(p.numel() for p in unet.parameters()) == agp_plan.SD21_PARAMETERS
        agp = AgpDenoiser(unet, SCHEDULER, AgpFacts(16, ""), 0)
    camera = {name: p for name, p in agp.trainable().items() if name.startswith("class_embedding.")}
    assert sum(p.numel() for p in camera.values()) == agp_plan.SD21_CAMERA_PARAMETERS
    trained = sum(p.numel() for p in agp.trainable().values())
    assert 15e6 < trained < 40e6
    assert {"conv_in.weight", "conv_out.weight"} <= agp.trainable().keys()


def test_texts_are_the_priors_own(prior: Path) -> None:
    texts = CachedTexts.load(prior, CPU)
    expected = encode_prompts(prior, ["a red crate", ""], CPU)
    both = texts.encode(["a red crate", "", "a red crate"])
    assert torch.allclose(both[0], expected["a red crate"], atol=1e-6)
    assert torch.allclose(both[1], expected[""], atol=1e-6)
    assert torch.equal(both[0], both[2])
    assert texts.encode(["crate " * 100]).shape == both[:1].shape


# --- data -----------------------------------------------------------------------------------------------------------


def test_a_smaller_map_keeps_the_objects_coordinates_at_its_edge() -> None:
    """Means of coordinates by coverage: half-covered pixels know where they lie, empty ones nothing."""
    ccm, alpha = torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 4, 1)
    ccm[:, :, 1:3], alpha[:, :, 1:3] = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1.0])
    alpha[:, :, 2] = 0.5
    latents = latents_of(ccm, alpha, 2)
    assert latents.shape == (1, 4, 2, 2)
    coordinates, opacity = decode_ccm(latents)
    assert torch.allclose(opacity[0, :, :, 0], torch.tensor([[0.5, 0.25]] * 2))
    assert torch.allclose(coordinates, torch.tensor([0.2, 0.4, 0.9]).expand(1, 2, 2, 3), atol=1e-6)
    empty = latents_of(torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 4, 1), 2)
    assert torch.equal(empty[0, :, 0, 0], torch.tensor([0.0, 0.0, 0.0, -1.0]))


def test_cameras_are_in_the_units_of_a_particles_scene(views: str) -> None:
    rows = next(iterate_views(views))
    config = check_views(views, LATENT_PX)
    sphere = samples_of(rows, config, LATENT_PX)
    side = samples_of(rows, replace(config, normalise="longest_side"), LATENT_PX)
    distance = sphere.c2w[:, :3, 3].norm(dim=1)
    assert torch.allclose(distance, torch.from_numpy(np.array(rows["distance"])), atol=1e-4)
    assert torch.allclose(side.c2w[:, :3, 3], 2 * sphere.c2w[:, :3, 3])
    assert torch.equal(side.c2w[:, :3, :3], sphere.c2w[:, :3, :3])


def test_memory_holds_all_views_and_draws_by_generator_only(views: str) -> None:
    source = MemorySamples.read(views, LATENT_PX, AgpDataConfig())
    assert len(source._groups) == NUM_OBJECTS
    first, again, other = (source.samples(64, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)
    drawn = {(card.uid, round(float(angle), 2)) for card, angle in zip(first.cards, first.azimuth_deg)}
    assert NUM_OBJECTS * NUM_VIEWS * 0.8 < len(drawn) <= NUM_OBJECTS * NUM_VIEWS
    with pytest.raises(ValueError, match=r"data\.nouns"):
        MemorySamples.read(views, LATENT_PX, AgpDataConfig(nouns=("zeppelin",)))


def _cards(number: int) -> Samples:
    card = ObjectCard("x", ("a large oak chair", "chair 3"), ("chair",), "CC0-1.0", True)
    zeros = torch.zeros(number)
    poses = torch.eye(4).expand(number, -1, -1)
    return Samples((card,) * number, torch.zeros(number, 4, 2, 2), poses, zeros, zeros, zeros)


def test_captions_are_switched_at_random_and_dropped() -> None:
    number = 4000
    config = AgpDataConfig(original_probability=0.5, noun_probability=0.5, view_word_probability=0.25, text_dropout=0.2)
    captions = draw_captions(_cards(number), config, torch.Generator().manual_seed(0))
    front = VIEW_WORDS["front"]
    plain = [caption.removesuffix(front) for caption in captions]
    told = [caption for caption in captions if caption]

    def share(count: int, total: int, expected: float) -> None:
        assert abs(count / total - expected) < 4 * math.sqrt(expected * (1 - expected) / total)

    share(captions.count(""), number, 0.2)
    share(plain.count("a large oak chair"), len(told), 0.5)
    share(plain.count("chair 3"), len(told), 0.25)
    share(sum(caption.endswith(front) for caption in told), len(told), 0.25)
    by_noun = {caption for caption in plain if caption not in ("", "a large oak chair", "chair 3")}
    assert {"a chair", "a red chair", "a green chair"} <= by_noun
    assert all(caption.endswith("chair") for caption in by_noun)
    share(int(camera_weights(number, config, torch.Generator().manual_seed(1)).sum()), number, 0.9)


def test_views_that_cannot_be_trained_on_are_refused_with_the_remedy(views: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"views: .*multiple.*views\.image_px=12"):
        check_views(views, 6)
    plain = view_recipe()
    without = write_views(
        tmp_path / "rgb", replace(plain, views=replace(plain.views, images=("rgb", "alpha")))
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"without ccm; .*views\.images"):
        check_views(without, LATENT_PX)
    changed = write_views(tmp_path / "changed", plain)
    shard = min((tmp_path / "changed" / "views").glob("*.parquet"))
    table = pq.read_table(shard)
    place = table.schema.get_field_index("azimuth_deg")
    pq.write_table(table.set_column(place, "azimuth_deg", table["azimuth_deg"].cast("double")), shard)
    with pytest.raises(ValueError, match=r"views: column 'azimuth_deg' .* is double, not float"):
        check_views(changed, LATENT_PX)
    with pytest.raises(ValueError, match="views: no rendering job"):
        check_views(str(tmp_path), LATENT_PX)
    with pytest.raises(ValueError, match=r"views: .* packed"):
        check_views("views.zip", LATENT_PX)


# --- the plan -------------------------------------------------------------------------------------------------------


def test_memory_by_stage_is_that_of_the_paper() -> None:
    """ZeRO figure 1: 7.5 billion parameters on 64 GPUs need 120, 31.4, 16.6 and 1.9 GB."""
    for stage, gigabytes in ((0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)):
        memory = agp_plan.zero_memory(7_500_000_000, 64, stage)
        assert (sum(memory.values()) - memory["average"]) / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert agp_plan.zero_memory(100, 4, 2)["average"] == 100


def test_a_plan_adds_up() -> None:
    """270,000 objects of 8 views at 100 a second, and three passes over 50 million samples at 300 TFLOP/s."""
    told = agp_plan.report(8)
    assert "| 3 |" in told
    assert f"{2_160_000 / 100 / 3600:.1f} core hours" in told
    assert f"{50e6 * 3 * agp_plan.SD21_TFLOP_FORWARD / 300 / 3600:.0f} GPU hours" in told
    assert "(23 times each view)" in told


def test_low_rank_is_the_nearest_model_of_its_rank(prior: Path, generator: torch.Generator) -> None:
    """Of full rank it answers as before; of rank 3 its layers' distances are the singular values that are left out."""
    agp = AgpDenoiser.from_prior(prior, 0, 0, CPU)
    before = {name: value.detach().clone() for name, value in agp.trainable().items()}
    with torch.no_grad():
        for value in agp.trainable().values():
            value += 0.02 * torch.randn(value.shape, generator=generator)
    state = {name: value.detach() for name, value in agp.trainable().items()}
    z, t = torch.randn(2, 4, LATENT_PX, LATENT_PX, generator=generator), torch.tensor([400, 700])
    cond = _condition(prior, [10.0, 120.0])
    whole, low = (AgpDenoiser.from_prior(prior, rank, 0, CPU) for rank in (64, 3))
    for each in (whole, low):
        each.load_nearest(state)
    with torch.no_grad():
        expected = agp.eps(z, t, cond)
        assert torch.allclose(whole.eps(z, t, cond), expected, atol=1e-3)
        assert not torch.allclose(low.eps(z, t, cond), expected, atol=1e-2)
    layers = dict(low.unet.named_modules())
    for name in ("down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"):
        change = (state[f"{name}.weight"] - before[f"{name}.weight"]).flatten(1)
        found = layers[name].get_delta_weight("default").flatten(1)
        left_out = torch.linalg.svdvals(change)[3:].square().sum().sqrt()
        assert torch.isclose((found - change).norm(), left_out, rtol=1e-3)
        assert torch.equal(layers[name].get_base_layer().weight, before[f"{name}.weight"])


@pytest.mark.parametrize("rank", [0, 64])
def test_an_agp_begins_as_that_of_an_earlier_prior(
    prior: Path, tmp_path: Path, rank: int, generator: torch.Generator
) -> None:
    """The prior has other weights now; the AGP answers as it did."""
    earlier = AgpDenoiser.from_prior(prior, 0, 0, CPU)
    _stir(earlier)
    earlier.save(tmp_path / "agp")
    later = write_prior(tmp_path / "later", seed=1)
    config = AgpConfig(model=AgpModelConfig(rank), start=str(tmp_path / "agp"), start_prior=str(prior))
    begun = AgpDenoiser.from_prior(later, rank, 0, CPU)
    begin_from(begun, config)
    z, t = torch.randn(2, 4, LATENT_PX, LATENT_PX, generator=generator), torch.tensor([400, 700])
    cond = _condition(prior, [10.0, 120.0])
    with torch.no_grad():
        expected = earlier.eps(z, t, cond)
        error = (begun.eps(z, t, cond) - expected).abs().max() / expected.abs().max()
    assert error < 5e-3  # weights are stored in float16
    assert begun.facts.prior_sha256 != earlier.facts.prior_sha256
    with pytest.raises(ValueError, match=r"^start, start_prior: agp: .* was made from another prior"):
        begin_from(begun, replace(config, start_prior=str(later)))
    with pytest.raises(ValueError, match=r"^start_prior: must be given with start"):
        AgpConfig(start="x")
