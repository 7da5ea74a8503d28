"""The plan of a run in words, and the refusal of one that no memory holds."""

import pytest

from raydream.cluster.gpus import Need, plan_in_words
from raydream.cluster.placement import Cluster, Key, Nodes, plan_bundles
from raydream.config.cluster import ClusterConfig

NEED = Need(particle=16.0, score=12.0)


def node(gpus: int, kind: str = "H100") -> Nodes:
    return Nodes({"CPU": 64.0, "GPU": float(gpus), f"accelerator_type:{kind}": 1.0})


def words(n: int, cluster: Cluster, need: Need | None = NEED, replicas: int = 1, share: float = -1.0) -> str:
    bundles = plan_bundles(ClusterConfig(score_replicas=replicas, gpus_per_particle=share), n, cluster)
    keys: list[Key] = [("particle", i) for i in range(n)] + [("score", i) for i in range(replicas)]
    return plan_in_words(dict(zip(keys, bundles)), cluster, need)


@pytest.mark.parametrize(
    ("n", "replicas", "nodes", "plan"),
    [
        (8, 1, [node(9)], "and 1 score model on 9 x H100: one GPU each, 16 of 79 GiB"),
        (8, 1, [node(8)], "on 8 x H100: 1 particle and 1 score model on the fullest GPU, 28 of 79 GiB"),
        (8, 8, [node(4), node(4)], "on 8 x H100: 1 particle and 1 score model on the fullest GPU, 28 of 79 GiB"),
        (8, 1, [node(4)], "on 4 x H100: 2 particles and 1 score model on the fullest GPU, 44 of 79 GiB"),
        (4, 1, [node(1)], "on 1 x H100: 4 particles and 1 score model on the fullest GPU, 76 of 79 GiB"),
        (
            2,
            1,
            [node(1), node(1, "L40S")],
            "H100/L40S: 1 particle and 1 score model on the fullest GPU, 28 of 44 GiB",
        ),
        (2, 1, [node(1, "XYZ")], "on 1 x XYZ: 2 particles and 1 score model on the fullest GPU"),
        (2, 1, [Nodes({"CPU": 2.0})], "2 particles and 1 score model on CPU cores, 0.66 for a particle"),
    ],
)
def test_a_plan_says_what_goes_where(n: int, replicas: int, nodes: list[Nodes], plan: str) -> None:
    said = words(n, Cluster(nodes), replicas=replicas)
    assert said.endswith(plan)


def test_where_nobody_knows_what_actors_need_nothing_is_said_of_memory() -> None:
    assert "GiB" not in words(8, Cluster([node(8)]), need=None)


def test_what_no_gpu_holds_is_refused_with_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"^n: 8 particles of 16.0 GiB .* need 140 GiB .* 1 GPU of 79 .*--n 4 w"):
        words(8, Cluster([node(1)]))
    with pytest.raises(ValueError, match=r"^n: .* need 28 GiB on one of 2 GPUs of 15 GiB; lower stages.0.camera.ima"):
        words(2, Cluster([node(2, "T4")]))
    assert "need" not in words(4, Cluster([node(1)]))


def test_a_process_takes_more_than_its_tensors() -> None:
    need = Need.of(10 * 2**30, 0)
    assert (need.particle, need.score) == pytest.approx((12.3, 0.8))


def test_who_has_a_gpu_alone_shares_its_memory_with_nobody() -> None:
    said = words(8, Cluster([node(5)]), share=0.5)
    assert said.endswith("on 5 x H100: 2 particles or 1 score model on a GPU, 32 of 79 GiB")
