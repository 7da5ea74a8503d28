"""Settings that name a folder, made to mean the same folder in every process: actors have working directories of their
own.
"""

import re
from dataclasses import replace
from pathlib import Path

from raydream.config.branches import BranchConfig
from raydream.config.run import PREVIOUS, RunConfig, StageConfig

_NAMES = ("", "embedded", "off", "procedural", PREVIOUS)  # words that a folder beside us cannot take over
_FIELDS = re.compile(
    r"prior\.source|prior\.exhibit\.assets|stages\.\d+\.(start|branches\.\d+\.geometric_prior\.(source|prior))"
)


def absolute_folder(text: str) -> str:
    """The absolute path of a folder; whatever else it is, a known name or a URI, as it stands."""
    if text in _NAMES or "://" in text or not Path(text).expanduser().is_dir():
        return text
    return str(Path(text).expanduser().resolve())


def with_absolute_folders(run: RunConfig) -> RunConfig:
    """The run with every folder that its settings name by its absolute path."""
    exhibit = replace(run.prior.exhibit, assets=absolute_folder(run.prior.exhibit.assets))
    prior = replace(run.prior, source=absolute_folder(run.prior.source), exhibit=exhibit)
    return replace(run, prior=prior, stages=tuple(_stage(stage) for stage in run.stages))


def absolute_override(override: str) -> str:
    """A ``field=value`` whose value, where the field is one for folders, is absolute."""
    name, equals, value = override.partition("=")
    return f"{name}{equals}{absolute_folder(value)}" if _FIELDS.fullmatch(name) else override


def _stage(stage: StageConfig) -> StageConfig:
    return replace(stage, start=absolute_folder(stage.start), branches=tuple(map(_branch, stage.branches)))


def _branch(branch: BranchConfig) -> BranchConfig:
    geometric = branch.geometric_prior
    source, prior = absolute_folder(geometric.source), absolute_folder(geometric.prior)
    return replace(branch, geometric_prior=replace(geometric, source=source, prior=prior))
