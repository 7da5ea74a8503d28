"""Every setting of every process as frozen dataclasses: importable without torch, strict JSON in and out."""
