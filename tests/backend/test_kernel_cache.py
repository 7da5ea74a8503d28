"""Where numba keeps compiled kernels when neither the code nor the home can be written, as in a read-only container."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from numba.core import caching

from raydream.backend import find_cache
from raydream.cluster.ray_runtime import actor_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def _double(value: float) -> float:
    return 2 * value


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To numba nothing can be written but what ``NUMBA_CACHE_DIR`` names, and that names nothing."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda *_arguments, **_settings: None)
    find_cache.cache_clear()


def test_a_temporary_cache_is_taken_and_told_once(read_only: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(_double)
    with caplog.at_level(logging.WARNING):
        find_cache()
        find_cache()
    assert sum("set NUMBA_CACHE_DIR" in message for message in caplog.messages) == 1
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert numba.njit(cache=True)(_double)(1.5) == 3.0
    assert list(folder.rglob("*.nbi"))
    assert actor_environment({"CPU": 1.0})["NUMBA_CACHE_DIR"] == str(folder)  # n actors do not compile n times


def test_where_it_can_be_written_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    find_cache.cache_clear()
    find_cache()
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_a_real_read_only_container(tmp_path: Path) -> None:
    """The import of the kernels, which is where numba looks for its cache."""
    code = "from raydream.backend import load_backend; print(load_backend('numba', 'cpu').name)"
    script = f"""
        mount --bind "{ROOT}" "{ROOT}" && mount -o remount,ro,bind "{ROOT}" && mount --bind "$HOME" "$HOME" &&
        mount -o remount,ro,bind "$HOME" || exit 9
        cd "{tmp_path}" && touch "{ROOT}/raydream/__init__.py" 2>&1 | grep -q Read-only && "$PYTHON" -c "{code}"
    """
    can_mount = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0
    if not can_mount:
        pytest.skip("needs root and `unshare -m`, for a read-only view of the code and the home")
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "HOME": str(home)}
    environment.pop("NUMBA_CACHE_DIR", None)
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode == 9:
        pytest.skip("this container may not mount")
    assert done.stdout == "numba\n", done.stderr
    assert done.stderr.count("set NUMBA_CACHE_DIR to a folder to keep them") == 1
