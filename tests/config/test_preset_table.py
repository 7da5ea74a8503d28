"""docs/presets.md says what the paper preset sets, and what the papers' own code does."""

from pathlib import Path
from typing import Any

import pytest

from raydream.config import strict_json
from raydream.config.presets import make_preset
from raydream.config.run import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
SAME_IN_OTHER_WORDS = ("prior.source", "stages.0.branches.0.weighting")


def in_words(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return f"{value:g}" if abs(value) < 1e4 else str(int(value))
        case [low, high]:
            return f"{low:g} to {high:g}"
        case {"kind": "constant", "value": at}:
            return f"{at:g}"
        case {"kind": "steps", "points": [[0, first], [step, second]]}:
            return f"{first:g} until step {step}, then {second:g}"
    return str(value)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_says_what_the_preset_sets(row: list[str]) -> None:
    name, here, *theirs, why = row
    value: Any = strict_json.to_json(make_preset("sd21", None))
    for part in name.strip("`").split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    assert in_words(value) == here
    for other in theirs:
        assert other
    if name.strip("`") not in SAME_IN_OTHER_WORDS and not {here, "the same"} >= set(theirs):
        assert why, "a difference is explained"


def test_nothing_that_the_preset_sets_is_left_out() -> None:
    named = {row[0].strip("`") for row in ROWS} | {"prior.kind", "stages.0.shading.albedo_steps"}
    preset, default = (strict_json.to_json(run) for run in (make_preset("sd21", None), RunConfig("a chair", "")))
    changed = set(differences(preset["prior"], default["prior"], "prior"))
    changed |= set(differences(preset["stages"], default["stages"], "stages"))
    assert changed <= named


def differences(one: Any, other: Any, path: str) -> list[str]:
    match one:
        case dict() if "kind" not in one or path.endswith(("prior", "scene")):
            return [found for key in one for found in differences(one[key], other[key], f"{path}.{key}")]
        case [dict(), *_]:
            return [found for i, part in enumerate(one) for found in differences(part, other[i], f"{path}.{i}")]
    return [] if one == other else [path]
