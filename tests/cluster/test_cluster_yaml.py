"""What the deployment files promise, checked offline: by Ray's own schemas, and by our own rules where Ray has none."""

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from raydream.cli import parse
from raydream.cluster.placement import NODE_TYPES, Cluster, node_types
from raydream.console import gpu

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "serve" / "kuberay"
MANIFESTS = {"ray-service.yaml": "rayClusterConfig", "ray-job.yaml": "rayClusterSpec"}


def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text(encoding="utf-8")))


def ray_cluster(name: str) -> dict[str, Any]:
    return documents(name)[0]["spec"][MANIFESTS[name]]


def groups(name: str) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in ray_cluster(name)["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def requirement() -> str:
    """The Ray that pyproject.toml asks for, as "2.60"."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = [re.match(r"ray\[[^]]*\]>=(\d+\.\d+)", line) for line in dependencies]
    return next(match[1] for match in found if match)


# --- Ray's cluster launcher -------------------------------------------------------------------------------------------


def test_ray_accepts_the_cluster() -> None:
    validate_config(prepare_config(cluster()))


@pytest.mark.parametrize("mistake", [{"max_nodes": 1}, {"head_node_type": "nobody"}, {"max_workers": "many"}])
def test_rays_check_can_fail(mistake: dict[str, Any]) -> None:
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config(cluster() | mistake))


def test_the_pools_are_those_that_raydream_needs() -> None:
    """Ray's schema looks into none of this: it lets a minimum above the maximum pass."""
    found = cluster()
    types = found["available_node_types"]
    head = types.pop(found["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}, "no actor belongs on the head"
    assert "InstanceMarketOptions" not in head["node_config"], "the head is not for sale"
    assert all(0 <= pool["min_workers"] <= pool["max_workers"] <= found["max_workers"] for pool in types.values())
    assert {pool["labels"]["raydream/role"] for pool in types.values()} == {"particle", "score", "render"}
    gpus = {name: pool["resources"]["GPU"] for name, pool in types.items()}
    assert gpus == {"particle_spot": 1, "particle_on_demand": 1, "score": 1, "render_spot": 0}


def test_spot_machines_have_a_substitute_at_full_price() -> None:
    types = cluster()["available_node_types"]
    spot, full = types["particle_spot"], types["particle_on_demand"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot.pop("priority") > full.pop("priority")
    assert spot == full, "they differ in nothing but the price, so the autoscaler may take either"


@pytest.mark.parametrize("page", ["cluster.yaml", "docs/cluster.md"])
def test_who_sets_nodes_up_reads_of_drivers_what_the_doctor_says(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").replace("# ", "").split())
    newest, oldest = gpu._LEAST_DRIVER["13"], gpu._LEAST_DRIVER["12"]
    assert f"NVIDIA driver of {newest} or newer" in text
    assert re.search(rf"of {oldest} to {newest - 1}.*whl/{gpu._OLDER_WHEEL}", text)
    assert "nvidia-cuda-mps-control -d" in text


def test_runs_are_told_which_nodes_could_be_started() -> None:
    """What the machines' containers find in their environment, after the shell and Docker have read it."""
    found = cluster()
    name = found["docker"]["container_name"]
    commands = [
        docker_start_cmds("ubuntu", image, {}, name, found["docker"]["run_options"], "raydream", "/root", "docker")
        for image in ("head", "worker")
    ]
    types = {
        name: {field: kind[field] for field in ("resources", "labels", "max_workers")}
        for name, kind in found["available_node_types"].items()
        if name != found["head_node_type"]
    }
    for command in commands:
        words = shlex.split(command)
        given = dict(words[place + 1].split("=", 1) for place, word in enumerate(words) if word == "--env")
        assert json.loads(given[NODE_TYPES]) == types
        assert given["RAY_enable_autoscaler_v2"] == "1", "priorities and labels count for that one only"
    assert Cluster([], node_types(given[NODE_TYPES])).most("particle") == {"CPU": 256.0, "GPU": 64.0}


def test_strangers_find_the_cluster_closed() -> None:
    found = cluster()
    assert found["provider"]["use_internal_ips"]
    assert "security_group" not in found["provider"], "a group that Ray makes opens SSH to the world"
    assert all(pool["node_config"]["SecurityGroupIds"] for pool in found["available_node_types"].values())
    assert "--env RAY_AUTH_MODE=token" in found["docker"]["run_options"]
    assert "~/.ray/auth_token" in found["file_mounts"]
    start = " ".join(found["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_the_images_are_of_the_ray_that_is_asked_for() -> None:
    assert ray.__version__.startswith(f"{requirement()}.")
    named = re.findall(r"rayproject/ray:(\d+\.\d+)\.\d+-py311", (ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    named += re.findall(r"^FROM rayproject/ray:(\d+\.\d+)\.", (KUBERAY / "Dockerfile").read_text(), re.MULTILINE)
    assert named == [requirement()] * 3
    assert all(ray_cluster(name)["rayVersion"].startswith(f"{requirement()}.") for name in MANIFESTS)


def test_what_the_image_copies_exists() -> None:
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (KUBERAY / "Dockerfile").read_text(), re.MULTILINE)
    assert len(copied) == 4
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name


# --- KubeRay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("ray-service.yaml", "RayService"), ("ray-job.yaml", "RayJob")])
def test_a_manifest_is_whole(name: str, kind: str) -> None:
    manifest, policy = documents(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    spec = ray_cluster(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no actor belongs on the head"
    assert len(groups(name)) == len(spec["workerGroupSpecs"]), "group names are unique"
    everybody = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in everybody:
        limits = container(group)["resources"]
        assert limits["requests"] == limits["limits"], "Ray plans with its limits, so they must be there"
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            "the operator takes texts only"
        )
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container(group)["volumeMounts"]} == volumes
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        assert not container(group)["securityContext"]["allowPrivilegeEscalation"]
        assert group["template"]["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
    for group in groups(name).values():
        assert 0 <= group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]
        assert container(group)["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", MANIFESTS)
def test_runs_are_told_which_pods_could_be_started(name: str) -> None:
    def resources(group: dict[str, Any]) -> dict[str, int]:
        limits = container(group)["resources"]["limits"]
        return {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])}

    types = {
        group["groupName"]: {
            "resources": resources(group), "labels": group["labels"], "max_workers": group["maxReplicas"]
        }
        for group in ray_cluster(name)["workerGroupSpecs"]
    }  # fmt: skip
    for group in (ray_cluster(name)["headGroupSpec"], *groups(name).values()):
        given = {variable["name"]: variable.get("value") for variable in container(group)["env"]}
        assert json.loads(given[NODE_TYPES] or "") == types


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_the_service_is_open(name: str) -> None:
    policy = documents(name)[1]
    assert ray_cluster(name)["authOptions"] == {"mode": "token"}
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    to_all = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert to_all == ([[{"port": 8000, "protocol": "TCP"}]] if name == "ray-service.yaml" else [])


def test_particles_on_spot_have_a_substitute() -> None:
    found = groups("ray-service.yaml")
    assert found.keys() == {"particle-spot", "particle", "score"}
    assert found["particle-spot"]["priority"] > found["score"]["priority"] > found["particle"]["priority"]
    assert container(found["particle-spot"]) == container(found["particle"])
    selectors = [found[name]["template"]["spec"]["nodeSelector"] for name in ("particle-spot", "particle")]
    assert selectors[0] != selectors[1]


def test_serve_accepts_its_part_and_the_service_its_settings() -> None:
    config = yaml.safe_load(documents("ray-service.yaml")[0]["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    application = schema.applications[0]
    module, attribute = application.import_path.split(":")
    assert importlib.util.find_spec(module) is not None
    settings = pytest.importorskip("serve.settings")
    given = {settings.PREFIX + name.upper(): value for name, value in application.args.items()}
    from_secret = {variable["name"] for variable in container(ray_cluster("ray-service.yaml")["headGroupSpec"])["env"]}
    assert settings.PREFIX + "DATABASE" in from_secret
    assert settings.Settings.from_environment(given | {settings.PREFIX + "DATABASE": "sqlite://"}).max_n == 8
    assert attribute == "app"


def test_the_jobs_command_is_one_that_the_main_job_takes() -> None:
    words = shlex.split(documents("ray-job.yaml")[0]["spec"]["entrypoint"])
    assert words[:2] == ["bash", "-c"]
    assert len(words) == 3, "the operator puts the line into a script of its own"
    script = words[2].replace("$RUN", "/data/runs/chair")
    resumed, fresh = [shlex.split(call) for call in re.findall(r"python jobs/vsd_particles\.py ([^\n;]+)", script)]
    request = parse("", fresh)
    assert resumed == ["--resume", request.out]
    needed = groups("ray-job.yaml")["particle"]["replicas"]
    assert request.config.n == needed, "as many machines as particles, or the job waits for ever"
    assert request.config.cluster.score_replicas == groups("ray-job.yaml")["score"]["replicas"]
