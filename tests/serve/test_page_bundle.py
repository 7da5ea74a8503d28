"""The page as it is shipped: built from these sources, small, and complete in itself. Needs neither node nor a
browser.
"""

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATIC, SOURCES = ROOT / "serve" / "static", ROOT / "serve" / "page"


def test_the_bundle_is_made_of_these_sources() -> None:
    """Stale? ``cd serve/page && npm ci && npm run build``."""
    others = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "sources.ts"]
    sources = [path.relative_to(SOURCES).as_posix() for path in (SOURCES / "src").rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for name in sorted(others + sources):
        digest.update(name.encode() + b"\0" + (SOURCES / name).read_bytes() + b"\0")
    assert digest.hexdigest() == (STATIC / "sources.sha256").read_text().strip()


def test_the_bundle_is_small_whole_and_loads_nothing_from_elsewhere() -> None:
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 1_500_000
    index = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<style|style=|<script(?![^>]*src=)|\son\w+=", index)
    for name in re.findall(r'(?:src|href)="/static/([^"]+)"', index):
        assert (STATIC / name).is_file(), name
    licences = (STATIC / "licences.md").read_text(encoding="utf-8")
    packages = json.loads((SOURCES / "package.json").read_text())["dependencies"]
    assert [name for name in packages if name not in licences] == []
    lock = (SOURCES / "package-lock.json").read_text()
    assert '"resolved"' not in lock, "the lock file would tie the build to one registry"
    assert '"integrity"' in lock
