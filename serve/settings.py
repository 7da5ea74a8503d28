"""What the operator of a service decides: environment variables ``RAYDREAM_*``, checked before anything starts."""

import dataclasses
import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydream.config import strict_json
from raydream.config.checks import require
from raydream.config.paths import absolute_override
from raydream.config.presets import DEFAULT_PRESET, PRESETS, make_preset
from raydream.config.run import RunConfig

PREFIX = "RAYDREAM_SERVE_"
_LIMITS = ("max_n", "max_steps", "max_running", "max_queued", "unfinished_per_key", "daily_per_key")


@dataclass(frozen=True)
class Settings:
    """One service. The field ``max_n`` is the environment's ``RAYDREAM_SERVE_MAX_N``, and so on.

    ``data`` is a folder for the record, the keys and the cache; ``runs`` is where run folders go, a path or a URI
    that every node sees (default: ``data``/runs). ``database`` is a SQLAlchemy URL (default: SQLite in ``data``).
    ``presets`` are those that clients may choose, the first one where they choose none, and ``overrides`` are
    ``field=value`` settings of every generation. ``max_running`` generations run at once where the cluster has room;
    ``warm_particles`` processes for particles, and those of the score model, stay loaded between them.

    What has ended stays for ever; or for ``keep_days`` days, and as long as all run folders together have less than
    ``keep_gib`` GiB, where these are not 0: the oldest end goes first. A finished run's checkpoints go at once, those
    of one that failed or was cancelled after a week, unless ``keep_checkpoints``. While the disk has less than
    ``min_free_mib`` MiB left, nothing is started.
    """

    data: str = "runs/service"
    runs: str = ""
    database: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    presets: tuple[str, ...] = (DEFAULT_PRESET, "embedded")
    overrides: tuple[str, ...] = ()
    max_n: int = 8
    max_steps: int = 25_000
    max_running: int = 1
    max_queued: int = 100
    unfinished_per_key: int = 20
    daily_per_key: int = 500
    warm_particles: int = 4
    previews_per_run: int = 40
    num_replicas: int = 1
    keep_days: int = 0
    keep_gib: int = 0
    keep_checkpoints: bool = False
    min_free_mib: int = 1024

    def __post_init__(self) -> None:
        least_values = dict.fromkeys((*_LIMITS, "previews_per_run", "num_replicas"), 1)
        least_values |= dict.fromkeys(("keep_days", "keep_gib", "min_free_mib"), 0)
        for name, least in least_values.items():
            require(getattr(self, name) >= least, name, f"must be at least {least}, got {getattr(self, name)}")
        require(0 <= self.warm_particles <= self.max_n, "warm_particles", f"must be 0..max_n={self.max_n}")
        require(0 < self.port < 65536, "port", f"must be 1..65535, got {self.port}")
        require(bool(self.presets), "presets", "must name at least one")
        for preset in self.presets:
            self.base_config(preset, None)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Paths become absolute: replicas and actors have working directories of their own. ``ValueError`` names the
        variable of whatever cannot be.
        """
        found = {k: v for k, v in (os.environ if environment is None else environment).items() if k.startswith(PREFIX)}
        known = {PREFIX + f.name.upper(): f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, text in found.items():
            if name not in known:
                raise ValueError(f"{name}: no such setting; known are {', '.join(known)}")
            values[known[name].name] = _parsed(name, text, known[name].default)
        try:
            settings = cls(**values)
        except ValueError as error:
            name, _, remedy = str(error).partition(":")
            known_name = PREFIX + name.upper()
            raise ValueError(f"{known_name if known_name in known else name}:{remedy}") from error
        runs = settings.runs if "://" in settings.runs else str(Path(settings.runs).resolve()) if settings.runs else ""
        overrides = tuple(absolute_override(override) for override in settings.overrides)
        return dataclasses.replace(settings, data=str(Path(settings.data).resolve()), runs=runs, overrides=overrides)

    def base_config(self, preset: str, steps: int | None) -> RunConfig:
        """A preset with the operator's overrides, before what a client asks for."""
        require(preset in self.presets, "preset", f"must be one of {', '.join(self.presets)}, got {preset!r}")
        require(preset in PRESETS, "presets", f"unknown {preset!r}; choose from {', '.join(PRESETS)}")
        return strict_json.apply_overrides(make_preset(preset, steps), list(self.overrides))

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{Path(self.data) / 'records.sqlite3'}"

    @property
    def namespace(self) -> str:
        """Of the named actors and of the application: two services in one cluster know nothing of each other."""
        return f"raydream-{hashlib.sha256(self.database_url.encode()).hexdigest()[:12]}"

    @property
    def keys_file(self) -> Path:
        return Path(self.data) / "keys.json"

    @property
    def cache(self) -> Path:
        return Path(self.data) / "cache"

    def run_uri(self, generation_id: str) -> str:
        """Where a generation's run folder lies."""
        return f"{self.runs_uri}/{generation_id}"

    @property
    def runs_uri(self) -> str:
        return self.runs or str(Path(self.data) / "runs")

    @property
    def address(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine itself."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _parsed(name: str, text: str, default: object) -> object:
    """A tuple is a JSON list, or words with commas between them where no value can hold a comma."""
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, tuple):
            items = json.loads(text) if text.startswith("[") else [part for part in text.split(",") if part]
            if not all(isinstance(item, str) for item in items):
                raise ValueError("not texts")
            return tuple(items)
    except (KeyError, ValueError) as error:
        kind = "a whole number" if isinstance(default, int) else 'a JSON list of texts such as ["a", "b"]'
        kind = "true or false" if isinstance(default, bool) else kind
        raise ValueError(f"{name}: must be {kind}, got {text!r}") from error
    return text
