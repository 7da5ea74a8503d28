"""Real assets that know their front: what a judge compares with, and the ground truth that judges are checked on."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from raydream.evaluate.facing import MIN_REFERENCES, JudgeCheck, frontness_by_references, judge_facing
from raydream.evaluate.glue import glue_two_fronts
from raydream.evaluate.settings import EvaluateSettings
from raydream.evaluate.turntable import Turntable, take_turntable
from raydream.prior.asset import AssetError
from raydream.prior.asset_library import AssetFilter, filter_records, read_manifest_folder
from raydream.prior.assets import load_record
from raydream.prior.exhibit_assets import COLOUR_WORDS, match_records
from raydream.types import Backend

Frontness = Callable[[Turntable], Float[Tensor, " view"]]

MAX_REFERENCES, MAX_FACES = 32, 20_000
CUTS = (0.5, 0.8)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """A real asset, and its fakes: glued from two fronts by each of ``CUTS``."""

    real: Turntable
    glued: tuple[Turntable, ...]


def load_references(prompt: str, folder: Path, settings: EvaluateSettings, backend: Backend) -> tuple[Reference, ...]:
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
        references.append(Reference(take_turntable(asset, settings, backend), glued))
    return tuple(references) if len(references) >= MIN_REFERENCES else ()


def check_references(references: Sequence[Reference]) -> JudgeCheck:
    """What the references are worth as judges: each is judged by the others."""

    def others(index: int) -> Frontness:
        rest = [reference.real for place, reference in enumerate(references) if place != index]
        return lambda table: frontness_by_references(table, rest)

    return _check("references", references, [others(index) for index in range(len(references))])


def check_judge(judge: str, references: Sequence[Reference], frontness: Frontness) -> JudgeCheck:
    """What a judge that needs no references is worth on these assets."""
    return _check(judge, references, [frontness] * len(references))


def _check(judge: str, references: Sequence[Reference], judges: Sequence[Frontness]) -> JudgeCheck:
    consistent = caught = caught_middle = 0
    for reference, frontness in zip(references, judges):
        consistent += judge_facing(judge, frontness(reference.real)).verdict == "consistent"
        found = [judge_facing(judge, frontness(fake)).verdict == "janus" for fake in reference.glued]
        caught += any(found)
        caught_middle += found[0]
    count = len(references)
    return JudgeCheck(judge, count, consistent / count, caught / count, caught_middle / count)
