"""Which kinds of asset file are read, by their suffix, and what to do with the others. No torch, no reader."""

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".usdz", ".zip")
CONVERTERS = {
    ".fbx": "Blender (File, Export, glTF 2.0) or FBX2glTF",
    ".dae": "Blender (File, Export, glTF 2.0) or COLLADA2GLTF",
} | dict.fromkeys((".blend", ".3ds", ".usd", ".usda", ".usdc"), "Blender (File, Export, glTF 2.0)")


def why_unsupported(suffix: str) -> str:
    """What to tell a person whose asset has another suffix: what turns it into one that is read."""
    converter = CONVERTERS.get(suffix.lower())
    if converter:
        return f"{suffix.lower()} is not read; convert it with {converter}"
    return f"{suffix[:20] or 'a file without suffix'} is not read; {', '.join(SUFFIXES)} are"
