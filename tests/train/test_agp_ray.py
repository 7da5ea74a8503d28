"""Fine-tuning on Ray Train: a worker that is killed, and Parquet that comes as a stream."""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray import cloudpickle
from small_agp import LATENT_PX, agp_config, settings_json, view_recipe, write_prior, write_views

from raydream.config.agp import AgpDataConfig
from raydream.store.run_folder import RunFolder
from raydream.train.agp import job as agp_job
from raydream.train.agp.samples import MemorySamples, check_views
from raydream.train.agp.stream import StreamSamples, open_stream
from raydream.train.agp.train import AgpRequest
from raydream.train.loop import Worker

NUM_STEPS, DIES_AFTER = 12, 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    ray.shutdown()  # whatever tests before these left running in this process
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    prior, views = write_prior(folder / "prior"), write_views(folder / "views", view_recipe())
    config = settings_json(agp_config(NUM_STEPS), folder / "settings.json")
    return ["--views", views, "--prior", str(prior), "--config", config, "--device", "cpu"]


def _die_once(worker: Worker, *, request: AgpRequest) -> bool:
    """A worker that is killed, hard, once the run folder tells of enough steps."""
    from raydream.train.agp.job import _work  # here, as the driver's has given way to this function

    run = RunFolder.open(request.out)

    def watch() -> None:
        while sum(1 for _ in run.read_metrics()) < DIES_AFTER:
            time.sleep(0.01)
        (Path(request.out) / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if not (Path(request.out) / "killed").exists():
        threading.Thread(target=watch, daemon=True).start()
    return _work(worker, request=request)


@pytest.mark.ray
def test_a_killed_worker_is_not_seen_in_the_losses(
    cluster: None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the job would end the cluster that the tests share
    with monkeypatch.context() as patched:
        patched.setattr(agp_job, "_work", _die_once)
        assert agp_job.main("test", [*words, "--out", str(tmp_path / "killed")]) == 0
    assert agp_job.main("test", [*words, "--out", str(tmp_path / "plain"), "--no-ray"]) == 0
    assert (tmp_path / "killed" / "killed").exists()
    plain, killed = (
        [(row["step"], row["loss"]) for row in RunFolder.open(str(tmp_path / name)).read_metrics()]
        for name in ("plain", "killed")
    )
    assert [step for step, _ in killed] == list(range(1, NUM_STEPS + 1))
    assert killed == plain


@pytest.mark.ray
def test_a_stream_brings_every_view_as_memory_holds_it(cluster: None, words: list[str]) -> None:
    uri, config = words[1], AgpDataConfig()
    views = check_views(uri, LATENT_PX)
    generator = torch.Generator()
    number = view_recipe().library.max_objects * views.num_views
    with closing(StreamSamples(open_stream(uri).iterator(), views, LATENT_PX, config)) as stream:
        seen = [stream.samples(5, generator) for _ in range(2 * number // 5)]
    memory = MemorySamples.read(uri, LATENT_PX, config)._views
    places = {(card.uid, float(angle)): i for i, (card, angle) in enumerate(zip(memory.cards, memory.azimuth_deg))}
    drawn = [(card.uid, float(angle)) for part in seen for card, angle in zip(part.cards, part.azimuth_deg)]
    assert sorted(drawn[:number]) == sorted(places)  # the first round brings each view once
    index = [places[key] for key in drawn]
    expected = memory.select(index)
    for name in ("latents", "c2w", "fov_y_deg", "elevation_deg"):
        found = torch.cat([getattr(part, name) for part in seen])
        assert torch.allclose(found, getattr(expected, name), atol=1e-3), name
    assert stream.nouns()
    gone = weakref.ref(stream)
    del stream
    assert gone() is None  # at once: nothing of it waits for the garbage collector, which may run after Ray's end
    nothing = StreamSamples(open_stream(uri).iterator(), views, LATENT_PX, replace(config, nouns=("zeppelin",)))
    with pytest.raises(ValueError, match=r"data\.nouns"):
        nothing.samples(1, generator)
