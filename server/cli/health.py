"""Ask the server of this container whether it serves; the image's health check: `python -P -m server.cli.health`."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

from server.environment import PREFIX
from server.runtime.listening import http_url

_TIMEOUT_S = 1.0
#: The settings' own, which are too slow to import for this.
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9095


def url() -> str:
    """Return where `/healthz` is, by the variables that the server reads too."""
    host, port = (os.environ.get(f"{PREFIX}{name}", "") for name in ("HOST", "HTTP_PORT"))
    # No number: not set, or by Kubernetes for a Service called pinrank-http.
    return f"{http_url(host or DEFAULT_HOST, int(port) if port.isdecimal() else DEFAULT_PORT)}/healthz"


def main() -> None:
    # Not through the proxy that `http_proxy` names: it does not know what is in here.
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            with ask.open(url(), timeout=_TIMEOUT_S) as answer:
                print(answer.read().decode().strip())  # noqa: T201
        except urllib.error.HTTPError as error:  # it is there, and says why it does not serve
            sys.exit(f"{url()}: {error}\n{error.read().decode()}")
    except OSError as error:
        sys.exit(f"{url()}: {error}")


if __name__ == "__main__":
    main()
