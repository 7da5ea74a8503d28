"""What the documents say is there, is there: files, links, modules, targets of make, names of settings."""

import importlib.util
import re
from itertools import chain
from pathlib import Path

import pytest

from raydream.config import strict_json
from raydream.config.agp import AgpConfig
from raydream.config.render import RenderJobConfig
from raydream.config.run import RunConfig
from raydream.config.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MAX_README_LINES = 130


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_history(page: Path) -> str:
    """A changelog names what is gone, a patch what is not there yet."""
    return "" if page.name == "CHANGELOG.md" else re.sub(r"```diff\n.*?```", "", text_of(page), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(page))
    inside = [target for target in targets if "://" not in target]
    assert not [target for target in inside if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    paths = re.findall(r"\b(?:raydream|jobs|serve|tests|docs|examples)/[\w/]+(?:\.\w+)?", without_history(page))
    labels = {"raydream/role"}  # of nodes
    assert not [path for path in paths if path not in labels and not (ROOT / path).exists()]
    modules = re.findall(r"python -m ([\w.]+)", without_history(page))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_exist(page: Path) -> None:
    made = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)\b(?=[ `]*[#`|(])", without_history(page))) <= made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    configs = (RunConfig, TrainConfig, RenderJobConfig, AgpConfig)
    known = set(chain.from_iterable(strict_json.field_names(config) for config in configs))
    named = re.findall(r"--set '?([\w.]+)=", without_history(page))
    assert not [name for name in named if not any(same(name, field) for field in known)]


def same(name: str, field: str) -> bool:
    """Whether a dotted name with numbers is a field, whose list has other numbers or dots only."""
    return re.sub(r"\.\d+\.", ".0.", name) == re.sub(r"\.\d+\.", ".0.", field)


def test_the_readme_stays_a_front_door() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MAX_README_LINES
