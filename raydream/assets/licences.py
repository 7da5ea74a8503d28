"""Licences in one vocabulary, SPDX's, whatever words a library has for them."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

UNKNOWN = "unknown"  # of an asset that comes with no word about it
_CURRENT = "4.0"  # of Creative Commons, as Sketchfab and with it Objaverse mean where they name no version
_URL = re.compile(r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)(?:/(\d\.\d))?(?:/([a-z]{2})(?:/|$))?")
_LONG_WORDS = ((r"non[\s-]*commercial", "nc"), (r"share[\s-]*alike", "sa"), (r"no[\s-]*deriv(?:ative)?s?", "nd"))
_CONDITIONS = ("by", "nc", "sa", "nd")
_FILLING = frozenset("cc creative commons license licence international unported generic universal".split())  # noqa: SIM905


@lru_cache(maxsize=4096)
def spdx_licence(word: str | None) -> str | None:
    """The SPDX identifier that a library's word for a licence means, None for none.

    Knows Creative Commons by Objaverse's words ("by-nc", "cc0"), Sketchfab's and Thingiverse's ("CC
    Attribution-NonCommercial"), identifiers of any case and its addresses. Any other word stays as it is. A work
    that is free of rights, but that nobody gave up his rights to ("Public Domain"), is CC-PDM-1.0, not CC0-1.0.
    """
    text = (word or "").strip()
    if not text:
        return None
    return _creative_commons(text.lower()) or text


def is_accepted(licence: str | None, accepted: Iterable[str]) -> bool:
    """Whether a licence is one of those that the settings name, each in whatever words; none is ``UNKNOWN``."""
    return (spdx_licence(licence) or UNKNOWN) in {spdx_licence(word) for word in accepted}


def count_licences(licences: Iterable[str | None]) -> Counter[str]:
    """How many assets there are of each."""
    return Counter(spdx_licence(licence) or UNKNOWN for licence in licences)


def why_no_licence(counts: Counter[str], accepted: Iterable[str], field: str) -> str:
    """What to tell where none of the assets, by ``count_licences``, has a licence that the settings accept."""
    names = list(accepted)
    there = ", ".join(f"{count} {name}" for name, count in counts.most_common(6))
    known = [name for name, _ in counts.most_common(6) if name != UNKNOWN]
    allowed = json.dumps([*names, *(known or [UNKNOWN])])
    return (
        f"{field}: 0 of {counts.total()} assets are {' or '.join(names)}; the folder has {there}; if you may use them, "
        f"allow them by --set '{field}={allowed}'"
    )


def _creative_commons(text: str) -> str | None:
    """The identifier of a Creative Commons licence in lower-case words, None for anything else."""
    address = _URL.search(text)
    if address is not None:
        code, version, country = address.groups()
        found = _identifier(set(code.split("-")), version or "")
        return f"{found}-{country.upper()}" if found and country else found
    for pattern, short in _LONG_WORDS:
        text = re.sub(pattern, short, text)
    words = set(re.findall(r"[a-z0-9.]+", text.replace("attribution", "by"))) - _FILLING
    versions = {word.removeprefix("v") for word in words if re.fullmatch(r"v?\d(\.\d)?", word)}
    if len(versions) > 1:
        return None
    version = versions.pop() if versions else ""
    words = {word for word in words if not re.fullmatch(r"v?\d(\.\d)?", word)}
    return _identifier(words, f"{version}.0" if len(version) == 1 else version)


def _identifier(words: set[str], version: str) -> str | None:
    if "cc0" in words or "zero" in words or words == {"public", "domain", "dedication"}:
        return "CC0-1.0" if words <= {"cc0", "zero", "public", "domain", "dedication"} else None
    if words in ({"mark"}, {"public", "domain"}, {"public", "domain", "mark"}, {"pdm"}):
        return "CC-PDM-1.0"
    if "by" not in words or not words <= set(_CONDITIONS) or {"sa", "nd"} <= words:
        return None
    conditions = "-".join(word for word in _CONDITIONS if word in words).upper()
    return f"CC-{conditions}-{version or _CURRENT}"
