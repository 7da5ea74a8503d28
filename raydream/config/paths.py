"""Settings that name a folder, made to mean the same in every process: actors have working directories of their own."""

import re
from pathlib import Path
from typing import Any

from raydream.config import strict_json
from raydream.config.run import PREVIOUS, RunConfig

_NAMES = ("", "embedded", "off", "procedural", PREVIOUS)  # words that a folder beside us cannot take over
_FIELDS = re.compile(
    r"prior\.source|prior\.exhibit\.assets"
    r"|stages\.\d+\.(start|learner\.prior|branches\.\d+\.geometric_prior\.(source|prior))"
)


def absolute_folder(text: str) -> str:
    """The absolute path of a folder; whatever else it is, a known name or a URI, as it stands."""
    if text in _NAMES or "://" in text or not Path(text).expanduser().is_dir():
        return text
    return str(Path(text).expanduser().resolve())


def with_absolute_folders(run: RunConfig) -> RunConfig:
    """The run with every folder that its settings name by its absolute path."""

    def absolute(value: Any, path: str) -> Any:
        match value:
            case dict():
                return {key: absolute(item, f"{path}.{key}".removeprefix(".")) for key, item in value.items()}
            case list():
                return [absolute(item, f"{path}.{index}") for index, item in enumerate(value)]
        return absolute_folder(value) if _FIELDS.fullmatch(path) else value

    return strict_json.from_json(RunConfig, absolute(strict_json.to_json(run), ""))


def absolute_override(override: str) -> str:
    """A ``field=value`` whose value, where the field is one for folders, is absolute."""
    name, equals, value = override.partition("=")
    return f"{name}{equals}{absolute_folder(value)}" if _FIELDS.fullmatch(name) else override
