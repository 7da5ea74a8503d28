"""The named starting points of a run. Each is a function of how many steps to take, so that schedules scale with it."""

from collections.abc import Callable
from dataclasses import replace

from raydream.config.branches import BranchConfig, GeometricPriorConfig, LearnerConfig, geometric_branch
from raydream.config.checks import near
from raydream.config.cluster import ClusterConfig, OutputConfig
from raydream.config.prior import PriorConfig
from raydream.config.run import RunConfig, StageConfig
from raydream.config.scene import CameraConfig, HashGridConfig, LossConfig, NerfConfig, ShadingConfig
from raydream.schedule import Constant, Linear, Polyline, Steps

DEFAULT_PRESET = "exhibit"


def exhibit(steps: int = 500) -> RunConfig:
    """An exact score, no trained prior: particles become different assets of a set (laptop, minutes, no weights)."""
    # While t is high all modes are one and particles spread; it falls slowly through the range in which they must
    # choose (0.97 to 0.7), and fast through the rest.
    melt, choose, chosen, freeze = (max(k, int(share * steps)) for k, share in enumerate((0.1, 0.4, 0.6, 0.9), 1))
    stage = StageConfig(
        num_steps=steps,
        lr_scale=Linear(1.0, 0.1, int(0.8 * steps), steps),
        scene=NerfConfig(background="constant"),
        camera=CameraConfig(
            views_per_particle=2,
            distance=(2.6, 2.6),
            fov_y_deg=(42.0, 42.0),
            uniform_sphere_probability=0.0,
            image_px=Steps(((0, 32.0), (chosen, 64.0))),
        ),
        shading=ShadingConfig(albedo_steps=10**9),
        branches=(
            BranchConfig(
                scale=1.0,
                view_dependent_prompts=False,
                t_min=Polyline(((melt, 0.98), (choose, 0.9), (chosen, 0.7), (freeze, 0.05))),
                t_max=Polyline(((melt, 0.998), (choose, 0.97), (chosen, 0.9), (freeze, 0.25))),
            ),
        ),
        learner=LearnerConfig(
            lr=1e-3,
            lr_warm_up_steps=1,
            weight_decay=0.0,
            camera_dropout=0.0,
            warm_up_fits=50,
            unet_channels=(64, 64, 128),
        ),
    )
    every = max(1, steps // 6)
    output = OutputConfig(checkpoint_every=every, preview_every=every)
    return RunConfig("a chair", "exhibit", prior=PriorConfig("exhibit"), stages=(stage,), output=output)


def embedded(steps: int = 600) -> RunConfig:
    """The small text-to-image prior that ships with raydream: any of its words, on a laptop, without a download."""
    stage = StageConfig(
        num_steps=steps,
        # in so few steps legs and tails only come out at such a rate
        lr_scale=Linear(5.0, 0.3, int(0.5 * steps), steps),
        # the prior knows whole objects before a plain grey, from the distances at which it was trained
        scene=NerfConfig(
            background="constant",
            random_background_probability=1.0,
            random_background=(0.5, 1.0),
            random_background_grey=True,
        ),
        camera=CameraConfig(
            views_per_particle=2,
            distance=(2.7, 2.9),
            fov_y_deg=(45.0, 45.0),
            uniform_sphere_probability=0.0,
        ),
        shading=ShadingConfig(albedo_steps=10**9),
        # colours that its VAE never saw look to it like those that it did: without this they drift to neon and pink
        losses=LossConfig(sparsity=Constant(1.0), round_trip=Constant(1.0)),
        # the prior knows what, its AGP from where: shapes first, then pictures beside them
        branches=(
            BranchConfig(
                weight=Linear(0.2, 1.0, int(0.3 * steps), int(0.8 * steps)),
                t_max=Linear(0.98, 0.5, int(0.1 * steps), int(0.8 * steps)),
            ),
            replace(
                geometric_branch("embedded"),
                weight=Linear(100.0, 40.0, int(0.3 * steps), int(0.8 * steps)),
                geometric_prior=GeometricPriorConfig(
                    # two steps find what one would blur, and leave specks around it, which one then clears away
                    denoise_steps=Steps(((0, 2.0), (max(1, int(0.3 * steps)), 1.0))),
                    text_noise=1.0,
                ),
            ),
        ),
        learner=LearnerConfig(rank=8, lr=1e-3, lr_warm_up_steps=20),
    )
    every = max(1, steps // 6)
    # its prior saw objects in many lights, so that hardly any is in the albedo; lamps then show form
    output = OutputConfig(checkpoint_every=every, preview_every=every, material="lit")
    prior = PriorConfig("diffusers", "embedded", dtype="auto")
    return RunConfig("a red chair", "embedded", prior=prior, stages=(stage,), output=output)


def sd21(steps: int = 25_000) -> RunConfig:
    """ProlificDreamer's first stage on Stable Diffusion 2.1 (base): one GPU of 40 GB or more for each particle and
    the score.
    """
    milestone = max(1, steps // 5)
    stage = StageConfig(
        num_steps=steps,
        scene=NerfConfig(
            grid=HashGridConfig(num_levels=16, log2_table_size=19, max_resolution=2048, interpolation="smoothstep"),
            samples_per_diagonal=512,
            occupancy_resolution=64,
            density_noise=1.0,
            min_alpha=0.01,  # threestudio's, and nerfacc's early end: of a solid object most samples show nothing
            min_transmittance=1e-4,
            tile_samples=2**20,
        ),
        # near enough that an object fills the picture: from the embedded prior's distances a start is on 11 % of it
        camera=CameraConfig(
            distance=(1.0, 1.5), fov_y_deg=(40.0, 70.0), image_px=Steps(((0, 64.0), (milestone, 512.0)))
        ),
        shading=ShadingConfig(albedo_steps=10**9),
        losses=LossConfig(sparsity=Constant(10.0), opaqueness=Steps(((0, 0.0), (2 * milestone, 1000.0)))),
        branches=(BranchConfig(t_max=Steps(((0, 0.98), (milestone, 0.5))), front_deg=30.0, back_deg=30.0),),
        learner=LearnerConfig(prior="sd21"),
    )
    return RunConfig(
        "a DSLR photo of a bald eagle",
        "sd21",
        prior=PriorConfig("diffusers", "sd21-base", dtype="float16", sample_posterior=True),
        stages=(stage,),
        cluster=ClusterConfig(wire_dtype="float16"),
        output=OutputConfig(
            checkpoint_every=500,
            preview_every=500,
            preview_px=256,
            texture_px=1024,
            normal_map=True,
            turntable_frames=90,
            turntable_px=512,
        ),
    )


def diffusers(steps: int = 3000) -> RunConfig:
    """Any Stable Diffusion class folder given by ``--prior``, at that prior's own image size."""
    stage = replace(sd21(steps).stages[0], learner=LearnerConfig())
    prior = PriorConfig("diffusers", dtype="auto", sample_posterior=True)
    return RunConfig("a red chair", "diffusers", prior=prior, stages=(stage,))


PRESETS: dict[str, Callable[..., RunConfig]] = {
    "exhibit": exhibit,
    "embedded": embedded,
    "sd21": sd21,
    "diffusers": diffusers,
}


def make_preset(name: str, steps: int | None) -> RunConfig:
    """The named preset; ``ValueError`` naming ``preset`` for an unknown one."""
    if name not in PRESETS:
        hint = near(name, PRESETS) or f"choose one of {', '.join(PRESETS)}"
        raise ValueError(f"preset: unknown {name!r}; {hint}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    return PRESETS[name]() if steps is None else PRESETS[name](steps)
