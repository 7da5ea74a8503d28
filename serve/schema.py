"""What goes over the wire: the request, the generation, the errors. Limits come from ``raydream.config``."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydream.config.names import MethodName
from raydream.config.run import MAX_PROMPT_CHARACTERS

State = Literal["queued", "running", "finished", "failed", "cancelled"]
FINAL_STATES: frozenset[str] = frozenset(("finished", "failed", "cancelled"))
MAX_SEED = 2**53 - 1  # what a browser's numbers hold exactly
MAX_METRIC_ROWS = 500

_STRICT = ConfigDict(strict=True, extra="forbid")
_TEXT = r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$"  # no control characters, and not only spaces


class GenerationRequest(BaseModel):
    """What to make. What is left out comes from the preset."""

    model_config = _STRICT

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, pattern=_TEXT)]
    n: Annotated[int, Field(ge=1, le=1024, description="number of particles; the service's own limit may be lower")] = 4
    preset: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    method: MethodName = "vsd"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None


class Progress(BaseModel):
    """How far a generation is; ``eta_s`` is about its steps, without the exports."""

    step: int
    num_steps: int
    eta_s: float | None
    phase: str
    losses: dict[str, float]


class Failure(BaseModel):
    """Why a generation failed."""

    title: str
    detail: str


class ParticleLinks(BaseModel):
    """Where one particle's pictures, film and model are; null until there are any."""

    index: int
    preview: str | None
    turntable: str | None
    mesh: str | None


class Links(BaseModel):
    """Where the rest is; archive and report are null until there are any."""

    self: str
    events: str
    archive: str | None
    report: str | None
    metrics: str


class Generation(BaseModel):
    """One accepted request and what became of it. Times are RFC 3339 in UTC."""

    id: str
    prompt: str
    n: int
    preset: str
    method: MethodName
    seed: int
    steps: int | None
    state: State
    queue_position: int | None
    created_at: str
    started_at: str | None
    ended_at: str | None
    progress: Progress
    error: Failure | None
    preview_step: int | None
    particles: list[ParticleLinks]
    links: Links


class GenerationPage(BaseModel):
    """The newest generations of a key; ``next_cursor`` leads to older ones."""

    items: list[Generation]
    next_cursor: str | None


class MetricRows(BaseModel):
    """Figures by step: ``step`` and whatever losses there are."""

    rows: list[dict[str, float | int | None]]


class PriorInfo(BaseModel):
    """A preset that this service offers; ``words`` are the objects its prior knows, null where it knows any."""

    name: str
    description: str
    words: list[str] | None
    default: bool
    default_steps: int


class MethodInfo(BaseModel):
    """A method of distillation."""

    name: MethodName
    description: str


class Limits(BaseModel):
    """The greatest values that this service takes."""

    n: int
    steps: int
    prompt_characters: int


class Priors(BaseModel):
    """All presets and methods, and the limits that hold for all of them."""

    items: list[PriorInfo]
    methods: list[MethodInfo]
    limits: Limits


class Health(BaseModel):
    """Whether a part of the service works; ``detail`` says what does not."""

    status: Literal["ok", "unavailable"]
    detail: str = ""


class Problem(BaseModel):
    """An error as RFC 9457 has it; ``field`` is what to change."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None


TITLES = {
    400: "Bad request",
    401: "API key needed",
    403: "Not allowed from here",
    404: "Not found",
    405: "Method not allowed",
    408: "Request too slow",
    409: "Conflict",
    413: "Request too large",
    416: "Range not satisfiable",
    421: "Unknown host",
    422: "Invalid request",
    429: "Quota used up",
    500: "Internal error",
    503: "Not ready",
}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for OpenAPI."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": TITLES[status], "content": content} for status in statuses}
