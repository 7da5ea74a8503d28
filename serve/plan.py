"""From a client's request to a checked ``RunConfig``, by the same checks as the command line's."""

import dataclasses
import inspect
from functools import cache

from raydream.config import strict_json
from raydream.config.checks import require
from raydream.config.names import METHOD_WORDS
from raydream.config.presets import PRESETS
from raydream.config.prior import PriorConfig
from raydream.config.run import MAX_PROMPT_CHARACTERS, RunConfig
from raydream.runs import check_run
from serve.records import CheckedRequest, Record
from serve.schema import GenerationRequest, Limits, MethodInfo, PriorInfo, Priors
from serve.settings import Settings


def checked_request(request: GenerationRequest, settings: Settings) -> CheckedRequest:
    """What the record keeps of a request; ``ValueError`` naming the field for what this service cannot do."""
    require(request.n <= settings.max_n, "n", f"must be at most {settings.max_n} here, got {request.n}")
    allowed = request.steps is None or request.steps <= settings.max_steps
    require(allowed, "steps", f"must be at most {settings.max_steps} here, got {request.steps}")
    whole = request.model_copy(update={"preset": request.preset or settings.presets[0]})
    return CheckedRequest(**whole.model_dump(), num_steps=check_run(_configured(whole, settings)).num_steps)


def config_of(record: Record, settings: Settings) -> RunConfig:
    """The settings of the run that a record asks for."""
    request = GenerationRequest.model_construct(**vars(record))  # checked when it was accepted
    return check_run(_configured(request, settings))


def offered(settings: Settings) -> Priors:
    """What clients may choose from."""
    items = [
        PriorInfo(
            name=name,
            description=inspect.cleandoc(PRESETS[name].__doc__ or name).partition("\n\n")[0].replace("\n", " "),
            words=_nouns(settings.base_config(name, None).prior),
            default=name == settings.presets[0],
            default_steps=settings.base_config(name, None).num_steps,
        )
        for name in settings.presets
    ]
    limits = Limits(n=settings.max_n, steps=settings.max_steps, prompt_characters=MAX_PROMPT_CHARACTERS)
    methods = [MethodInfo(name=name, description=words) for name, words in METHOD_WORDS.items()]
    return Priors(items=items, methods=methods, limits=limits)


def _configured(request: GenerationRequest, settings: Settings) -> RunConfig:
    assert request.preset is not None
    config = settings.base_config(request.preset, request.steps)
    overrides = [f"prompt={request.prompt}", f"n={request.n}", f"seed={request.seed}", "cluster.runtime=ray"]
    config = strict_json.apply_overrides(config, overrides).with_method(request.method)
    every = max(1, min(config.output.preview_every, config.num_steps // settings.previews_per_run))
    return dataclasses.replace(config, output=dataclasses.replace(config.output, preview_every=every))


@cache
def _nouns(prior: PriorConfig) -> list[str] | None:
    from raydream.priors.kinds import prior_kind  # torch comes with it

    return prior_kind(prior).nouns()
