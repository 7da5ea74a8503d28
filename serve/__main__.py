"""The service on one machine or as a job of a cluster, at RAYDREAM_SERVE_HOST and RAYDREAM_SERVE_PORT.

python -m serve
"""

import os
import signal
import sys
import threading

from ray import serve

from raydream.ray_runtime import connect
from serve.app import app
from serve.keys import Keys
from serve.settings import Settings, is_loopback

# Processes of a machine that computes on all its cores answer late; Ray Serve gives up on its proxy after 5 s.
_PATIENCE_S = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}


def main() -> int:
    """Starts Ray and the service, and ends both on SIGINT or SIGTERM; 2 for settings that cannot be."""
    try:
        settings = Settings.from_environment()
        if not is_loopback(settings.host) and not Keys(settings.keys_file).are_needed:
            raise ValueError(
                f"RAYDREAM_SERVE_HOST: {settings.host} is reachable by others, which needs API keys; "
                "make one by `python -m serve.keys add NAME`, or stay at 127.0.0.1"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, seconds in _PATIENCE_S.items():
        os.environ.setdefault(name, seconds)
    connect()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which takes them for itself
        signal.signal(number, lambda *_: stop.set())
    serve.start(http_options={"host": settings.host, "port": settings.port}, proxy_location="HeadOnly")
    serve.run(app({}), name="raydream", route_prefix="/")
    print(f"raydream answers at http://{settings.host}:{settings.port}", file=sys.stderr)
    stop.wait()
    serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
