"""What actors ask for, of which nodes, and what a cluster has, or may come to have, for them."""

from typing import Any, Literal

import pytest
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo

from raydream.cluster.placement import (
    ROLE_LABEL,
    Cluster,
    Nodes,
    label_selectors,
    node_types,
    plan_bundles,
    waiting_for,
    workers_on_gpu,
)
from raydream.config.cluster import ClusterConfig

POOLS = """{
  "head": {"resources": {"CPU": 0}, "max_workers": 0},
  "particle": {"resources": {"CPU": 4, "GPU": 1}, "labels": {"raydream/role": "particle"}, "max_workers": 8},
  "score": {"resources": {"CPU": 8, "GPU": 1}, "labels": {"raydream/role": "score"}, "max_workers": 1}
}"""
GROWING = Cluster([Nodes({"node:10.0.0.1": 1.0})], node_types(POOLS))


def one_node(**resources: int) -> Cluster:
    return Cluster([Nodes({name: float(amount) for name, amount in resources.items()})])


# --- what actors ask for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "n", "cluster", "particle", "score"),
    [
        ({}, 2, one_node(CPU=8), {"CPU": 1.0}, {"CPU": 1.0}),
        ({}, 8, one_node(CPU=2), {"CPU": 0.22}, {"CPU": 0.22}),
        ({}, 8, one_node(CPU=64, GPU=9), {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}),
        ({"gpus_per_particle": 0.5}, 8, one_node(CPU=9, GPU=5), {"CPU": 1.0, "GPU": 0.5}, {"CPU": 1.0, "GPU": 1.0}),
        ({"gpus_per_particle": 0.0, "gpus_per_score": 0.0}, 3, one_node(CPU=4, GPU=1), {"CPU": 1.0}, {"CPU": 1.0}),
        ({"cpus_per_particle": 2.0}, 2, one_node(CPU=5), {"CPU": 2.0}, {"CPU": 1.0}),
        ({"cpus_per_particle": 0.0}, 2, one_node(CPU=4, GPU=3), {"GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}),
        ({}, 8, GROWING, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}),
        ({"cpus_per_score": 8.0}, 1, GROWING, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}),
        ({}, 8, one_node(CPU=64, GPU=8), {"CPU": 1.0, "GPU": 0.8889}, {"CPU": 1.0, "GPU": 0.1111}),
        ({}, 8, one_node(CPU=64, GPU=4), {"CPU": 1.0, "GPU": 0.4445}, {"CPU": 1.0, "GPU": 0.111}),
        ({}, 8, one_node(CPU=4, GPU=1), {"CPU": 0.44, "GPU": 0.1112}, {"CPU": 0.44, "GPU": 0.1104}),
        ({}, 9, GROWING, {"CPU": 1.0, "GPU": 0.5001}, {"CPU": 1.0, "GPU": 0.4999}),
        ({"gpus_per_particle": 0.6}, 8, one_node(CPU=9, GPU=8), {"CPU": 1.0, "GPU": 0.6}, {"CPU": 1.0, "GPU": 0.4}),
        ({"gpus_per_score": 0.4}, 8, one_node(CPU=9, GPU=8), {"CPU": 1.0, "GPU": 0.6}, {"CPU": 1.0, "GPU": 0.4}),
        ({"gpus_per_score": 1.0}, 2, one_node(CPU=9, GPU=3), {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}),
        ({"placement": "STRICT_PACK"}, 1, GROWING, {"CPU": 1.0, "GPU": 0.5001}, {"CPU": 1.0, "GPU": 0.4999}),
        ({}, 8, Cluster([Nodes({"CPU": 4.0}, count=2)]), {"CPU": 0.8}, {"CPU": 0.8}),
    ],
)
def test_what_actors_ask_for(settings: dict[str, Any], n: int, cluster: Cluster, particle: Any, score: Any) -> None:
    assert plan_bundles(ClusterConfig(**settings), n, cluster) == [particle] * n + [score]


def test_each_replica_has_a_bundle() -> None:
    assert plan_bundles(ClusterConfig(score_replicas=2), 2, one_node(CPU=2)) == [{"CPU": 0.5}] * 4


@pytest.mark.parametrize(
    ("settings", "n", "cluster", "error"),
    [
        (
            {"gpus_per_particle": 1.0},
            8,
            one_node(CPU=64, GPU=4),
            "^gpus_per_particle: n=8 particles of 1 GPU and 1 score replicas do not fit on the 4 GPUs that the cluster "
            "has; --set cluster.gpus_per_particle=0.4445 --set cluster.gpus_per_score=0.111 would do; or ask for fewer",
        ),
        ({"gpus_per_particle": 1.0}, 1, one_node(CPU=4), "on the 0 GPUs that .*; --set cluster.gpus_per_particle=0 "),
        ({"gpus_per_particle": 0.6, "gpus_per_score": 0.6}, 8, one_node(CPU=64, GPU=8), "0.6 GPU do not fit on the 8"),
        ({"gpus_per_score": 1.0}, 8, one_node(CPU=64, GPU=8), "^gpus_per_score: .* do not fit on the 8 GPUs"),
        (
            {"cpus_per_particle": 2.0},
            2,
            one_node(CPU=4),
            "^cpus_per_particle: .* need 5 CPU, .* has 4; --set cluster.cpus_per_particle=1 --set cluster.cpus",
        ),
        ({"cpus_per_particle": 0.0}, 2, one_node(CPU=4), "^cpus_per_particle, cpus_per_score: an actor needs a share"),
        ({"gpus_per_particle": 1.0}, 9, GROWING, "^gpus_per_particle: .* do not fit on the 9 GPUs .* can grow to;"),
        ({"cpus_per_particle": 9.0}, 1, GROWING, "^cpus_per_particle, .*: no node .* started, has 9 CPU, 1 GPU; ask"),
        ({"gpus_per_score": 2.0}, 1, GROWING, "^gpus_per_score: .* 1 score replicas of 2 GPU do not fit"),
        (
            {"placement": "STRICT_PACK", "gpus_per_particle": 1.0},
            1,
            GROWING,
            "^gpus_per_particle: .* do not fit on the 1 GPUs that one node can grow to;",
        ),
        ({"placement": "STRICT_PACK", "cpus_per_score": 9.0}, 1, one_node(CPU=9), "^cpus_per_particle: .* need 10 CPU"),
    ],
)
def test_what_no_cluster_can_hold_is_refused_by_name(
    settings: dict[str, Any], n: int, cluster: Cluster, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        plan_bundles(ClusterConfig(**settings), n, cluster)


# --- what a cluster may come to have ----------------------------------------------------------------------------------


def test_a_cluster_has_what_is_there_or_all_that_may_be_there() -> None:
    particles = Nodes({"CPU": 4.0, "GPU": 1.0}, {ROLE_LABEL: "particle"}, 3)
    assert Cluster([particles]).most() == {"CPU": 12.0, "GPU": 3.0}
    growing = Cluster([particles, Nodes({"CPU": 99.0})], GROWING.types)
    assert growing.most() == {"CPU": 111.0, "GPU": 9.0}, "three of the eight are there already"
    assert growing.most("particle") == {"CPU": 32.0, "GPU": 8.0}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 1}', '{"a": {"resources": {"GPU": 1}}}', '{"a": {"resources": "GPU", "max_workers": 1}}']
)
def test_types_that_say_nothing_sensible_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^RAYDREAM_NODE_TYPES: must be JSON such as .*, got "):
        node_types(text)


def test_where_nothing_is_said_nothing_can_be_started() -> None:
    assert node_types("") == []


def test_a_training_takes_gpus_where_there_are_any_or_may_be() -> None:
    assert not workers_on_gpu("auto", 4, one_node(CPU=4))
    assert workers_on_gpu("auto", 2, one_node(CPU=4, GPU=2))
    assert not workers_on_gpu("cpu", 2, one_node(CPU=4, GPU=2))
    assert workers_on_gpu("auto", 9, GROWING), "no node is there yet"


@pytest.mark.parametrize(
    ("device", "workers", "cluster", "error"),
    [
        ("auto", 5, one_node(CPU=4), "need as many CPUs, the cluster has 4; ask for fewer, or add nodes"),
        ("auto", 3, one_node(CPU=9, GPU=2), "as many GPUs, the cluster has 2; ask for fewer, or --device cpu, or"),
        ("cuda", 1, one_node(CPU=9), "as many GPUs, the cluster has 0; ask for fewer, or add"),
        ("cuda", 10, GROWING, "10 workers need as many GPUs, the cluster can grow to 9"),
    ],
)
def test_a_training_that_no_cluster_can_hold_is_refused(
    device: Literal["auto", "cuda"], workers: int, cluster: Cluster, error: str
) -> None:
    with pytest.raises(ValueError, match=f"^workers: .*{error}"):
        workers_on_gpu(device, workers, cluster)


# --- on which nodes ---------------------------------------------------------------------------------------------------

BUNDLES = {
    ("particle", 0): {"CPU": 1.0, "GPU": 1.0},
    ("particle", 1): {"CPU": 1.0, "GPU": 1.0},
    ("score", 0): {"CPU": 2.0},
}
NOWHERE: list[dict[str, str]] = [{}, {}, {}]


def node(role: str, num_gpus: float) -> Nodes:
    return Nodes({"CPU": 4.0, "GPU": num_gpus}, {"ray.io/node-id": "7"} | ({ROLE_LABEL: role} if role else {}))


def test_bundles_go_where_their_role_is_at_home() -> None:
    on_particle, on_score = {ROLE_LABEL: "particle"}, {ROLE_LABEL: "score"}
    nodes = [node("head", 0), node("particle", 1), node("particle", 1), node("score", 1)]
    assert label_selectors(BUNDLES, Cluster(nodes)) == [on_particle, on_particle, on_score]
    assert label_selectors(BUNDLES, Cluster(nodes[:3])) == [on_particle, on_particle, {}], "no node is for scores"
    assert label_selectors({("score", 0): {"CPU": 2.0}}, Cluster(nodes)) == [on_score]
    assert label_selectors(BUNDLES, GROWING) == [on_particle, on_particle, on_score]


def test_without_labels_or_without_room_there_any_node_will_do() -> None:
    assert label_selectors(BUNDLES, Cluster([node("", 8)])) == NOWHERE
    assert label_selectors(BUNDLES, Cluster([node("render", 8)])) == NOWHERE
    assert label_selectors(BUNDLES, Cluster([node("particle", 1), node("", 8)])) == NOWHERE


def test_a_fraction_lies_on_one_gpu() -> None:
    """Nine of two thirds are six GPUs by their sum, and need nine."""
    bundles = {("particle", i): {"CPU": 1.0, "GPU": 0.6667} for i in range(9)}
    assert label_selectors(bundles, GROWING) == [{}] * 9
    assert label_selectors({key: bundles[key] for key in list(bundles)[:8]}, GROWING)[0] == {ROLE_LABEL: "particle"}


# --- what the person who waits is told --------------------------------------------------------------------------------


def test_the_wait_is_told_in_words() -> None:
    node = NodeInfo("", "particle", "", "")
    launch = LaunchRequest("", "particle", 4, LaunchRequest.Status.PENDING, 0)
    asked, free = {"CPU": 9.0, "GPU": 9.0}, {"CPU": 16.0, "GPU": 3.0}
    assert waiting_for({"CPU": 3.0}, {}, ClusterStatus()) == "waiting for 3 CPUs: 0 free"
    assert waiting_for(asked, free, ClusterStatus()) == "waiting for 9 GPUs: 3 free"
    one, several = ClusterStatus(pending_nodes=[node]), ClusterStatus(pending_nodes=[node], pending_launches=[launch])
    assert waiting_for(asked, free, one) == "waiting for 9 GPUs: 3 free, 1 node starting"
    assert waiting_for(asked, free, several) == "waiting for 9 GPUs: 3 free, 5 nodes starting"
