"""Turns on a GPU between processes: one at a time, and given back by whoever dies."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from raydream.cluster.turns import turn_on_gpu

HOLD = """
import sys, time
from raydream.cluster.turns import turn_on_gpu
with turn_on_gpu():
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_turn_ends_with_its_process_and_is_one_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("CUDA_VISIBLE_DEVICES", "4")
            with turn_on_gpu():  # another GPU is nobody's business
                assert holder.poll() is None
        killing = threading.Timer(0.3, holder.kill)
        killing.start()
        with turn_on_gpu():
            assert holder.wait() == -signal.SIGKILL
            assert len(freed) == 1, "what is not in use is given back last"
        with pytest.raises(ValueError, match="out of luck"), turn_on_gpu():
            raise ValueError("out of luck")
        assert len(freed) == 3
    finally:
        holder.kill()
