"""The benchmark in little: that it measures what it says, not how fast anything is."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from small_runs import small_config

from raydream.bench import command, whole_run
from raydream.bench.command import ENVIRONMENT, main
from raydream.bench.figures import COUNTED, RunCost, Spread, spread_of
from raydream.bench.particle_step import STEP_PARTS, StepComparison, StepCost, StepSetting, compare_steps
from raydream.bench.report import verdicts
from raydream.bench.whole_run import Clocked, ClockedRuntime, Mark, Window, covered_s, tree_cpu_s
from raydream.cluster.runtime import ActorFailed, LocalRuntime

pytestmark = pytest.mark.slow

NO_SPREAD = Spread(1.0, 1.0, 1.0)


def test_the_whole_benchmark_in_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert main("benchmark", ["--quick", "--runtime", "local", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    step = figures["particle_step"][0]
    assert [cost["backend"] for cost in step["costs"]] == ["reference", "numba"]
    assert all(set(cost["parts_s"]) == set(STEP_PARTS) and cost["total_s"]["median"] > 0 for cost in step["costs"])
    assert step["num_samples"] > 0
    runs = figures["whole_run"]
    assert [(run["num_particles"], run["score_replicas"]) for run in runs] == [(1, 1), (2, 1), (2, 2)]
    for run in runs:
        assert run["num_steps"] == 4
        assert run["wall_s"] > 0
        # the work is in this very process, whose clock ticks a hundred times a second
        assert sum(run["parts_cpu_s"].values()) < run["cpu_s"] + 0.02
        assert 0 <= run["wall_outside"] < 1
    assert runs[0]["cpu_outside"] is not None
    printed = capsys.readouterr().out
    assert "times plain torch" in printed
    assert "outside render, score and optimiser at n = 2" in printed


def test_only_the_steps_need_neither_ray_nor_a_prior() -> None:
    """The kernels are measured on boxes where neither is installed."""
    program = (
        "import sys; from raydream.bench.command import main; main('', ['--parts', 'step', '--quick']);"
        "print([name for name in ('ray', 'diffusers', 'transformers', 'psutil', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_backends_are_compared_on_the_same_work() -> None:
    comparison = compare_steps(StepSetting("ball", "off", 8, 16, 1), ("reference", "numba"), "cpu", 2)
    full = compare_steps(StepSetting("full", "off", 8, 16, 1), ("numba",), "cpu", 1)
    assert comparison.num_samples < full.num_samples
    assert [cost.backend for cost in comparison.costs] == ["reference", "numba"]
    assert full.speedup.median == 1  # against itself


def test_the_environment_is_that_of_an_actor() -> None:
    from raydream.cluster.ray_runtime import actor_environment

    assert actor_environment({"CPU": 1.0}).items() >= ENVIRONMENT.items()


def test_a_process_without_that_environment_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(command.os, "execve", lambda *arguments: started.append(arguments))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command.start_as_an_actor_does()
    assert not started
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command.start_as_an_actor_does()
    ((_, words, environment),) = started
    assert words == [sys.executable, *sys.argv]
    assert environment.items() >= ENVIRONMENT.items()
    assert environment["PATH"] == os.environ["PATH"]


def test_quartiles() -> None:
    assert spread_of([4.0]) == Spread(4.0, 4.0, 4.0)
    assert spread_of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert spread_of([5.0, 1.0, 3.0]).text(10.0, 0) == "30 (20-40)"


def test_the_union_of_intervals() -> None:
    assert covered_s([], 0.0, 10.0) == 0
    assert covered_s([(1.0, 3.0), (2.0, 5.0), (2.0, 3.0), (7.0, 8.0)], 0.0, 10.0) == 5
    assert covered_s([(-5.0, 1.0), (9.0, 20.0), (30.0, 40.0)], 0.0, 10.0) == 2
    assert covered_s([(-5.0, 50.0)], 0.0, 10.0) == 10


def test_a_window_takes_the_mean_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([Mark(100.0, 50.0, 80.0), Mark(110.0, 58.0, 90.0)])
    monkeypatch.setattr(whole_run, "mark", lambda: next(marks))
    monkeypatch.setattr(whole_run.psutil, "cpu_count", lambda: 2)
    window = Window(1, 3)
    names = ("cpu/render_s", "cpu/apply_s", "cpu/guide_s", "cpu/fit_s")
    for step in range(5):
        window.row(step, {name: 0.5 * step for name in names} | {"loss/rgb": 7.0})
    config = small_config("n=3")
    spans = [("render", 99.0, 104.0), ("guide", 103.0, 105.0), ("save", 105.0, 110.0), ("fit", 109.0, 200.0)]
    cost = window.cost(spans, config)
    assert (cost.num_particles, cost.score_replicas, cost.num_steps) == (3, 1, 2)
    assert (cost.wall_s, cost.cpu_s) == (5.0, 4.0)
    assert cost.parts_cpu_s == dict.fromkeys(names, 1.25)  # steps 2 and 3: (1 + 1.5) / 2
    assert cost.cpu_outside == pytest.approx(1 - 5.0 / 4.0)
    assert cost.wall_outside == pytest.approx(0.4)
    assert cost.others == pytest.approx(2.0 / 20.0)


def test_an_unknown_part_makes_the_share_unknown() -> None:
    cost = RunCost(2, 2, 4, 1.0, 1.0, {"cpu/render_s": 0.5}, 0.02, 0.5)
    assert cost.cpu_outside is None
    (line,) = verdicts([], [cost])
    assert "unknown of the CPU time" in line
    assert "not reliable" in line


def test_the_verdict_is_about_the_largest_run_with_one_score() -> None:
    parts = dict.fromkeys(COUNTED, 0.23)
    costs = [RunCost(n, k, 4, 1.0, 1.0, parts, 0.02, 0.0) for n, k in ((1, 1), (8, 1), (8, 2))]
    comparison = StepComparison(
        StepSetting("ball", "off"), "cpu", 9, [StepCost("numba", {}, NO_SPREAD)], Spread(12.34, 1.0, 2.0)
    )
    speed, share = verdicts([comparison], costs)
    assert speed.startswith("numba is 12.3 times plain torch on cpu")
    assert share.startswith(
        "outside render, score and optimiser at n = 8: 8.0% of the CPU time, 2.0% of the wall time;"
    )


def test_cpu_time_of_descendants_counts_while_they_live_and_after() -> None:
    program = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nsys.stdin.read()"
    before = tree_cpu_s()
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    alive = tree_cpu_s()
    child.communicate()
    after = tree_cpu_s()
    assert alive - before >= 0.25  # clock ticks are coarse
    assert after >= alive - 0.05


def test_clocked_actors_do_what_they_did() -> None:
    class Worker:
        def add(self, a: int, b: int) -> int:
            return a + b

        def fail(self) -> None:
            raise KeyError("planted")

    runtime = ClockedRuntime(LocalRuntime())
    actor = runtime.spawn("particle", 0)
    runtime.get([runtime.build(actor, Worker)], 1.0)
    assert runtime.get([runtime.call(actor, "add", 2, 3)], 1.0) == [5]
    with pytest.raises(ActorFailed, match="planted"):
        runtime.get([runtime.call(actor, "fail")], 1.0)
    (spans,) = runtime.get([runtime.call(actor, "spans")], 1.0)
    assert [method for method, _, _ in spans] == ["add", "fail"]
    assert all(start <= end for _, start, end in spans)
    assert isinstance(partial(Clocked, Worker)(), Clocked)
    runtime.close()
