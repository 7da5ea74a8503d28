"""Real assets that know their front: what a judge compares with, and the ground truth that judges are checked on."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from raydream.assets.asset import AssetError
from raydream.assets.exhibit import COLOUR_WORDS, match_records
from raydream.assets.libraries import AssetFilter, filter_records, read_manifest_folder
from raydream.assets.load import load_record
from raydream.config.evaluate import EvaluateConfig
from raydream.evaluate.facing import (
    MIN_REFERENCES,
    Around,
    Facing,
    JudgeCheck,
    frontness_by_references,
    judge_around,
    judge_facing,
)
from raydream.evaluate.glue import glue_two_fronts
from raydream.evaluate.turntable import Turntable, take_turntable
from raydream.types import Backend

Frontness = Callable[[Turntable], Float[Tensor, " view"]]

REFERENCES = "references"
MAX_REFERENCES, MAX_FACES = 32, 20_000
CUTS = (0.5, 0.8)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceAsset:
    """A real asset, and its fakes: glued from two fronts by each of ``CUTS``."""

    real: Turntable
    glued: tuple[Turntable, ...]

    @cached_property
    def around(self) -> tuple[Around, ...]:
        """What is compared of the real one and of each fake, in this order; every particle needs it."""
        return tuple(Around.of(table) for table in (self.real, *self.glued))


def load_references(
    prompt: str, folder: Path, settings: EvaluateConfig, backend: Backend
) -> tuple[ReferenceAsset, ...]:
    """At most ``MAX_REFERENCES`` assets of a manifest folder that are about the prompt's object and have a front.

    Colour words do not count. Empty where the folder has fewer than ``MIN_REFERENCES``: then nothing is known.
    """
    rule = AssetFilter(max_faces=MAX_FACES, known_front_only=True)
    records, _ = filter_records(read_manifest_folder(folder), rule)
    plain = " ".join(word for word in prompt.split() if word.lower() not in COLOUR_WORDS)
    found = match_records(records, plain) or match_records(records, prompt)
    count = min(len(found), MAX_REFERENCES)
    references = []
    for record in (found[index * len(found) // count] for index in range(count)):
        try:
            asset = load_record(record)
        except AssetError as error:
            _log.warning("references: %s left out: %s", record.uid, error)
            continue
        glued = tuple(take_turntable(glue_two_fronts(asset, cut), settings, backend) for cut in CUTS)
        references.append(ReferenceAsset(take_turntable(asset, settings, backend), glued))
    return tuple(references) if len(references) >= MIN_REFERENCES else ()


def judge_by_references(table: Turntable, references: Sequence[ReferenceAsset]) -> Facing:
    """The verdict of ``judge_around`` with these references, beside how front-like the front and the back are."""
    real, glued = _split(references)
    verdict, turn_deg = judge_around(Around.of(table), real, glued)
    frontness = frontness_by_references(table, [reference.real for reference in references])
    return replace(judge_facing(REFERENCES, frontness), verdict=verdict, turn_deg=turn_deg)


def check_references(references: Sequence[ReferenceAsset]) -> JudgeCheck:
    """What the references are worth as judges: each is judged by the others."""

    def is_consistent(index: int, place: int) -> bool:
        rest = _split([*references[:index], *references[index + 1 :]])
        return judge_around(references[index].around[place], *rest)[0] == "consistent"

    return _check(REFERENCES, len(references), is_consistent)


def check_judge(judge: str, references: Sequence[ReferenceAsset], frontness: Frontness) -> JudgeCheck:
    """What a judge that needs no references is worth on these assets."""

    def is_consistent(index: int, place: int) -> bool:
        table = (references[index].real, *references[index].glued)[place]
        return judge_facing(judge, frontness(table)).verdict == "consistent"

    return _check(judge, len(references), is_consistent)


def _check(judge: str, count: int, is_consistent: Callable[[int, int], bool]) -> JudgeCheck:
    """Asks about each asset: in place 0 the real one, then its fakes."""
    consistent = caught = caught_middle = 0
    for index in range(count):
        consistent += is_consistent(index, 0)
        found = [not is_consistent(index, place + 1) for place in range(len(CUTS))]
        caught += any(found)
        caught_middle += found[0]
    return JudgeCheck(judge, count, consistent / count, caught / count, caught_middle / count)


def _split(references: Sequence[ReferenceAsset]) -> tuple[list[Around], list[Around]]:
    """The real ones and the fakes."""
    return [r.around[0] for r in references], [fake for r in references for fake in r.around[1:]]
