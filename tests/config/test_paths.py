"""A folder that a person names means the same folder in every process, wherever that process stands."""

from pathlib import Path

import pytest

from raydream import cli
from raydream.assets.exhibit import asset_folder
from raydream.config import strict_json
from raydream.config.paths import absolute_folder, absolute_override
from raydream.config.run import RunConfig
from serve.settings import Settings

WORDS = ["--preset", "embedded"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders that are named like nothing else, and one like a known name."""
    for name in ("mine", "views", "off", "embedded", "sd21-base"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*words: str) -> RunConfig:
    return cli.parse("test", words).config


def test_folders_of_the_command_line_are_absolute(here: Path) -> None:
    mine, views = str(here / "mine"), str(here / "views")
    prior = "stages.0.branches.1.geometric_prior.prior=mine/../mine"
    config = parsed(*WORDS, "--prior", "mine", "--agp", "./views", "--set", prior, "--set", "stages.0.start=views")
    geometric = config.stages[0].branches[1].geometric_prior
    assert (config.prior.source, geometric.source, geometric.prior) == (mine, views, mine)
    assert config.stages[0].start == views
    assert parsed("--set", "prior.exhibit.assets=views").prior.exhibit.assets == views


def test_known_names_and_uris_stay_as_they_are() -> None:
    assert parsed(*WORDS, "--agp", "off").stages[0].branch("ccm") is None, "though there is such a folder"
    assert parsed(*WORDS, "--agp", "embedded").stages[0].geometric_prior == "embedded", "though there is such a folder"
    assert parsed("--prior", "sd15").prior.source == "sd15"
    for text in ("embedded", "procedural", "owner/name", "s3://bucket/views", "nowhere", ""):
        assert absolute_folder(text) == text


def test_a_folder_comes_before_an_alias_as_it_does_where_priors_are_found(here: Path) -> None:
    assert parsed("--prior", "sd21-base").prior.source == str(here / "sd21-base")


def test_a_run_is_resumed_by_the_words_that_started_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(*WORDS, "--prior", "mine")
    run = cli.RunFolder.create(str(here / "run"), strict_json.dumps(config))
    assert parsed("--resume", run.uri, "--prior", "mine") == config
    monkeypatch.chdir("/")
    assert parsed("--resume", run.uri) == config


def test_a_service_keeps_its_operators_folders(here: Path) -> None:
    source = "stages.0.branches.1.geometric_prior.source"
    given = {
        "RAYDREAM_SERVE_PRESETS": '["embedded"]',
        "RAYDREAM_SERVE_OVERRIDES": f'["prior.source=mine", "{source}=embedded", "prompt=views", "n=2"]',
    }
    found = Settings.from_environment(given).overrides
    assert found == (f"prior.source={here / 'mine'}", f"{source}=embedded", "prompt=views", "n=2")
    assert absolute_override(f"{source}=views") == f"{source}={here / 'views'}"
    assert absolute_override("stages.1.start=views") == f"stages.1.start={here / 'views'}"


def test_the_folder_of_the_environment_is_absolute(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "views" / "manifest.jsonl").touch()
    monkeypatch.setenv("RAYDREAM_ASSETS", "views")
    assert asset_folder(None) == here / "views"
