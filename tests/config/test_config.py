"""Settings: strict JSON there and back, and overrides by name that refuse whatever is not meant."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from raydream.config import strict_json
from raydream.config.actors import particle_config, score_config
from raydream.config.cluster import ClusterConfig, OutputConfig
from raydream.config.presets import PRESETS, make_preset
from raydream.config.run import RunConfig, StageConfig
from raydream.config.scene import MeshConfig, NerfConfig, SceneConfig
from raydream.schedule import Constant, Linear, Polyline, Steps

ROOT = Path(__file__).parents[2]
BASE = make_preset("exhibit", 10)
NAMES = strict_json.field_names(RunConfig)


def value_at(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config[int(key)] if key.isdigit() else getattr(config, key)
    return config


def choices_of(name: str) -> tuple[str, ...]:
    """The words that a setting can be, where it is one of a few."""
    hint: Any = RunConfig
    for key in name.split("."):
        hint = NerfConfig if hint == SceneConfig else hint  # the usual one of a choice
        hint = get_args(hint)[0] if key.isdigit() else get_type_hints(hint)[key]
    return get_args(hint) if get_origin(hint) is Literal else ()


def as_words(value: Any) -> str:
    """What a person would type behind the equals sign."""
    return value if isinstance(value, str) else json.dumps(strict_json.to_json(value))


def wrong_values(value: Any) -> list[str]:
    """Words of a type that a setting with this value cannot have."""
    match value:
        case bool():
            return ["1", "yes", "True"]
        case int():
            return ["1.5", "true", "many", "null", "[1]"]
        case float():
            return ["true", "much", "null", "NaN", "Infinity", "-Infinity", "1e999", '"1"', "[1.0]"]
        case tuple():
            return ["1", "true", "[]" if value and not isinstance(value[0], int) else "[null]", '["a", "b"]', "{}"]
        case Constant() | Linear() | Steps() | Polyline():
            return ["true", "NaN", "soon", "null", '{"kind": "sine"}', '{"value": 1}', '{"kind": "constant"}', "[1]"]
        case _:
            raise AssertionError(f"no wrong value is known for {value!r}")


@pytest.mark.parametrize("steps", [None, 1, 7, 100_000])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_survives_json_to_the_last_bit(preset: str, steps: int | None) -> None:
    config = make_preset(preset, steps)
    text = strict_json.dumps(config)
    assert strict_json.loads(RunConfig, text) == config
    assert strict_json.dumps(strict_json.loads(RunConfig, text)) == text
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    if steps is not None:
        assert config.stages[0].num_steps == steps


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_run_tells_its_actors_all_that_they_need(preset: str) -> None:
    config = make_preset(preset, 10)
    stage = config.stages[0]
    particle, score = particle_config(config, 0, 2), score_config(config, 0, 1)
    assert (particle.index, particle.num_particles, particle.seed) == (2, config.n, config.seed)
    assert (particle.stage, particle.prior, particle.output) == (stage, config.prior, config.output)
    assert (score.replica, score.num_particles, score.seed) == (1, config.n, config.seed)
    assert (score.prompt, score.negative_prompt) == (config.prompt, config.negative_prompt)
    assert (score.branches, particle.first_step, score.first_step) == (stage.branches, 0, 0)
    assert (score.learner, score.prior, score.wire_dtype) == (stage.learner, config.prior, config.cluster.wire_dtype)


@pytest.mark.parametrize(("renders", "graphs"), [("kept", True), ("again", False)])
def test_graphs_keep_no_memory_that_others_take_turns_on(renders: Literal["kept", "again"], graphs: bool) -> None:
    config = replace(BASE, cluster=replace(BASE.cluster, renders=renders))
    assert score_config(config, 0, 0).graphs is graphs


def test_an_actor_of_a_later_stage_knows_its_first_step() -> None:
    first, second = replace(BASE.stages[0], num_steps=7), replace(BASE.stages[0], name="fine", start="previous")
    config = replace(BASE, stages=(first, second))
    assert (particle_config(config, 1, 0).first_step, score_config(config, 1, 0).first_step) == (7, 7)
    assert particle_config(config, 1, 0).stage == second
    assert (config.num_steps, [config.stage_at(step) for step in (0, 6, 7, 16, 17)]) == (17, [0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"^stages\.0\.start: must not be previous"):
        replace(BASE, stages=(second,))


def test_a_run_changes_its_method_and_its_geometric_prior_as_a_whole() -> None:
    plain = BASE.with_method("sjc")
    assert plain.method == "sjc"
    assert [branch.method for branch in plain.stages[0].branches] == ["sjc"]
    assert plain.with_geometric_prior("off") == plain
    both = plain.with_geometric_prior("mine")
    assert [(branch.render, branch.method) for branch in both.stages[0].branches] == [("rgb", "sjc"), ("ccm", "sds")]
    assert both.stages[0].geometric_prior == "mine"
    assert both.with_method("vsd").stages[0].branches[1].method == "sds", "only the pictures' method is the run's"
    assert both.with_geometric_prior("other").stages[0].geometric_prior == "other"
    assert both.with_geometric_prior("off") == plain

    shipped = make_preset("embedded", 10)
    assert shipped.stages[0].geometric_prior == "embedded"
    alone = shipped.with_geometric_prior("off").stages[0]
    assert alone.branches == (replace(shipped.stages[0].branches[0], weight=Constant(1.0)),)


def test_the_names_are_all_settings_and_no_more() -> None:
    def leaves(value: Any, path: str) -> list[str]:
        if isinstance(value, dict) and "kind" in value and not path.endswith(("prior", "scene")):
            return [path]
        if isinstance(value, dict):
            return [name for key, item in value.items() for name in leaves(item, f"{path}.{key}" if path else key)]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [name for i, item in enumerate(value) for name in leaves(item, f"{path}.{i}")]
        return [path]

    assert leaves(strict_json.to_json(BASE), "") == NAMES
    assert len(NAMES) > 80


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_can_be_set_to_what_it_is(name: str) -> None:
    assert strict_json.apply_overrides(BASE, [f"{name}={as_words(value_at(BASE, name))}"]) == BASE


@pytest.mark.parametrize("name", [name for name in NAMES if not isinstance(value_at(BASE, name), str)])
def test_a_setting_refuses_other_types_by_name(name: str) -> None:
    for words in wrong_values(value_at(BASE, name)):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            strict_json.apply_overrides(BASE, [f"{name}={words}"])


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_setting_is_refused_with_the_nearest_name(name: str) -> None:
    *path, key = name.split(".")
    wrong = ".".join([*path, key + "x"])
    with pytest.raises(ValueError, match=rf"^{wrong}: unknown field; did you mean '\w+'\?"):
        strict_json.apply_overrides(BASE, [f"{wrong}=1"])


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_in_json_is_refused_by_its_path(name: str) -> None:
    *path, key = name.split(".")
    document = node = strict_json.to_json(BASE)
    for step in path:
        node = node[int(step)] if step.isdigit() else node[step]
    node[key + "x"] = node.pop(key)
    with pytest.raises(ValueError, match=f"{key}x: unknown field; did you mean"):
        strict_json.loads(RunConfig, json.dumps(document))


def test_a_scene_of_another_kind_has_settings_of_its_own() -> None:
    words = ["stages.0.scene.resolution=32", "stages.0.scene.kind=mesh", "stages.0.scene.hidden_width=16"]
    config = strict_json.apply_overrides(BASE, words)
    assert config.stages[0].scene == MeshConfig(resolution=32, hidden_width=16)
    assert strict_json.apply_overrides(config, ["stages.0.scene.kind=mesh"]) == config
    document = strict_json.to_json(config)
    assert document["stages"][0]["scene"]["kind"] == "mesh"
    assert strict_json.loads(RunConfig, json.dumps(document)) == config
    assert isinstance(strict_json.apply_overrides(config, ["stages.0.scene.kind=nerf"]).stages[0].scene, NerfConfig)
    for scene in ({}, {"radius": 1.5}):  # runs of before know of one kind only
        document["stages"][0]["scene"] = scene
        assert strict_json.loads(RunConfig, json.dumps(document)).stages[0].scene == NerfConfig(**scene)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scene.resolution=32"], "scene.resolution: unknown field"),
        (["scene.kind=mesh", "scene.density_noise=1"], "scene.density_noise: unknown field"),
        (["scene.kind=cube"], "scene.kind: must be one of nerf, mesh, got 'cube'"),
        (["scene.kind=mesh", "scene.resolution=2"], "scene.resolution: must be 4..512, got 2"),
        (["scene.kind=mesh", "scene.radii=[0.5,1.0,0.5]"], "scene.radii: must be positive and below radius=1"),
        (["scene.kind=mesh", "losses.z_variance=1"], "losses.z_variance: must be 0 in a stage whose scene is a mesh"),
        (
            ["branches.0.render=normal", "branches.0.method=sds"],
            "branches.0.render: must not be normal where the scene",
        ),
        (["branches.0.latent_steps=5"], "branches.0.latent_steps: must be 0 on rgb"),
        (["losses.laplacian=1"], "losses.laplacian: must be 0 in a stage whose scene is a nerf"),
    ],
)
def test_what_does_not_fit_the_kind_of_scene_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^stages\.0\.{re.escape(message)}"):
        strict_json.apply_overrides(BASE, [f"stages.0.{word}" for word in words])


@pytest.mark.parametrize("name", [name for name in NAMES if choices_of(name)])
def test_a_choice_names_the_choices(name: str) -> None:
    choices = choices_of(name)
    for choice in choices:
        fitting = ["stages.0.branches.0.method=sds"] if choice in ("ccm", "normal") else []  # nothing learns there
        fitting += ["stages.0.scene.kind=mesh"] if choice == "normal" else []
        assert value_at(strict_json.apply_overrides(BASE, [*fitting, f"{name}={choice}"]), name) == choice
    with pytest.raises(ValueError, match=f"^{name}: must be one of .*{choices[-1]}"):
        strict_json.apply_overrides(BASE, [f"{name}=other"])


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.5),
        Linear(1.0, 0.1, 3, 9),
        Linear(1.0, 1.0, 0, 0),
        Steps(((0, 64.0), (10, 128.0))),
        Polyline(((2, 1.0), (5, 0.5), (9, 0.7))),
    ],
)
def test_schedules_survive_json_and_overrides(schedule: Any) -> None:
    name = "stages.0.lr_scale"
    config = strict_json.apply_overrides(BASE, [f"{name}={as_words(schedule)}"])
    assert value_at(config, name) == schedule
    assert strict_json.loads(RunConfig, strict_json.dumps(config)) == config


def test_a_number_is_a_constant_schedule_of_a_float() -> None:
    config = strict_json.apply_overrides(BASE, ["stages.0.camera.image_px=32"])
    schedule = config.stages[0].camera.image_px
    assert schedule == Constant(32.0)
    assert isinstance(schedule, Constant)
    assert type(schedule.value) is float


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("n=0", "^n: must be at least 1"),
        ("seed=-1", "^seed: must be a non-negative"),
        ("prompt= ", "^prompt: must not be empty"),
        ("prompt=" + "x" * 10_000, "^prompt: must be at most 1000 characters, got 10000"),
        ("cluster.score_replicas=9", "score_replicas: must not exceed n=8"),
        ("cluster.kernels=fast", "^cluster.kernels: unknown name 'fast'; choose one of auto, ours, reference"),
        (
            'cluster={"kernels": "nerfacc", "deterministic": true}',
            "deterministic: must be false with kernels=nerfacc, ",
        ),
        ("cluster.max_restarts=-1", "^cluster.max_restarts: must not be negative"),
        ("output.checkpoint_every=0", "^output.checkpoint_every: must be positive"),
        ("output.mesh_resolution=15", r"^output.mesh_resolution: must be 16\.\.1024"),
        ("stages.0.camera.distance=[3, 2]", "^stages.0.camera.distance: must be two numbers, smaller first"),
        ("stages.0.camera.distance=[1, 2, 3]", "^stages.0.camera.distance: must have 2 entries, got 3"),
        ("stages.0.camera.distance.2=1", "^stages.0.camera.distance.2: '2' must be an index below 2"),
        ("stages.1.num_steps=3", "^stages.1.num_steps: '1' must be an index below 1"),
        ("stages.x.num_steps=3", "^stages.x.num_steps: 'x' must be an index"),
        ("stages=[]", "^stages: must be one or more"),
        ("stages.0.branches=[]", "^stages.0.branches: must have one or more"),
        ("stages.0.branches=[{}, {}]", "^stages.0.branches: must be of different renders, got rgb, rgb"),
        ("stages.0.branches.0.weight=-1", "^stages.0.branches.0.weight: must not be negative"),
        ("stages.0.branches.0.render=ccm", "^stages.0.branches.0.method: must not be vsd on ccm"),
        ("stages.0.branches.0.geometric_prior.denoise_steps=2", r"geometric_prior.denoise_steps: must be 1 with vsd"),
        ("stages.0.branches.0.geometric_prior.source=", "geometric_prior.source: must be embedded or a folder"),
        ("stages.0.start=previous", "^stages.0.start: must not be previous"),
        ("prompt.length=3", "^prompt.length: 'length' does not lead to a setting"),
        ("stages.0.scene.grid.max_resolution=4", "max_resolution: must not be smaller than base_resolution"),
        (
            'stages.0.camera.image_px={"kind": "steps", "points": [[1, 8]]}',
            "image_px.points: need rising steps that start at 0",
        ),
        (
            'stages.0.branches.0.t_max={"kind": "linear", "start": 1, "end": 0, "start_step": 5, "end_step": 2}',
            "t_max.end_step: must not lie before start_step=5",
        ),
        ("n", "^set: need FIELD=VALUE, got 'n'"),
        ("=3", "^set: need FIELD=VALUE"),
        ("", "^set: need FIELD=VALUE"),
    ],
)
def test_bad_values_are_refused_by_name(words: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        strict_json.apply_overrides(BASE, [words])


def test_a_width_without_a_kernel_is_refused_where_that_package_is_named() -> None:
    setting, error = (
        "stages.0.scene.hidden_width=48",
        r"^stages\.0\.scene\.hidden_width: must be one of 16, 32, 64, 128 ",
    )
    assert strict_json.apply_overrides(BASE, ["cluster.kernels=nerfacc", setting])
    with pytest.raises(ValueError, match=f"{error}.*, got 48; or take kernels=ours$"):
        strict_json.apply_overrides(BASE, ["cluster.kernels=nerfacc+tinycudann", setting])


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("method", "stages.0.branches.0.method, or --method"),
        ("cluster.backend", "cluster.kernels"),
        ("stages.0.guidance.scale", "stages.0.branches.0.scale"),
        ("stages.0.guidance.t_max.points", "stages.0.branches.0.t_max.points"),
        ("stages.0.geometry.agp", "stages.0.branches.1.geometric_prior.source, or --agp"),
        ("stages.0.geometry.prior", "stages.0.branches.1.geometric_prior.prior"),
        ("stages.0.geometry.denoise_steps", "stages.0.branches.1.geometric_prior.denoise_steps"),
        ("stages.0.geometry.ori_weight", "stages.0.branches.0.weight"),
        ("stages.0.geometry.align_weight", "stages.0.branches.1.weight"),
        ("stages.0.geometry.t_max", "stages.0.branches.1.t_max"),
    ],
)
def test_a_setting_of_an_earlier_release_is_refused_with_its_name_of_today(former: str, now: str) -> None:
    says = re.escape(f"{former}: no setting of this release; it is called {now} now")
    with pytest.raises(ValueError, match=f"^{says}$"):
        strict_json.apply_overrides(make_preset("embedded", 10), [f"{former}=1"])


@pytest.mark.parametrize(
    ("former", "constant", "where"),
    [
        ("prior.exhibit.mode_std", "MODE_STD", "raydream/priors/exhibit.py"),
        ("prior.exhibit.object_radius", "OBJECT_RADIUS", "raydream/priors/exhibit_modes.py"),
        ("prior.exhibit.ambient", "AMBIENT", "raydream/priors/exhibit_modes.py"),
        ("stages.0.scene.grid.features_per_level", "FEATURES_PER_LEVEL", "raydream/scene/field.py"),
        ("stages.0.scene.occupancy_threshold", "THRESHOLD", "raydream/scene/occupancy.py"),
        ("stages.0.scene.occupancy_decay", "DECAY", "raydream/scene/occupancy.py"),
        ("stages.0.scene.background_color", "GREY", "raydream/scene/nerf.py"),
        ("stages.0.scene.background_color.0", "GREY", "raydream/scene/nerf.py"),
        ("stages.0.shading.ambient", "AMBIENT, DIFFUSE", "raydream/scene/nerf.py"),
        ("stages.0.shading.diffuse", "AMBIENT, DIFFUSE", "raydream/scene/nerf.py"),
        ("stages.0.shading.light_distance", "LIGHT_DISTANCE", "raydream/scene/nerf.py"),
    ],
)
def test_a_setting_that_is_a_constant_now_is_refused_with_its_place(former: str, constant: str, where: str) -> None:
    says = re.escape(f"{former}: no setting of this release; it is a constant now, {constant} in {where}")
    with pytest.raises(ValueError, match=f"^{says}$"):
        strict_json.apply_overrides(BASE, [f"{former}=1"])
    source = (ROOT / where).read_text(encoding="utf-8")
    assert all(re.search(rf"^[A-Z_, ]*\b{name}\b[A-Z_, ]* = ", source, re.MULTILINE) for name in constant.split(", "))


def test_settings_of_an_earlier_release_are_refused_in_json_too() -> None:
    document = strict_json.to_json(BASE)
    with pytest.raises(ValueError, match=r"^method: no setting of this release; it is called stages\.0\.branches"):
        strict_json.from_json(RunConfig, document | {"method": "vsd"})
    document["stages"][0]["guidance"] = document["stages"][0].pop("branches")[0]
    with pytest.raises(ValueError, match=r"^stages\.0\.guidance: .* called stages\.0\.branches\.0 now"):
        strict_json.from_json(RunConfig, document)


@pytest.mark.parametrize("prompt", ["a=b", "../../etc/passwd", "<script>alert(1)</script>", "un œuf 🥚", '"{}[]', "1"])
def test_a_prompt_is_text_whatever_it_looks_like(prompt: str) -> None:
    config = strict_json.apply_overrides(BASE, [f"prompt={prompt}"])
    assert config.prompt == prompt
    assert strict_json.loads(RunConfig, strict_json.dumps(config)).prompt == prompt


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"prompt": "a chair"}', '{"prompt": 3, "preset": "x"}'])
def test_other_documents_are_no_config(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(config|preset|prompt): "):
        strict_json.loads(RunConfig, text)


def test_overrides_leave_the_config_alone_and_apply_in_order() -> None:
    before = dataclasses.replace(BASE)
    config = strict_json.apply_overrides(BASE, ["n=2", "n=4", "stages.0.camera.distance.1=9"])
    assert config.n == 4
    assert config.stages[0].camera.distance == (BASE.stages[0].camera.distance[0], 9.0)
    assert before == BASE


@pytest.mark.parametrize("turned", [False, True])
def test_settings_that_only_fit_each_other_may_come_in_any_order(turned: bool) -> None:
    distance = ["stages.0.camera.distance.0=8", "stages.0.camera.distance.1=9"]
    config = strict_json.apply_overrides(BASE, distance[::-1] if turned else distance)
    assert config.stages[0].camera.distance == (8.0, 9.0)
    with pytest.raises(ValueError, match=r"^stages\.0\.camera\.distance: must be two numbers, smaller first"):
        strict_json.apply_overrides(BASE, distance[:1])


def test_a_whole_setting_drops_the_changes_of_its_parts_that_came_before_it() -> None:
    later = ["stages.0.camera.distance.0=1", "stages.0.camera.distance=[2, 3]", "stages.0.camera.distance.1=4"]
    assert strict_json.apply_overrides(BASE, later).stages[0].camera.distance == (2.0, 4.0)


@pytest.mark.parametrize(("name", "steps"), [("nothing", None), ("exhibit", 0), ("sd21", -5)])
def test_a_preset_is_refused_by_name(name: str, steps: int | None) -> None:
    with pytest.raises(ValueError, match=r"^(preset: unknown 'nothing'; choose one of|steps: must be at least 1)"):
        make_preset(name, steps)


def test_defaults_alone_are_a_valid_part() -> None:
    for cls in (StageConfig, ClusterConfig, OutputConfig):
        assert strict_json.from_json(cls, {}) == cls()


UNUSABLE = {
    "output.mesh_max_faces": ["0", "-1"],
    "output.mesh_threshold": ["-1.0"],
    "output.mesh_lods": ["[8000]", "[8]", "[100, 100]"],
    "output.mesh_formats": ['["obj", "obj"]', '"obj"'],
    "output.mesh_pieces": ["some"],
    "output.roughness": ["1.5"],
    "output.metallic": ["-0.5"],
    "output.preview_px": ["0", "-4"],
    "output.turntable_px": ["0", "-4"],
    "output.turntable_frames": ["0"],
    "output.texture_px": ["0"],
    "output.mesh_resolution": ["0"],
    "cluster.restart_backoff_s": ["-1.0"],
    "prior.image_px": ["-1"],
    "prior.exhibit.supersample": ["0", "-1"],
    "stages.0.scene.grid.num_levels": ["0", "1", "33"],
    "stages.0.scene.grid.log2_table_size": ["3", "40"],
    "stages.0.scene.grid.base_resolution": ["0", "1"],
    "stages.0.scene.grid.max_resolution": ["0", "15"],
    "stages.0.scene.initial_density_radius": ["0.0"],
    "stages.0.scene.lr_grid": ["-1.0"],
    "stages.0.camera.uniform_sphere_probability": ["2.0"],
    "stages.0.losses.orientation": ["-1"],
    "stages.0.branches.0.t_min": ["-1"],
    "stages.0.branches.0.t_max": ["2.5"],
    "stages.0.branches.0.gradient_clip": ["-1"],
    "stages.0.branches.1.t_max": ["2.5"],
    "stages.0.branches.1.geometric_prior.box_every": ["0"],
    "stages.0.branches.1.geometric_prior.text_noise": ["-1.0"],
    "stages.0.branches.1.geometric_prior.denoise_steps": ["0"],
    "stages.0.learner.weight_decay": ["-1.0"],
    "stages.0.learner.warm_up_fits": ["-1"],
    "stages.0.learner.lr_warm_up_steps": ["-1"],
    "stages.0.learner.unet_channels": ["[]", "[0, 0]", "[-16]", "[24, 16]"],
}


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in UNUSABLE for words in UNUSABLE[name]])
def test_what_would_only_fail_later_is_refused_at_once(name: str, words: str) -> None:
    """Found by running one step and the export with every number of a config at its extremes."""
    with pytest.raises(ValueError, match=rf"{name.rpartition('.')[2]}: |max_resolution: must be base_resolution"):
        strict_json.apply_overrides(BASE.with_geometric_prior("embedded"), [f"{name}={words}"])
