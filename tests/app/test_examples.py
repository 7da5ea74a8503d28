"""What newcomers begin with works: the examples, the notebook and the README's lines of Python, each in few steps."""

import re
from pathlib import Path

import custom_method
import custom_scene
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from raydream.diffusion.methods import METHODS, Eps, Method, csd, sds
from raydream.scene.protocol import Scene
from raydream.seeds import generator

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("method", ["sds", "vsd"])
def test_pictures_become_scenes(method: str) -> None:
    pictures = custom_scene.distil(custom_scene.picture_run("a red chair", method, 2, 2))
    assert pictures.shape == (2, 64, 64, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert (pictures[0] - pictures[1]).abs().mean() > 0.01


def test_a_picture_is_a_scene_whose_state_comes_back() -> None:
    scene, other = (custom_scene.PictureScene(generator(seed, "scene", 0, 0)) for seed in (0, 1))
    assert isinstance(scene, Scene)
    other.load_state(scene.state())
    assert torch.equal(other.latent, scene.latent)


def test_the_method_of_the_example_lies_between_the_two_it_names() -> None:
    draws = torch.Generator().manual_seed(0)
    guided, negative, noise = torch.randn(3, 2, 4, 8, 8, generator=draws)
    w_t = torch.tensor([0.5, 2.0])

    def at(abar: float) -> Eps:
        return Eps(guided, negative, None, noise, torch.zeros_like(noise), torch.full((2,), abar))

    torch.testing.assert_close(custom_method.fading(at(0.0), w_t), csd(at(0.0), w_t))
    torch.testing.assert_close(custom_method.fading(at(1.0), w_t), sds(at(1.0), w_t))


def test_a_method_of_ones_own_pulls_on_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(custom_method.fading, needs_negative=True)
    monkeypatch.setitem(METHODS, custom_method.BORROWED, row)
    run = custom_method.with_method(custom_scene.picture_run("a red chair", "sds", 1, 2), custom_method.BORROWED)
    other = custom_method.with_method(run, "csd")
    assert not torch.equal(custom_scene.distil(run), custom_scene.distil(other))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom() -> None:
    notebook = nbformat.read(ROOT / "examples" / "raydream.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept: they would differ each time"
    (steps,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    steps.source = "STEPS, PICTURE_STEPS = 2, 2"
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3


@pytest.mark.slow
def test_the_readmes_python_makes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(program.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(program.replace("steps=200", "steps=2"), {})
    assert list(tmp_path.glob("runs/*/particles/*/mesh.glb"))
