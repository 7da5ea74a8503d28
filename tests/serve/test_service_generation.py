"""A generation from its record to its files, in this process: it ends as an undisturbed run does, whatever befalls
it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from service_cases import REQUEST, ROOMY, epoch_of, records_of, small_settings
from small_runs import Fault, WatchedRuntime, assert_same_end

from raydream.cluster.placement import Cluster, Nodes
from raydream.cluster.runtime import LocalRuntime, Runtime, Withdrawn
from raydream.config import strict_json
from raydream.config.cluster import ClusterConfig
from raydream.config.presets import make_preset
from raydream.config.run import RunConfig
from raydream.store.run_folder import MESH, PREVIEW, REPORT, RunFolder, particle_file, preview_file
from serve.actors import shared_cluster
from serve.generation import GenerationRun, GenerationWatch
from serve.plan import config_of
from serve.records import Record, Records
from serve.settings import Settings

pytestmark = pytest.mark.slow

NUM_STEPS = 6


class Died(BaseException):
    """What a kill is to the thread that it befalls: nothing after it happens."""


class Deadly:
    """A runtime whose process is killed when a step is rendered for the first time."""

    def __init__(self, step: int) -> None:
        self._local, self._step, self.budget = LocalRuntime(), step, None
        self.spawn, self.build, self.respawn = self._local.spawn, self._local.build, self._local.respawn
        self.get, self.failing, self.close = self._local.get, self._local.failing, self._local.close

    def call(self, actor, method, *args, num_returns=1):
        if method == "render" and args[0] == self._step:
            raise Died
        return self._local.call(actor, method, *args, num_returns=num_returns)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small_settings(tmp_path, keep_checkpoints=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = small_settings(tmp_path_factory.mktemp("undisturbed"), keep_checkpoints=True)
    records = records_of(settings)
    return RunFolder.open(settings.run_uri(generate(settings, records).id))


def attempt_at(settings: Settings, records: Records, record: Record) -> GenerationRun:
    attempt = records.take_up(record, epoch_of(records))
    assert attempt is not None
    return GenerationRun(records, settings, record.id, attempt)


def generate(settings: Settings, records: Records, make: Callable[..., Runtime] = lambda *_: LocalRuntime()) -> Record:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    attempt_at(settings, records, record).run(make)
    return seen(records, record)


def seen(records: Records, record: Record) -> Record:
    found = records.get(record.id)
    assert found is not None
    return found


def test_it_finishes_with_all_its_files(settings: Settings, records: Records, undisturbed: RunFolder) -> None:
    record = generate(settings, records)
    assert (record.state, record.error_title, record.step, record.phase) == ("finished", None, NUM_STEPS, "done")
    assert record.ended_at is not None
    run = RunFolder.open(settings.run_uri(record.id))
    assert record.meshes == [i for i in range(REQUEST.n) if run.exists(particle_file(i, MESH))]
    assert run.exists(REPORT)
    assert run.exists(preview_file(0)), "there is something to see before the first step"
    for index in range(REQUEST.n):
        with Image.open(run.local_root / particle_file(index, PREVIEW)) as picture:  # type: ignore[operator]
            assert picture.format == "PNG"
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_killed_runner_is_followed_by_another_with_the_same_result(
    settings: Settings, records: Records, undisturbed: RunFolder, step: int
) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    with pytest.raises(Died):
        attempt_at(settings, records, record).run(lambda *_: Deadly(step))
    assert seen(records, record).state == "running"
    attempt_at(settings, records, seen(records, record)).run(lambda *_: LocalRuntime())
    assert seen(records, record).state == "finished"
    assert_same_end(RunFolder.open(settings.run_uri(record.id)), undisturbed)


def test_a_runner_that_died_before_its_run_folder_was_one(settings: Settings, records: Records) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    folder = Path(settings.run_uri(record.id))
    folder.mkdir(parents=True)
    (folder / ".0123.tmp").write_bytes(b"{")
    attempt_at(settings, records, record).run(lambda *_: LocalRuntime())
    assert seen(records, record).state == "finished"


def test_previews_come_while_it_runs(settings: Settings, records: Records) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    with pytest.raises(Died):
        attempt_at(settings, records, record).run(lambda *_: Deadly(5))
    now = seen(records, record)
    assert now.preview_step is not None
    run = RunFolder.open(settings.run_uri(record.id))
    assert run.read_bytes(particle_file(0, PREVIEW)).startswith(b"\x89PNG")


def test_a_lost_actor_is_the_runs_own_affair(settings: Settings, records: Records, undisturbed: RunFolder) -> None:
    runtime = WatchedRuntime(Fault("particle", 1, "apply", 4))
    record = generate(settings, records, lambda *_: runtime)
    assert runtime.num_faults_left == 0
    assert (record.state, record.attempt) == ("finished", 1)
    assert_same_end(RunFolder.open(settings.run_uri(record.id)), undisturbed)


def test_what_was_cancelled_comes_to_an_end_without_exports(settings: Settings, records: Records) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]

    def make(_config: RunConfig, _watch: GenerationWatch) -> Runtime:
        records.cancel(record.id)
        return LocalRuntime()

    attempt_at(settings, records, record).run(make)
    assert seen(records, record).state == "cancelled"
    run = RunFolder.open(settings.run_uri(record.id))
    assert not run.exists(REPORT)
    assert len(run.read_metrics()) < NUM_STEPS


def test_a_stop_leaves_it_for_another_runner(settings: Settings, records: Records, undisturbed: RunFolder) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    first = attempt_at(settings, records, record)

    def make(_config: RunConfig, _watch: GenerationWatch) -> Runtime:
        first.stop()
        return LocalRuntime()

    first.run(make)
    assert seen(records, record).state == "running"
    attempt_at(settings, records, seen(records, record)).run(lambda *_: LocalRuntime())
    assert_same_end(RunFolder.open(settings.run_uri(record.id)), undisturbed)


def test_a_run_that_fails_says_why(settings: Settings, records: Records) -> None:
    faults = [Fault("particle", 0, "render", 1, error="ValueError") for _ in range(30)]
    record = generate(settings, records, lambda *_: WatchedRuntime(*faults))
    assert (record.state, record.error_title) == ("failed", "The run failed")
    assert "planted" in (record.error_detail or "")


def test_a_finished_run_keeps_no_checkpoints(tmp_path: Path) -> None:
    settings = small_settings(tmp_path)
    records = records_of(settings)
    record = generate(settings, records)
    run = RunFolder.open(settings.run_uri(record.id))
    assert record.state == "finished"
    assert run.latest_checkpoint() is None
    assert run.exists(REPORT)


def test_a_full_disk_has_it_wait_and_go_on_from_its_checkpoint(
    settings: Settings, records: Records, undisturbed: RunFolder
) -> None:
    """A word that only the operating system says, told by an actor's process."""
    faults = [Fault("particle", 0, "render", 4, error="OSError") for _ in range(30)]
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    full = dataclasses.replace(settings, min_free_mib=2**40)
    for _ in range(7):  # more than a run may die without coming further
        attempt = records.take_up(seen(records, record), epoch_of(records))
        assert attempt is not None
        GenerationRun(records, full, record.id, attempt).run(lambda *_: WatchedRuntime(*faults))
        now = seen(records, record)
        assert (now.state, now.phase) == ("queued", "waiting for room on the service's disk")
        assert now.num_stalls <= 0
    attempt_at(settings, records, seen(records, record)).run(lambda *_: LocalRuntime())
    assert seen(records, record).state == "finished"
    assert_same_end(RunFolder.open(settings.run_uri(record.id)), undisturbed)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_is_tried_again_goes_on_from_its_checkpoint(
    settings: Settings, records: Records, undisturbed: RunFolder, state: str
) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    with pytest.raises(Died):
        attempt_at(settings, records, record).run(lambda *_: Deadly(4))
    if state == "failed":
        records.end(record.id, 1, "failed", {"error_title": "The run keeps dying"})
    else:
        records.cancel(record.id)
    records.retry(record.id, ROOMY)
    now = seen(records, record)
    assert (now.state, now.attempt, now.error_title, now.ended_at) == ("queued", 1, None, None)
    resumed: list[str] = []

    def make(_config: RunConfig, watch: GenerationWatch) -> Runtime:
        tell = watch.phase
        watch.phase = lambda message: (resumed.append(message), tell(message))[1]  # type: ignore[method-assign]
        return LocalRuntime()

    attempt_at(settings, records, now).run(make)
    assert seen(records, record).state == "finished"
    assert any(message.startswith("going on from step") for message in resumed)
    assert_same_end(RunFolder.open(settings.run_uri(record.id)), undisturbed)


def test_a_fault_of_ours_does_not_leave_it_hanging(settings: Settings, records: Records) -> None:
    def broken(_config: RunConfig, _watch: GenerationWatch) -> Runtime:
        raise KeyError("secret path")

    record = generate(settings, records, broken)
    assert (record.state, record.error_title) == ("failed", "Internal error")
    assert "secret" not in (record.error_detail or "")


def test_two_runners_never_work_in_one_folder(
    settings: Settings, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.generation._LOCK_PATIENCE_S", 0.0)
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    config = config_of(record, settings)
    run = RunFolder.create(settings.run_uri(record.id), strict_json.dumps(config))
    with run.lock():
        attempt_at(settings, records, record).run(lambda *_: LocalRuntime())
    assert "in use by another driver" in (seen(records, record).error_detail or "")
    assert run.read_metrics() == []


def test_who_still_waits_for_places_tells_it_and_can_be_stopped(settings: Settings, records: Records) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    waiting = attempt_at(settings, records, record)

    def make(_config: RunConfig, watch: GenerationWatch) -> Runtime:
        watch.phase("waiting for 3 GPUs: 0 free")
        assert seen(records, record).phase == "waiting for 3 GPUs: 0 free"
        waiting.stop()
        assert watch.stop.is_set()
        raise Withdrawn

    waiting.run(make)
    assert seen(records, record).state == "running", "another runner goes on with it"
    attempt_at(settings, records, seen(records, record)).run(lambda *_: LocalRuntime())
    assert seen(records, record).state == "finished"


def test_an_older_runner_ends_when_it_learns_of_the_newer(settings: Settings, records: Records) -> None:
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    old = attempt_at(settings, records, record)

    def make(_config: RunConfig, _watch: GenerationWatch) -> Runtime:
        assert records.take_up(seen(records, record), epoch_of(records)) == 2
        return LocalRuntime()

    old.run(make)
    assert (seen(records, record).state, seen(records, record).attempt) == ("running", 2)
    assert len(RunFolder.open(settings.run_uri(record.id)).read_metrics()) < NUM_STEPS


def test_shares_are_the_same_for_every_n(settings: Settings) -> None:
    def shared(run: RunConfig, cpus: float, gpus: float = 0.0) -> ClusterConfig:
        return shared_cluster(run, settings, Cluster([Nodes({"CPU": cpus, "GPU": gpus})]))

    run, heavy = make_preset("exhibit", 10), make_preset("sd21", 10)
    assert shared(run, 2.0).cpus_per_particle == 0.22
    assert shared(run, 64.0).cpus_per_score == 1.0
    own = shared(strict_json.apply_overrides(run, ["cluster.cpus_per_particle=0.5"]), 2.0)
    assert (own.cpus_per_particle, own.cpus_per_score) == (0.5, 0.22)
    assert (own.gpus_per_particle, own.gpus_per_score) == (0.0, 0.0)
    one = shared(heavy, 16.0, 1.0)
    assert (one.gpus_per_particle, one.gpus_per_score) == (0.1112, 0.1104)
    bold = shared(strict_json.apply_overrides(heavy, ["cluster.gpus_per_particle=1"]), 16.0, 1.0)
    assert (bold.gpus_per_particle, bold.gpus_per_score) == (1.0, -1.0), "some n fit: what does not is refused by name"
