"""From a client's request to a checked ``RunConfig``, by the same checks as the command line's."""

import dataclasses
import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from raydream.config import strict_json
from raydream.config.checks import require
from raydream.config.presets import PRESETS
from raydream.config.run import MAX_PROMPT_CHARACTERS, RunConfig
from raydream.launch import check_prior
from raydream.priors.find import EMBEDDED, known_nouns
from serve.records import CheckedRequest, Record
from serve.schema import GenerationRequest, Limits, PriorInfo, Priors
from serve.settings import Settings


def checked_request(request: GenerationRequest, settings: Settings) -> CheckedRequest:
    """What the record keeps of a request; ``ValueError`` naming the field for what this service cannot do."""
    require(request.n <= settings.max_n, "n", f"must be at most {settings.max_n} here, got {request.n}")
    steps, preset = request.steps, request.preset or settings.presets[0]
    allowed = steps is None or steps <= settings.max_steps
    require(allowed, "steps", f"must be at most {settings.max_steps} here, got {steps}")
    config = check_prior(_configured(settings, preset, steps, request.prompt, request.n, request.method, request.seed))
    num_steps = config.stages[0].num_steps
    return CheckedRequest(request.prompt, request.n, preset, request.method, request.seed, steps, num_steps)


def config_of(record: Record, settings: Settings) -> RunConfig:
    """The settings of the run that a record asks for."""
    config = _configured(settings, record.preset, record.steps, record.prompt, record.n, record.method, record.seed)
    return check_prior(config)


def offered(settings: Settings) -> Priors:
    """What clients may choose from."""
    items = [
        PriorInfo(
            name=name,
            description=inspect.cleandoc(PRESETS[name].__doc__ or name).partition("\n\n")[0].replace("\n", " "),
            words=_words(settings.base_config(name, None)),
            default=name == settings.presets[0],
            default_steps=settings.base_config(name, None).stages[0].num_steps,
        )
        for name in settings.presets
    ]
    limits = Limits(n=settings.max_n, steps=settings.max_steps, prompt_characters=MAX_PROMPT_CHARACTERS)
    return Priors(items=items, limits=limits)


def _configured(
    settings: Settings, preset: str, steps: int | None, prompt: str, n: int, method: str, seed: int
) -> RunConfig:
    config = settings.base_config(preset, steps)
    overrides = [f"prompt={prompt}", f"n={n}", f"method={method}", f"seed={seed}", "cluster.runtime=ray"]
    config = strict_json.apply_overrides(config, overrides)
    every = max(1, min(config.output.preview_every, config.stages[0].num_steps // settings.previews_per_run))
    return dataclasses.replace(config, output=dataclasses.replace(config.output, preview_every=every))


def _words(config: RunConfig) -> list[str] | None:
    if config.prior.kind != "exhibit":
        return known_nouns(EMBEDDED if config.prior.source == "embedded" else Path(config.prior.source))
    return list(_exhibit_words(config.prior.exhibit.assets))


@cache
def _exhibit_words(assets: str) -> Sequence[str]:
    from raydream.assets.exhibit import available_nouns  # torch comes with it

    return tuple(noun for noun, _ in available_nouns(assets or None).most_common())
