"""What a run asks of a cluster, what the cluster has or may come to have, and the wait until the one meets the other.

Ray tells nobody which nodes its autoscaler could start, so whoever sets a cluster up says so in ``NODE_TYPES``.
"""

import json
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import ray
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from raydream.cluster.runtime import Withdrawn
from raydream.cluster.shares import cpu_share, gpu_shares
from raydream.config.cluster import ClusterConfig

NODE_TYPES = "RAYDREAM_NODE_TYPES"
ROLE_LABEL = "raydream/role"  # of nodes, as in cluster.yaml and the KubeRay manifests
_LOOK_EVERY_S = 2.0
_OURS = "raydream-"  # how the names of our placement groups begin
_ROUNDING = 1e-6

Key = tuple[str, int]  # of an actor: role and index
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes alike, each with these resources."""

    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class Cluster:
    """The nodes that are there, and all that may be there at once, by type; none of those where the cluster is as it
    is.
    """

    there: Sequence[Nodes]
    types: Sequence[Nodes] = ()

    @classmethod
    def now(cls) -> "Cluster":
        """That which this process belongs to. ``ValueError`` naming the variable where it says nothing sensible."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        there = [Nodes(node["Resources"], node["Labels"]) for node in alive]
        return cls(there, node_types(os.environ.get(NODE_TYPES, "")))

    def most(self, role: str = "") -> dict[str, float]:
        """The sum of each resource once all nodes are there; only of those labelled with a role where one is named."""
        have, may = (_sum(nodes, role) for nodes in (self.there, self.types))
        return {name: max(have.get(name, 0.0), may.get(name, 0.0)) for name in have | may}

    def each(self, name: str) -> list[Resources]:
        """Every single node that has something of a resource, once all are there."""
        nodes = max(self.there, self.types, key=lambda nodes: _sum(nodes).get(name, 0.0))
        return [alike.resources for alike in nodes for _ in range(alike.count) if alike.resources.get(name, 0.0) > 0]

    def num_held(self, bundle: Resources, role: str) -> int:
        """How many bundles alike the nodes labelled with a role hold once all are there."""
        return max(
            sum(alike.count * _num_in(bundle, alike.resources) for alike in nodes if _is_for(role, alike))
            for nodes in (self.there, self.types)
        )

    @property
    def has(self) -> str:
        """The verb before an amount of its resources."""
        return "can grow to" if self.types else "has"

    def holds(self, bundle: Resources) -> bool:
        """Whether there is, or may be, one node that has all this."""
        return any(_is_within(bundle, nodes.resources) for nodes in (*self.there, *self.types))


def node_types(text: str) -> list[Nodes]:
    """Reads what ``RAYDREAM_NODE_TYPES`` says, in the words of the cluster launcher's ``available_node_types``:

    ``{"NAME": {"resources": {"CPU": 4, "GPU": 1}, "labels": {"raydream/role": "particle"}, "max_workers": 32}}``;
    labels may be left out. Empty means no types. ``ValueError`` where it is anything else.
    """
    try:
        found = json.loads(text or "{}")
        return [
            Nodes(
                {str(name): float(amount) for name, amount in kind["resources"].items()},
                {str(name): str(value) for name, value in kind.get("labels", {}).items()},
                int(kind["max_workers"]),
            )
            for kind in found.values()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{NODE_TYPES}: must be JSON such as "
            '{"gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 8}}, '
            f"got {text!r} ({type(error).__name__}: {error})"
        ) from error


def plan_bundles(config: ClusterConfig, num_particles: int, cluster: Cluster) -> list[dict[str, float]]:
    """What each actor asks for: n particles, then k score replicas.

    Of GPUs and cores that the settings leave open everybody gets a share such that all find a place.
    ``ValueError`` naming the field, and settings that would do, where the cluster can never hold what is asked for.
    """
    counts = (num_particles, config.score_replicas)
    gpus = find_gpu_shares(config, counts, cluster)
    if gpus is None:
        raise ValueError(_too_many_for_gpus(config, counts, cluster))
    share = find_cpu_share(config, counts, cluster, gpus)
    cpus = [share if given < 0 else given for given in (config.cpus_per_particle, config.cpus_per_score)]
    asked = [{"CPU": cpu, "GPU": gpu} for cpu, gpu in zip(cpus, gpus)]
    bundles = [
        {name: amount for name, amount in bundle.items() if amount > 0}
        for bundle, count in zip(asked, counts)
        for _ in range(count)
    ]
    if not all(bundles):
        raise ValueError("cpus_per_particle, cpus_per_score: an actor needs a share of a core or of a GPU")
    need, have = sum(bundle.get("CPU", 0.0) for bundle in bundles), cluster.most().get("CPU", 0.0)
    if need > have + _ROUNDING:
        raise ValueError(
            f"cpus_per_particle: n={counts[0]} particles and {counts[1]} score replicas need {need:g} CPU, the cluster "
            f"{cluster.has} {have:g}; {_instead('cpus', (share, share))}ask for fewer particles, or add nodes"
        )
    _check_nodes(bundles, num_particles, config, cluster)
    return bundles


def find_gpu_shares(config: ClusterConfig, counts: tuple[int, int], cluster: Cluster) -> tuple[float, float] | None:
    """What each of so many particles and score replicas takes of a GPU; None where the settings leave too little."""
    return gpu_shares(*counts, _gpus(config, cluster), *_given_gpus(config))


def find_cpu_share(
    config: ClusterConfig, counts: tuple[int, int], cluster: Cluster, shares: tuple[float, float]
) -> float:
    """What each of so many particles and score replicas, with these shares of a GPU, takes of a core."""
    nodes = _usable(config, cluster, "GPU" if any(shares) else "CPU")
    return cpu_share(*counts, [(node.get("CPU", 0.0), int(node.get("GPU", 0.0))) for node in nodes], shares)


def _usable(config: ClusterConfig, cluster: Cluster, name: str) -> list[Resources]:
    """The nodes with something of a resource among which a run may be spread."""
    nodes = sorted(cluster.each(name), key=lambda node: node[name])
    return nodes[-1:] if config.placement == "STRICT_PACK" else nodes


def _gpus(config: ClusterConfig, cluster: Cluster) -> list[int]:
    return [count for node in _usable(config, cluster, "GPU") if (count := int(node["GPU"]))]


def _given_gpus(config: ClusterConfig) -> list[float | None]:
    return [None if share < 0 else share for share in (config.gpus_per_particle, config.gpus_per_score)]


def _too_many_for_gpus(config: ClusterConfig, counts: tuple[int, int], cluster: Cluster) -> str:
    given, gpus = _given_gpus(config), _gpus(config, cluster)
    field_name = "gpus_per_score" if given[0] is None else "gpus_per_particle"
    each = ["" if share is None else f" of {share:g} GPU" for share in given]
    where = "one node" if config.placement == "STRICT_PACK" else "the cluster"
    return (
        f"{field_name}: n={counts[0]} particles{each[0]} and {counts[1]} score replicas{each[1]} do not fit on the "
        f"{sum(gpus)} GPUs that {where} {cluster.has}; {_instead('gpus', gpu_shares(*counts, gpus))}"
        "ask for fewer particles, or add nodes"
    )


def _instead(resource: str, shares: tuple[float, float] | None) -> str:
    """Settings with which the same run can be placed, where there are any."""
    if shares is None:
        return ""
    names = (f"cluster.{resource}_per_particle", f"cluster.{resource}_per_score")
    return " ".join(f"--set {name}={share:g}" for name, share in zip(names, shares)) + " would do; or "


def workers_on_gpu(device: Literal["auto", "cuda", "cpu"], num_workers: int, cluster: Cluster) -> bool:
    """Whether workers of a training, one core or one GPU each, take GPUs: by themselves where there are any, or may be.

    ``ValueError`` naming ``workers`` where the cluster can never hold them, also where it has GPUs, but too few: a
    training that took to the cores by itself would take weeks and say nothing.
    """
    most = cluster.most()
    on_gpu = device == "cuda" or (device == "auto" and most.get("GPU", 0.0) > 0)
    name = "GPU" if on_gpu else "CPU"
    if num_workers > most.get(name, 0.0) + _ROUNDING:
        instead = ", or --device cpu" if on_gpu and device == "auto" else ""
        raise ValueError(
            f"workers: {num_workers} workers need as many {name}s, the cluster {cluster.has} "
            f"{most.get(name, 0.0):g}; ask for fewer{instead}, or add nodes"
        )
    return on_gpu


def _check_nodes(
    bundles: Sequence[dict[str, float]], num_particles: int, config: ClusterConfig, cluster: Cluster
) -> None:
    """``ValueError`` for what the cluster has in all, but no single node has."""
    if config.placement == "STRICT_PACK":
        asked: dict[str, Resources] = {"placement": _sum([Nodes(bundle) for bundle in bundles])}
    else:
        particle, score = "cpus_per_particle, gpus_per_particle", "cpus_per_score, gpus_per_score"
        asked = {particle: bundles[0], score: bundles[num_particles]}
    for name, bundle in asked.items():
        if not cluster.holds(bundle):
            raise ValueError(
                f"{name}: no node of the cluster, nor any that could be started, has {_words(bundle)}; "
                "ask for less, or add bigger nodes"
            )


def label_selectors(bundles: Mapping[Key, Resources], cluster: Cluster) -> list[dict[str, str]]:
    """On which nodes each bundle may stand: on those labelled with its role where they hold all bundles of that role,
    or will when they are started, else on any.
    """
    asked = {role: [bundle for (of, _), bundle in bundles.items() if of == role] for role, _ in bundles}
    held = {role for role in asked if cluster.num_held(asked[role][0], role) >= len(asked[role])}
    return [{ROLE_LABEL: role} if role in held else {} for role, _ in bundles]


def free_room(cluster: Cluster) -> dict[str, float]:
    """What nobody has of all that the cluster has or may come to have, without what raydream's own runs wait for."""
    have, free = ray.cluster_resources(), ray.available_resources()
    waiting = [
        Nodes(bundle)
        for group in placement_group_table().values()
        if group["state"] == "PENDING" and group["name"].startswith(_OURS)
        for bundle in group["bundles"].values()
    ]
    asked = _sum(waiting)
    return {
        name: most - (have.get(name, 0.0) - free.get(name, 0.0)) - asked.get(name, 0.0)
        for name, most in cluster.most().items()
    }


def reserve(
    bundles: Mapping[Key, dict[str, float]],
    config: ClusterConfig,
    cluster: Cluster,
    on_phase: Callable[[str], None],
    stop: threading.Event,
) -> PlacementGroup:
    """Places for all bundles or for none, as soon as there are any; asking for them starts nodes where an autoscaler
    can.

    ``on_phase`` hears what is waited for. ``ValueError`` when the time is over, ``Withdrawn`` once ``stop`` is set.
    """
    selectors = label_selectors(bundles, cluster) if config.placement != "STRICT_PACK" else []
    group = placement_group(
        list(bundles.values()),
        strategy=config.placement,
        name=f"{_OURS}{uuid.uuid4().hex[:12]}",
        bundle_label_selector=selectors if any(selectors) else None,
    )
    with ExitStack() as stack:
        stack.callback(remove_placement_group, group)
        _wait(group, list(bundles.values()), config, cluster, on_phase, stop)
        stack.pop_all()
    return group


def _wait(
    group: PlacementGroup,
    bundles: Sequence[Resources],
    config: ClusterConfig,
    cluster: Cluster,
    on_phase: Callable[[str], None],
    stop: threading.Event,
) -> None:
    name = "nodes_timeout_s" if cluster.types else "placement_timeout_s"
    limit_s: float = getattr(config, name)
    deadline, said = time.monotonic() + limit_s, ""
    while not group.wait(min(_LOOK_EVERY_S, limit_s)):
        if stop.is_set():
            raise Withdrawn
        status = get_cluster_status(ray.get_runtime_context().gcs_address) if cluster.types else ClusterStatus()
        if time.monotonic() > deadline:
            failures = [launch.details for launch in status.failed_launches if launch.details]
            why = f"; the autoscaler says: {failures[-1]}" if failures else ""
            raise ValueError(
                f"{name}: could not place {len(bundles)} actors ({_words(bundles[0])} each, {config.placement}) "
                f"within {limit_s:.0f} s{why}; see `ray status`, wait for nodes, or ask for less"
            )
        message = waiting_for(_sum([Nodes(bundle) for bundle in bundles]), ray.available_resources(), status)
        if message != said:
            on_phase(message)
            said = message


def waiting_for(asked: Resources, free: Resources, status: ClusterStatus) -> str:
    """For the person who waits: "waiting for 9 GPUs: 3 free, 6 nodes starting"."""
    name = "GPU" if asked.get("GPU") else "CPU"
    num_starting = len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)
    starting = {0: "", 1: ", 1 node starting"}.get(num_starting, f", {num_starting} nodes starting")
    return f"waiting for {asked[name]:g} {name}s: {free.get(name, 0.0):g} free{starting}"


def _sum(nodes: Sequence[Nodes], role: str = "") -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for alike in nodes:
        if _is_for(role, alike):
            for name, amount in alike.resources.items():
                total[name] += alike.count * amount
    return dict(total)


def _is_for(role: str, nodes: Nodes) -> bool:
    return not role or nodes.labels.get(ROLE_LABEL) == role


def _num_in(bundle: Resources, node: Resources) -> int:
    """How many bundles alike a node holds; a fraction of a GPU lies on one GPU."""
    counts = [int(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in bundle.items()]
    share = bundle.get("GPU", 1.0)
    return min(counts) if share >= 1 else min(*counts, int(node.get("GPU", 0.0)) * int(1 / share + _ROUNDING))


def _is_within(asked: Resources, have: Resources) -> bool:
    return all(amount <= have.get(name, 0.0) + _ROUNDING for name, amount in asked.items())


def _words(bundle: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
