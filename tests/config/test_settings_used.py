"""Each setting of a run is there for somebody: a preset changes it, or a document or a test names it."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from raydream.config import strict_json
from raydream.config.presets import PRESETS, make_preset
from raydream.config.run import RunConfig

ROOT = Path(__file__).parents[2]
NAMES = strict_json.field_names(RunConfig)
OF_SETTINGS_AS_SUCH = {"test_config.py", "test_settings_used.py"}


def settings(config: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each setting below a config: the name that it has in ``NAMES``, its class, its value."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if name in NAMES:
            yield name, type(config).__name__, value
        elif isinstance(value, tuple):
            for part in value:
                yield from settings(part, f"{name}.0.")
        else:
            yield from settings(value, f"{name}.")


@cache
def changed_by_presets() -> set[str]:
    defaults = {name: value for name, _, value in settings(RunConfig("a chair", ""))}
    made = [make_preset(preset, None) for preset in PRESETS]
    return {name for config in made for name, _, value in settings(config) if value != defaults[name]}


@cache
def named_in_documents() -> set[str]:
    """The last two words of each dotted name."""
    pages = [page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if page.name != "CHANGELOG.md"]
    return set().union(*(dotted(page.read_text(encoding="utf-8")) for page in [*pages, *ROOT.glob("examples/*")]))


@cache
def set_by_tests() -> set[str]:
    """The last two words of each dotted name in a text; ``Class.field`` and ``replace.field`` of each argument."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name in OF_SETTINGS_AS_SUCH:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(text)):
                    found |= dotted(text)
                case ast.Call(func=called):
                    found |= {f"{ast.unparse(called).rpartition('.')[2]}.{keyword.arg}" for keyword in node.keywords}
    return found


def dotted(text: str) -> set[str]:
    """The last two words of each dotted name, without the numbers of lists."""
    return set(re.findall(r"(?=\b([a-z]\w*\.[a-z]\w*)\b(?!\.\w))", re.sub(r"\.\d+\.", ".", text)))


@pytest.mark.parametrize(
    ("name", "of"), sorted({(name, of) for name, of, _ in settings(make_preset("embedded", None))})
)
def test_somebody_uses_each_setting_of_a_run(name: str, of: str) -> None:
    *_, group, leaf = re.sub(r"\.0\.", ".", f"run.{name}").split(".")
    used = {f"{group}.{leaf}", f"{of}.{leaf}", f"replace.{leaf}"} & (named_in_documents() | set_by_tests())
    flag = of == "RunConfig" or name == "output.out"
    assert flag or used or name in changed_by_presets(), "nobody uses it: a constant beside its user would do"
