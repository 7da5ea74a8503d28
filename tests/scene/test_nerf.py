"""Renders of the NeRF scene in closed form, their gradients, their light, and the regularisers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from small_scenes import SHADING, SMALL, make_cameras, make_constant, make_scene
from torch import Tensor
from torch.nn import functional as F

from raydream.camera import camera_rays, orbit_cameras, select_views
from raydream.config.scene import LossConfig, ShadingConfig
from raydream.coordinates import Box
from raydream.scene import losses
from raydream.scene.nerf import GREY, LIGHT_DISTANCE, Look, NerfScene, draw_look, plain_look
from raydream.schedule import Constant, Steps
from raydream.types import Rays, RaySamples, Render

ALL_LOSSES = LossConfig(Constant(0.7), Constant(0.5), Constant(2.0), Constant(3.0))


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def lit_look(modes: tuple[str, ...], light: tuple[float, float, float]) -> Look:
    plain = plain_look(len(modes))
    return dataclasses.replace(plain, shading=modes, light=torch.tensor([light] * len(modes)))


# --- renders in closed form -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_constant_field_is_a_coloured_fog(backend: str) -> None:
    """Density s and one colour: opacity is 1 - exp(-s * way through the box), the colour what it covers."""
    flat = dataclasses.replace(SMALL, initial_density_lambda=0.0, background="constant", samples_per_diagonal=400)
    scene = make_scene(backend, flat)
    make_constant(scene, (0.4, -1.0, 0.0, 2.0))
    density, color = math.log1p(math.exp(0.4)), torch.sigmoid(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))
    cameras = make_cameras([30.0, 130.0])
    render = scene.volume(cameras, plain_look(2))
    assert render.volume is not None
    samples = render.volume.samples
    near, far = spans_of_box(camera_rays(cameras), 1.0)
    way = (far - near).clamp(min=0)
    opacity = render.opacity.flatten()
    torch.testing.assert_close(opacity, 1 - torch.exp(-density * samples.counts.double() * scene.step_size))
    # an interval counts where its middle lies in the box, so the way is right to a step
    assert (torch.log1p(-opacity) / -density - way).abs().max() <= scene.step_size * 1.0001
    assert ((opacity > 0) == (samples.counts > 0)).all()
    foreground = opacity[:, None] * color
    torch.testing.assert_close(render.foreground.reshape(-1, 3), foreground)
    background = torch.tensor(GREY, dtype=torch.float64)
    torch.testing.assert_close(render.rgb.reshape(-1, 3), foreground + (1 - opacity[:, None]) * background)

    # depth: the integral of distance * density * transmittance from entry to exit
    entry, leave = near[way > 0.5], far[way > 0.5]
    fall = torch.exp(-density * (leave - entry))
    depth = entry + 1 / density - fall * (leave + 1 / density)
    assert (render.depth.flatten()[way > 0.5] - depth).abs().max() < 2 * scene.step_size


def spans_of_box(rays: Rays, radius: float) -> tuple[Tensor, Tensor]:
    sides = torch.stack([(side * radius - rays.origins) / rays.directions for side in (-1, 1)])
    return sides.amin(0).amax(-1), sides.amax(0).amin(-1)


def test_depth_is_the_distance_along_the_ray_and_ccm_the_place_where_it_ends(backend: str) -> None:
    solid = dataclasses.replace(SMALL, initial_density_lambda=0.0, samples_per_diagonal=400)
    scene = make_scene(backend, solid)
    make_constant(scene, (1e4, 0.0, 0.0, 0.0))
    cameras = make_cameras([10.0, 250.0])
    box = Box(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([1.0, 1.0, 0.5]))
    render = scene.volume(cameras, plain_look(2), ccm_box=box)
    rays = camera_rays(cameras)
    near, far = spans_of_box(rays, 1.0)
    hit = far - near > scene.step_size
    # no jitter: the first interval begins half a step behind the entry and has its middle another half behind that
    first = near[hit] + scene.step_size
    torch.testing.assert_close(render.depth.flatten()[hit], first, rtol=1e-9, atol=0)
    assert (render.opacity.flatten()[hit] == 1).all()
    along_the_axis = first * (rays.directions[hit] * -cameras.c2w[:, :3, 2].repeat_interleave(144, 0)[hit]).sum(-1)
    assert (first - along_the_axis).max() > 0.05  # and so it is not the distance along the camera's axis

    place = rays.origins[hit] + rays.directions[hit] * first[:, None]
    assert (place.abs().amax(-1) > 0.5).all()
    expected = torch.stack([(place[:, 0] + 1) / 2, (place[:, 1] + 2) / 3, place[:, 2] + 0.5], dim=-1)
    assert (expected.clamp(0, 1) != expected).any()  # the box is shorter than what is there: held on its faces
    assert render.ccm is not None
    torch.testing.assert_close(render.ccm.reshape(-1, 3)[hit], expected.clamp(0, 1), rtol=0, atol=1e-9)
    assert not render.ccm.reshape(-1, 3)[~(far > near)].any()


def test_coordinates_and_normals_are_weighted_by_opacity(backend: str) -> None:
    """Half a fog and a solid block show the same coordinates where they are divided by their opacity."""
    thin = dataclasses.replace(SMALL, initial_density_lambda=0.0)
    scene = make_scene(backend, thin)
    make_constant(scene, (-1.0, 0.0, 0.0, 0.0))
    box = Box(torch.full((3,), -1.0), torch.full((3,), 1.0))
    render = scene.volume(make_cameras([0.0], 5), plain_look(1), normals=True, ccm_box=box)
    assert render.ccm is not None
    middle = render.opacity[0, 2, 2]
    assert 0.2 < middle < 0.6
    assert (render.ccm[0, 2, 2, 0] / middle).item() == pytest.approx(0.5, abs=1e-9)  # the axis x of a central ray

    ball = make_scene(backend)
    with torch.no_grad():
        ball.field.head.zero_()
    seen = ball.volume(make_cameras([90.0], 15), plain_look(1), normals=True)
    assert seen.normal is not None
    assert ((seen.normal.norm(dim=-1) <= seen.opacity[..., 0] + 1e-12) & (seen.opacity[..., 0] < 1)).all()
    towards_camera = F.normalize(make_cameras([90.0]).c2w[0, :3, 3], dim=0)
    facing = (seen.normal[0, 7, 7] * towards_camera).sum() / seen.opacity[0, 7, 7]
    assert facing > 0.7  # the far half of a soft ball, which looks away, shines through


@pytest.mark.slow
@pytest.mark.parametrize("background", ["network", "constant"])
def test_an_empty_scene_is_its_backdrop(backend: str, background: str) -> None:
    scene = make_scene(backend, dataclasses.replace(SMALL, background=background), False, ALL_LOSSES)
    cameras = make_cameras([0.0, 90.0])
    box = Box(torch.full((3,), -1.0), torch.full((3,), 1.0))
    look = dataclasses.replace(lit_look(("lambertian", "albedo"), (0.0, 0.0, 2.0)), background=torch.rand(2, 3))
    look = dataclasses.replace(look, replace_background=torch.tensor([False, True]))
    render = scene.volume(cameras, look, torch.Generator(), normals=True, ccm_box=box)
    assert render.volume is not None
    assert len(render.volume.weights) == 0
    for image in (render.foreground, render.opacity, render.depth, render.normal, render.ccm):
        assert image is not None
        assert not image.any()
    assert torch.equal(render.rgb[1], look.background[1].double().expand(12, 12, 3))
    if scene.background is None:
        assert torch.equal(render.rgb[0], torch.tensor(GREY).double().expand(12, 12, 3))
    else:
        own = scene.background(camera_rays(cameras).directions).reshape(2, 12, 12, 3)
        torch.testing.assert_close(render.rgb[0], own[0])
        assert own[0].std() > 1e-3
    total = render.rgb.sum() + sum(scene.regularizers(render, 0).values())
    total.backward()
    gradients = [p.grad for p in scene.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_views_of_one_render_do_not_touch_one_another(backend: str) -> None:
    scene, cameras = make_scene(backend), make_cameras([0.0, 77.0, 200.0])
    look = lit_look(("albedo", "lambertian", "textureless"), (1.0, 1.0, 1.0))
    together = scene.volume(cameras, look)
    for view in range(3):
        part = slice(view, view + 1)
        one = Look(look.shading[part], look.light[part], look.background[part], look.replace_background[part])
        alone = scene.volume(select_views(cameras, part), one, normals=True)
        for name in ("rgb", "opacity", "depth", "normal"):
            torch.testing.assert_close(getattr(together, name)[part], getattr(alone, name), rtol=1e-12, atol=1e-12)


def test_jitter_is_drawn_from_the_generator_alone(backend: str) -> None:
    scene, cameras = make_scene(backend), make_cameras([0.0])
    first, again, other = (
        scene.volume(cameras, plain_look(1), torch.Generator().manual_seed(seed)).rgb for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    still = [scene.volume(cameras, plain_look(1)).rgb for _ in range(2)]
    assert torch.equal(*still)


def test_density_noise_belongs_to_training(backend: str) -> None:
    noisy = make_scene(backend, dataclasses.replace(SMALL, density_noise=3.0))
    quiet = make_scene(backend)
    cameras, look = make_cameras([0.0]), plain_look(1)
    assert torch.equal(noisy.volume(cameras, look).rgb, quiet.volume(cameras, look).rgb)
    draws = [torch.Generator().manual_seed(0) for _ in "ab"]
    differing = noisy.volume(cameras, look, draws[0]).rgb - quiet.volume(cameras, look, draws[1]).rgb
    assert differing.abs().max() > 1e-3


# --- gradients ------------------------------------------------------------------------------------------------------


def scalar_of(scene: NerfScene, render: Render) -> Tensor:
    """Every image with a weight of its own for each pixel, and the regularisers."""
    draws = torch.Generator().manual_seed(5)
    images = [render.rgb, render.foreground, render.opacity, render.depth, render.normal, render.ccm]
    total = torch.zeros((), dtype=torch.float64)
    for image in images:
        assert image is not None
        total = total + (image * torch.randn(image.shape, generator=draws, dtype=image.dtype)).sum()
    return total + sum(scene.regularizers(render, 0).values())


def full_render(scene: NerfScene) -> Render:
    look = lit_look(("albedo", "lambertian", "textureless"), (1.5, 1.0, 0.5))
    box = Box(torch.full((3,), -0.8), torch.full((3,), 1.0))
    return scene.volume(
        make_cameras([0.0, 120.0, 240.0]), look, torch.Generator().manual_seed(1), normals=True, ccm_box=box
    )


def test_gradients_of_a_whole_render_are_finite_differences(backend: str) -> None:
    """Along random directions through all parameters at once. Without orientation, which holds its weights; a step
    so short that no hidden unit of any sample switches, where a normal jumps.
    """
    smooth, h = dataclasses.replace(ALL_LOSSES, orientation=Constant(0.0)), 1e-7
    scene = make_scene(backend, losses=smooth)
    parameters = list(scene.parameters())
    gradients = torch.autograd.grad(scalar_of(scene, full_render(scene)), parameters)
    start = [p.detach().clone() for p in parameters]
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction))
        ends = []
        for offset in (h, -h):
            with torch.no_grad():
                for p, at, d in zip(parameters, start, direction):
                    p.copy_(at + offset * d)
                ends.append(float(scalar_of(scene, full_render(scene))))
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_numba_renders_and_learns_like_the_reference() -> None:
    """Measured: 6e-16 of the largest entry."""
    scenes = {name: make_scene(name, losses=ALL_LOSSES) for name in ("reference", "numba")}
    renders = {name: full_render(scene) for name, scene in scenes.items()}
    for name in ("rgb", "foreground", "opacity", "depth", "normal", "ccm"):
        first, second = (getattr(render, name) for render in renders.values())
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-11)
    for name, scene in scenes.items():
        scalar_of(scene, renders[name]).backward()
    for (name, p), other in zip(scenes["reference"].named_parameters(), scenes["numba"].parameters()):
        assert p.grad is not None
        assert other.grad is not None
        assert p.grad.abs().max() > 0, name
        worst = (p.grad - other.grad).abs().max() / p.grad.abs().max()
        assert worst < 1e-13, (name, worst)


def gradients_of_a_plain_step(backend: str, bfloat16: str) -> dict[str, Tensor]:
    """In float32 and without normals: what most steps are."""
    scene = make_scene(backend, dataclasses.replace(SMALL, bfloat16=bfloat16)).float()
    cameras = make_cameras([0.0, 90.0], 24)
    single = dataclasses.replace(cameras, c2w=cameras.c2w.float(), fov_y_deg=cameras.fov_y_deg.float())
    render = scene.volume(single, plain_look(2), torch.Generator().manual_seed(0))
    (render.rgb.square().mean() + render.opacity.mean()).backward()
    return {name: p.grad for name, p in scene.named_parameters() if p.grad is not None}


def test_numba_learns_like_the_reference_in_the_precision_of_a_run() -> None:
    expected, found = (gradients_of_a_plain_step(name, "off") for name in ("reference", "numba"))
    assert len(expected) == 6
    for name in expected:
        worst = (expected[name] - found[name]).abs().max() / expected[name].abs().max()
        assert worst < 1e-5, (name, worst)  # measured 2e-7


def test_bfloat16_points_the_same_way() -> None:
    exact, rounded = (gradients_of_a_plain_step("reference", bfloat16) for bfloat16 in ("off", "on"))
    for name in exact:
        cosine = F.cosine_similarity(exact[name].flatten(), rounded[name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine)  # 8 bits of mantissa; measured 0.99999
    assert not torch.equal(exact["field.head"], rounded["field.head"])


def test_every_parameter_is_in_one_group() -> None:
    scene = make_scene("numba")
    groups: list[Any] = [*scene.param_groups()]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in scene.parameters())
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(scene.field.table)] == SMALL.lr_grid
    assert rates[id(scene.field.hidden)] == rates[id(scene.field.head)] == SMALL.lr_network
    assert scene.background is not None
    assert {rates[id(p)] for p in scene.background.parameters()} == {SMALL.lr_background}


def test_regularizers_are_their_formulas_times_their_schedules(backend: str) -> None:
    late = LossConfig(sparsity=Steps(((0, 0.0), (10, 4.0))), z_variance=Constant(0.5))
    scene, other = make_scene(backend, losses=ALL_LOSSES), make_scene(backend, losses=late)
    render = full_render(scene)
    assert render.volume is not None
    opacity, weights, samples = render.opacity.reshape(-1), render.volume.weights, render.volume.samples
    assert set(other.regularizers(render, 9)) == {"z_variance"}
    found = other.regularizers(render, 10)
    torch.testing.assert_close(found["sparsity"], 4 * losses.sparsity(opacity))
    torch.testing.assert_close(found["z_variance"], 0.5 * losses.z_variance(weights, samples))
    found = scene.regularizers(render, 0)
    torch.testing.assert_close(found["opaqueness"], 0.5 * losses.opaqueness(opacity))
    assert render.volume.normals is not None
    expected = 2 * losses.orientation(weights, render.volume.normals, render.volume.rays.directions, samples)
    torch.testing.assert_close(found["orientation"], expected)
    without = scene.volume(make_cameras([0.0]), plain_look(1))
    with pytest.raises(AssertionError, match="normals"):
        scene.regularizers(without, 0)


# --- light and backdrop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("light", "cosine"),
    [((0.0, 0.0, 2.5), 1.0), ((0.0, 1.0, 1.5), math.sqrt(0.5)), ((2.0, 0.0, 0.5), 0.0), ((0.0, 0.0, -2.0), 0.0)],
    ids=["above", "at 45 degrees", "grazing", "behind"],
)
def test_shading_is_the_formula(light: tuple[float, float, float], cosine: float) -> None:
    """A sample at (0, 0, 0.5) that looks along +z: ambient 0.1 and 0.9 times the cosine, seen in three views."""
    scene = make_scene("reference")
    cameras = make_cameras([0.0, 0.0, 0.0], 1)
    points = torch.tensor([[0, 0, 0.5]] * 3, dtype=torch.float64)
    normal = torch.tensor([[0, 0, 1.0]] * 3, dtype=torch.float64)
    albedo = torch.tensor([[0.2, 0.4, 1.0]] * 3, dtype=torch.float64)
    ray, one = torch.arange(3), torch.ones(3, dtype=torch.float64)
    samples = RaySamples(ray, one, one + 1, ray, torch.ones(3, dtype=torch.long))
    look = lit_look(("albedo", "lambertian", "textureless"), light)
    found = scene._shade(albedo, normal, points, samples, look, cameras)
    lit = 0.1 + 0.9 * cosine
    expected = torch.stack([albedo[0], albedo[0] * lit, torch.full((3,), lit, dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # the light is kept in float32


def test_shading_modes_come_with_their_probabilities() -> None:
    """Four standard deviations of 4000 draws are at most 3.2 %."""
    view = 4000
    zeros = torch.zeros(view)
    cameras = orbit_cameras(zeros, zeros, zeros + 2, zeros + 45, 1, 1)
    shading = ShadingConfig(albedo_steps=10, shaded_probability=0.75, textureless_probability=0.5)
    scene = dataclasses.replace(SMALL, random_background_probability=0.3)
    before = draw_look(shading, scene, cameras, 9, torch.Generator().manual_seed(0))
    assert set(before.shading) == {"albedo"}
    assert not before.needs_normals
    look = draw_look(shading, scene, cameras, 10, torch.Generator().manual_seed(0))
    assert look.needs_normals
    for mode, probability in (("albedo", 0.25), ("lambertian", 0.375), ("textureless", 0.375)):
        assert look.shading.count(mode) / view == pytest.approx(probability, abs=0.032)
    assert look.replace_background.double().mean().item() == pytest.approx(0.3, abs=0.032)
    assert look.background.min() >= 0
    assert look.background.max() <= 1
    assert look.background.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    distance = look.light.norm(dim=-1)
    assert (distance >= LIGHT_DISTANCE[0] - 1e-5).all()
    assert (distance <= LIGHT_DISTANCE[1] + 1e-5).all()
    # the light's direction is the camera's (+z) plus a standard normal: in front with probability Phi(1) = 0.841
    assert (look.light[:, 2] > 0).double().mean().item() == pytest.approx(0.841, abs=0.025)
    assert draw_look(shading, scene, cameras, 10, torch.Generator().manual_seed(0)).shading == look.shading


def test_drawn_backgrounds_can_be_greys_of_a_range() -> None:
    view = 200
    cameras = make_cameras([0.0] * view, 1)
    scene = dataclasses.replace(SMALL, random_background=(0.5, 0.9), random_background_grey=True)
    background = draw_look(SHADING, scene, cameras, 0, torch.Generator().manual_seed(0)).background
    assert (background == background[:, :1]).all()
    assert 0.5 <= background.min() < 0.52
    assert 0.88 < background.max() <= 0.9


def test_all_or_nothing_probabilities() -> None:
    cameras = make_cameras([0.0] * 50, 1)
    for probability, modes in ((0.0, {"albedo"}), (1.0, {"textureless"})):
        shading = ShadingConfig(0, probability, probability)
        scene = dataclasses.replace(SMALL, random_background_probability=probability)
        look = draw_look(shading, scene, cameras, 0, torch.Generator().manual_seed(0))
        assert set(look.shading) == modes
        assert look.replace_background.double().mean() == probability
