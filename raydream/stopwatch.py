"""How long an actor's work takes: by the clock on a CPU, by events where a GPU works on after the call has returned."""

import time

import torch


class Stopwatch:
    """Starts when it is made. Seconds of the device, and of the processor by this thread."""

    def __init__(self, device: torch.device) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.thread_time()
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def figures(self, name: str) -> dict[str, float]:
        """``time/NAME_s`` and ``cpu/NAME_s`` until now; waits for what the device was given to do before."""
        if self._events is None:
            return {f"time/{name}_s": time.perf_counter() - self._wall_s, f"cpu/{name}_s": self._used_s()}
        begin, end = self._events
        end.record()
        end.synchronize()
        return {f"time/{name}_s": begin.elapsed_time(end) / 1000, f"cpu/{name}_s": self._used_s()}

    def _used_s(self) -> float:
        return time.thread_time() - self._cpu_s
