"""Every number of particles finds its places on every number of GPUs: by reckoning, and on Ray itself."""

import itertools
import math
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raydream.cluster.placement import Cluster, Nodes, plan_bundles, reserve
from raydream.cluster.shares import _can_be_placed, cpu_share, gpu_shares
from raydream.config.cluster import ClusterConfig
from raydream.config.presets import make_preset
from raydream.config.run import RunConfig, cluster_config
from raydream.config.strict_json import apply_overrides

LAYOUTS = ([1], [2], [4], [8], [9], [16], [4, 4], [8, 8, 8], [1] * 8, [1] * 9, [1, 3], [2, 4, 8])


def most_of(share: float, gpus: int) -> int:
    """How many actors a node with so many GPUs takes by their sum, which is how Ray chooses it. It counts in whole
    ten-thousandths and cuts off what a float is short of one: to it 0.3334 is 3,333 of them.
    """
    return int(gpus * 10_000) // int(share * 10_000)


def spread(num_gpus: int, num_nodes: int) -> list[int]:
    return [num_gpus // num_nodes + (node < num_gpus % num_nodes) for node in range(num_nodes)]


# --- by reckoning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", LAYOUTS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 16, 17, 64])
def test_every_n_fits_and_no_gpu_gets_more_particles_than_it_must(n: int, gpus: list[int]) -> None:
    for replicas in {1, 2, n}:
        if replicas > n:
            continue
        found = gpu_shares(n, replicas, gpus)
        assert found is not None
        particle, score = found
        a, b = math.ceil(n / sum(gpus)), math.ceil(replicas / sum(gpus))
        if n + replicas <= sum(gpus):
            assert found == (1.0, 1.0)
            continue
        assert a * particle + b * score <= 1 + 1e-9, "a GPU holds its particles and its score models"
        assert (a + 1) * particle > 1, "and no more of them"
        for count in gpus:  # Ray must not take a node for one that has room where none of its GPUs has
            assert most_of(particle, count) == a * count
            rest = count - a * count * particle
            assert int((rest + 5e-5 * count) / score) >= b * count


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_gpus", [0, 1, 2, 3, 4, 8, 9, 16])
def test_however_ray_fills_nodes_by_their_sums_single_gpus_can_hold_it(num_gpus: int, num_nodes: int) -> None:
    """1 to 16 particles, 512 cases in all; Ray itself is asked about 32 of them below."""
    gpus = [count for count in spread(num_gpus, num_nodes) if count]
    for n in range(1, 17):
        found = gpu_shares(n, 1, gpus)
        assert found is not None
        particle, score = found
        if not num_gpus:
            assert found == (0.0, 0.0)
            continue
        each, free = math.ceil(n / num_gpus), 0
        for count in gpus:  # whatever else stands there
            most = most_of(particle, count)
            assert most <= count * int(1 / particle + 1e-9), "as many by their sum as by single GPUs"
            if n + 1 > num_gpus:
                assert most == each * count
            left = count * 10_000 - min(n, most) * int(particle * 10_000)
            free += left // int(score * 10_000)
        assert sum(most_of(particle, count) for count in gpus) >= n
        assert free + (n + 1 <= num_gpus) >= 1, "the score model finds a place"


@pytest.mark.parametrize(("n", "replicas"), [(1, 1), (8, 1), (8, 8), (9, 2), (64, 1)])
def test_every_n_fits_on_every_number_of_cores(n: int, replicas: int) -> None:
    for cpus in ([1.0], [2.0], [64.0], [4.0, 4.0], [1.0, 3.0, 16.0]):
        share = cpu_share(n, replicas, [(count, 0) for count in cpus], (0.0, 0.0))
        assert 0 < share <= 1
        assert sum(int(count / share + 1e-9) for count in cpus) >= n + replicas


def test_a_node_has_cores_for_all_that_stand_on_its_gpus() -> None:
    small, large = (2.0, 4), (64.0, 4)
    shares = gpu_shares(8, 1, [4, 4])
    assert shares is not None
    assert cpu_share(8, 1, [small, large], shares) == 0.4, "four particles and the score model on two cores"
    assert cpu_share(8, 1, [(64.0, 0), (4.0, 1)], (0.1125, 0.1)) == 0.44, "cores without a GPU are no help"


@pytest.mark.parametrize(
    ("settings", "takes_gpus"),
    [
        (["preset=exhibit"], False),
        (["preset=embedded"], False),
        (["preset=embedded", "prior.source=/models/own"], True),
        (["preset=embedded", "stages.0.branches.1.geometric_prior.source=/models/agp"], True),
        (["preset=exhibit", "cluster.kernels=cuda"], True),
        (["preset=exhibit", "cluster.kernels=nerfacc"], True),
        (["preset=exhibit", "cluster.kernels=ours"], False),
        (["preset=exhibit", "cluster.gpus_per_particle=0.5"], True),
        (["preset=exhibit", "cluster.gpus_per_score=1"], True),
        (["preset=sd21"], True),
        (["preset=sd21", "cluster.gpus_per_particle=0", "cluster.gpus_per_score=0"], False),
    ],
)
def test_what_is_quick_on_cores_takes_no_gpu_by_itself(settings: list[str], takes_gpus: bool) -> None:
    run: RunConfig = apply_overrides(make_preset(settings[0].removeprefix("preset="), 10), [*settings[1:], "n=2"])
    bundles = plan_bundles(cluster_config(run), run.n, Cluster([Nodes({"CPU": 8.0, "GPU": 8.0})]))
    assert any("GPU" in bundle for bundle in bundles) == takes_gpus


# --- on Ray -----------------------------------------------------------------------------------------------------------

made_up = pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster's GPUs are made up")
Nodeful = Callable[[Sequence[int]], Cluster]
NODES, SIZE = "abcd", 16  # each node has so many GPUs and cores, and a resource that is its name


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodeful]:
    """Makes a cluster whose nodes have so many made-up GPUs free, by taking all others away, and other nodes whole."""
    temporary = tempfile.mkdtemp(prefix="rd-")  # short: paths of sockets have to fit into 107 characters
    ray.shutdown()  # whatever tests before these left running in this process
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", temporary)
    options = {"num_cpus": SIZE, "num_gpus": SIZE, "object_store_memory": 80 * 2**20}
    head = {"include_dashboard": False, "resources": {NODES[0]: 1}, **options}
    cluster = RayCluster(initialize_head=True, head_node_args=head)
    for name in NODES[1:]:
        cluster.add_node(resources={name: 1}, **options)
    ray.init(address=cluster.address, log_to_driver=False)
    taken: list[PlacementGroup] = []

    def leave_free(gpus: Sequence[int]) -> Cluster:
        free_all()
        bundles = [
            {name: 1e-3, "GPU": float(SIZE - free), "CPU": 0.0 if used else float(SIZE)}
            for name, (used, free) in zip(NODES, [(True, count) for count in gpus] + [(False, 0)] * len(NODES))
        ]
        bundles = [{what: amount for what, amount in bundle.items() if amount} for bundle in bundles]
        taken.append(placement_group(bundles))
        assert taken[-1].wait(60)
        return Cluster([Nodes({"CPU": float(SIZE), "GPU": float(count)}) for count in gpus])

    def free_all() -> None:
        while taken:
            remove_placement_group(taken.pop())

    yield leave_free
    ray.shutdown()
    cluster.shutdown()
    patch.undo()
    shutil.rmtree(temporary, ignore_errors=True)


def placed(n: int, replicas: int, cluster: Cluster) -> tuple[list[dict[str, float]], PlacementGroup]:
    config = ClusterConfig(score_replicas=replicas, placement_timeout_s=60.0)
    bundles = plan_bundles(config, n, cluster)
    keys = [("particle", i) for i in range(n)] + [("score", i) for i in range(replicas)]
    return bundles, reserve(dict(zip(keys, bundles)), config, cluster, lambda _: None, threading.Event())


@made_up
@pytest.mark.ray
@pytest.mark.parametrize("gpus", [[0], [1], [2], [4], [8], [9], [4, 4], [1, 3], [4, 4, 9]], ids=str)
def test_ray_places_every_n(nodes: Nodeful, gpus: list[int]) -> None:
    cluster = nodes(gpus)
    for n, replicas in itertools.product((1, 2, 8, 9), (1, 2, 8)):
        if replicas <= n:
            _, group = placed(n, replicas, cluster)
            remove_placement_group(group)


@made_up
@pytest.mark.ray
@pytest.mark.parametrize(("gpus", "replicas"), [([8], 1), ([4, 4], 8)], ids=str)
def test_each_particle_has_a_gpu_of_its_own_and_the_score_models_stand_beside_them(
    nodes: Nodeful, gpus: list[int], replicas: int
) -> None:
    bundles, group = placed(8, replicas, nodes(gpus))

    @ray.remote(num_cpus=0)
    def place() -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), ray.get_runtime_context().get_accelerator_ids()["GPU"][0]

    where = [PlacementGroupSchedulingStrategy(group, i) for i in range(len(bundles))]
    asked = [
        place.options(num_gpus=bundle["GPU"], scheduling_strategy=strategy).remote()
        for bundle, strategy in zip(bundles, where)
    ]
    found = ray.get(asked)
    remove_placement_group(group)
    assert len(set(found[:8])) == 8
    assert set(found[8:]) <= set(found[:8])
    assert max(Counter(found[8:]).values()) == 1


@made_up
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "num_nodes"), [(0, 4), (1, 1), (2, 2), (3, 2), (4, 3), (8, 4), (9, 4), (16, 4)])
def test_ray_takes_particles_to_gpus_that_can_hold_them(nodes: Nodeful, num_gpus: int, num_nodes: int) -> None:
    """What is planned gets its places, on nodes whose single GPUs have room for all that stands there."""
    gpus = spread(num_gpus, num_nodes)
    cluster = nodes(gpus)
    counts = {
        node["NodeID"]: count for node in ray.nodes() for name, count in zip(NODES, gpus) if name in node["Resources"]
    }
    for n in (3, 8, 9, 16):
        bundles, group = placed(n, 1, cluster)
        held = defaultdict(list)
        for index, node in placement_group_table(group)["bundles_to_node_id"].items():
            held[node].append(bundles[index].get("GPU", 0.0))
        remove_placement_group(group)
        assert sum(map(len, held.values())) == n + 1
        assert all("GPU" in bundle for bundle in bundles) == (num_gpus > 0), "GPUs are used where there are any"
        for node, shares in held.items():
            assert _can_be_placed(sorted(shares, reverse=True), [counts[node]]), (n, gpus, shares)


@made_up
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("n", "gpus"), [(1, [1]), (9, [2, 1, 1]), (8, [3, 2, 2, 2])], ids=str)
def test_actors_are_started_on_gpus_as_planned(nodes: Nodeful, n: int, gpus: list[int]) -> None:
    bundles, group = placed(n, 1, nodes(gpus))

    class Place:
        def place(self) -> tuple[str, str]:
            return ray.get_runtime_context().get_node_id(), ray.get_runtime_context().get_accelerator_ids()["GPU"][0]

    where = [PlacementGroupSchedulingStrategy(group, i) for i in range(len(bundles))]
    actor_class: Any = ray.remote(num_cpus=0)(Place)
    actors = [
        actor_class.options(num_gpus=bundle["GPU"], scheduling_strategy=strategy).remote()
        for bundle, strategy in zip(bundles, where)
    ]
    found = ray.get([actor.place.remote() for actor in actors])
    remove_placement_group(group)
    load: Counter[tuple[str, str]] = Counter()
    for place, bundle in zip(found, bundles):
        load[place] += round(1e4 * bundle["GPU"])
    assert max(load.values()) <= 1e4
    assert max(Counter(found[:n]).values()) == math.ceil(n / sum(gpus))
