"""Ask the server of this container whether it serves; the image's health check: `python -P -m server.health`."""

from __future__ import annotations

import os
import sys
import urllib.request

from server.variables import PREFIX, is_service_link

_TIMEOUT_S = 1.0
_EVERYWHERE = {"", "::", "[::]", "0.0.0.0"}  # noqa: S104 - what a server may listen on


def url() -> str:
    """Return where `/healthz` is, by the variables that the server reads too."""
    name = f"{PREFIX}HTTP_PORT"
    port = os.environ.get(name, "")
    if not port or is_service_link(name, port):
        port = "9095"
    host = os.environ.get(f"{PREFIX}HOST", "")
    if host in _EVERYWHERE or host.startswith("unix:"):
        host = "127.0.0.1"
    elif ":" in host:
        host = f"[{host.strip('[]')}]"
    return f"http://{host}:{port}/healthz"


def main() -> None:
    # Not through the proxy that `http_proxy` names: it does not know what is in here.
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with ask.open(url(), timeout=_TIMEOUT_S) as answer:
            print(answer.read().decode().strip())  # noqa: T201
    except OSError as error:
        sys.exit(f"{url()}: {error}")


if __name__ == "__main__":
    main()
