"""The plan of a run in words, and the refusal of one that no memory holds."""

import dataclasses

import pytest

from raydream.cluster.gpus import Load, Need, plan_in_words, plan_on_own_gpu
from raydream.cluster.placement import Cluster, Key, Nodes, plan_bundles
from raydream.config.cluster import Budget, ClusterConfig

# with 0.8 GiB for a process a particle takes 16, a score model 12
NEED = Need(Budget(), particle=Load(held=1.2, peak=14.0), score=Load(held=3.2, peak=8.0))


def node(gpus: int, kind: str = "H100") -> Nodes:
    return Nodes({"CPU": 64.0, "GPU": float(gpus), f"accelerator_type:{kind}": 1.0})


def words(n: int, cluster: Cluster, need: Need | None = NEED, replicas: int = 1, share: float = -1.0) -> str:
    bundles = plan_bundles(ClusterConfig(score_replicas=replicas, gpus_per_particle=share), n, cluster)
    keys: list[Key] = [("particle", i) for i in range(n)] + [("score", i) for i in range(replicas)]
    return plan_in_words(dict(zip(keys, bundles)), cluster, [need] if need else [])[0]


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
    need = Need(Budget(), Load.of(2 * 2**30, 8 * 2**30), Load.of(0, 0))
    assert need.together(1, 0) == pytest.approx(12.3)
    assert need.together(3, 1) == pytest.approx(3 * 12.3 + 0.8)
    assert need.together(3, 1, in_one_process=True) == pytest.approx(3 * 11.5 + 0.8)


def test_who_has_a_gpu_alone_shares_its_memory_with_nobody() -> None:
    said = words(8, Cluster([node(5)]), share=0.5)
    assert said.endswith("on 5 x H100: 2 particles or 1 score model on a GPU, 32 of 79 GiB")


ONE_VIEW = dataclasses.replace(NEED, budget=Budget(1), score=Load(3.2, 1.0))
AGAIN = dataclasses.replace(NEED, budget=Budget(0, True))
BOTH = dataclasses.replace(ONE_VIEW, budget=Budget(1, True))
NEEDS = [NEED, ONE_VIEW, AGAIN, BOTH]


@pytest.mark.parametrize(
    ("kind", "n", "needs", "budget", "plan"),
    [
        ("H100", 4, NEEDS, NEED.budget, "4 particles and 1 score model on the fullest GPU, 76 of 79 GiB"),
        # 4 particles with their graphs, and what a score model takes for one view
        ("H100", 4, [*NEEDS[1:]], Budget(1), "1 score model on the fullest GPU, 1 view at a time: 69 of 79 GiB"),
        # 8 x 1.2 + 3.2 stay, 9 processes, and one graph of a particle, which is larger than the score model's
        ("A100", 8, NEEDS, Budget(0, True), "GPU, one particle's graph at a time: 34 of 39 GiB"),
        ("A100", 8, [BOTH], Budget(1, True), "GPU, 1 view at a time, one particle's graph at a time: 34 of 39 GiB"),
        ("XYZ", 8, NEEDS, Budget(), "on 1 x XYZ: 8 particles and 1 score model on the fullest GPU"),
        ("H100", 8, [], None, "on 1 x H100: 8 particles and 1 score model on the fullest GPU"),
    ],
)
def test_the_first_budget_that_the_card_holds_is_taken(
    kind: str, n: int, needs: list[Need], budget: Budget | None, plan: str
) -> None:
    cluster, keys = Cluster([node(1, kind)]), [("particle", i) for i in range(n)] + [("score", 0)]
    said, found = plan_in_words(dict(zip(keys, plan_bundles(ClusterConfig(), n, cluster))), cluster, needs)
    assert said.endswith(plan)
    assert found == budget


def test_what_no_budget_fits_is_refused_by_the_most_frugal() -> None:
    cluster, keys = Cluster([node(1, "L4")]), [("particle", i) for i in range(8)] + [("score", 0)]
    bundles = dict(zip(keys, plan_bundles(ClusterConfig(), 8, cluster)))
    with pytest.raises(
        ValueError, match=r"^n: .*, 1 view at a time, one particle's graph .* need 34 GiB .*--n 2 would"
    ):
        plan_in_words(bundles, cluster, NEEDS)


def test_one_process_on_its_own_gpu_takes_the_first_budget_too() -> None:
    said, budget = plan_on_own_gpu(8, 1, NEEDS, 28.4)
    assert said == (
        "8 particles and 1 score model in one process on its GPU, one particle's graph at a time: 28 of 28 GiB"
    )
    assert budget == Budget(0, True)
    assert plan_on_own_gpu(1, 1, NEEDS, 28.4)[1] == Budget()
    with pytest.raises(ValueError, match=r"^n: 8 particles .* need 28 GiB on one of 1 GPU of 20 GiB; --n 1 would fit"):
        plan_on_own_gpu(8, 1, NEEDS, 20.0)


def test_settings_narrow_the_choice_of_budgets() -> None:
    free = ClusterConfig().budgets(6)
    assert free == [Budget(k, again) for again in (False, True) for k in (0, 4, 2, 1)]
    assert ClusterConfig(renders="kept").budgets(2) == [Budget(), Budget(1)]
    assert ClusterConfig(views_at_once=3).budgets(6) == [Budget(3), Budget(3, True)]
    within = ClusterConfig().within(Budget(2, True))
    assert within == ClusterConfig(views_at_once=2, renders="again")
    assert within.budgets(6) == [Budget(2, True)], "what is decided is decided"
