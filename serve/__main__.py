"""The service on one machine or as a job of a cluster, at RAYDREAM_SERVE_HOST and RAYDREAM_SERVE_PORT.

python -m serve
"""

import signal
import sys
import threading

from ray import serve

from raydream.connection import connect
from serve.app import listening
from serve.keys import Keys
from serve.listener import open_door
from serve.settings import Settings, is_loopback


def main() -> int:
    """Starts Ray and the service, and ends both on SIGINT or SIGTERM; 2 for settings that cannot be and a cluster
    that does not answer.
    """
    try:
        settings = Settings.from_environment()
        if not is_loopback(settings.host) and not Keys(settings.keys_file).are_needed:
            raise ValueError(
                f"RAYDREAM_SERVE_HOST: {settings.host} is reachable by others, which needs API keys; "
                "make one by `python -m serve.keys add NAME`, or stay at 127.0.0.1"
            )
        open_door(settings, is_shared=False).close()  # a replica's share of somebody else's port would be no error
        connect()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which takes them for itself
        signal.signal(number, lambda *_: stop.set())
    serve.start(proxy_location="Disabled")
    serve.run(listening(settings), name="raydream", route_prefix=None)
    print(f"raydream answers at http://{settings.host}:{settings.port}", file=sys.stderr)
    stop.wait()
    serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
