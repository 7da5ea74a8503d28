"""Asset libraries in the layouts of other people, for the tests of assets."""

import gzip
import json
from pathlib import Path

import pytest
from gltf_writer import GltfWriter

from raydream.assets.libraries import AssetRecord, iterate_objaverse_folder

SHARED = Path(__file__).resolve().parents[3] / "shared" / "assets"
MINIPACK = SHARED / "minipack"  # CC0 models, beside the checkout where there are any
needs_minipack = pytest.mark.skipif(not MINIPACK.is_dir(), reason=f"no asset library at {MINIPACK}")


def objaverse_folder(root: Path) -> Path:
    """Two objects in the Objaverse layout, one of them in LVIS."""
    paths = {"a" * 32: f"glbs/000-000/{'a' * 32}.glb", "Zz9" * 9: f"glbs/000-159/{'Zz9' * 9}.glb"}
    (root / "metadata").mkdir(parents=True)
    for uid, path in paths.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        GltfWriter().save(root / path)
        annotation = {
            "name": f"Model {uid[0]}", "tags": [{"name": "LowPoly"}], "categories": [{"name": "furniture-home"}],
            "license": "by", "faceCount": 9, "archives": {"glb": {"faceCount": 1, "size": 500}},
        }  # fmt: skip
        with gzip.open(root / "metadata" / f"{path.split('/')[1]}.json.gz", "wt") as file:
            json.dump({uid: annotation}, file)
    for name, content in (("object-paths", paths), ("lvis-annotations", {"ship_(vessel)": ["a" * 32]})):
        with gzip.open(root / f"{name}.json.gz", "wt") as file:
            json.dump(content, file)
    return root


def read_objaverse_folder(folder: Path, uids: frozenset[str] = frozenset()) -> list[AssetRecord]:
    """The records of ``iterate_objaverse_folder``, by uid."""
    return sorted(iterate_objaverse_folder(folder, uids), key=lambda record: record.uid)
