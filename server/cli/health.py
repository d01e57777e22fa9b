"""The image's health check: ask the server in this container for `/healthz` (`python -P -m server.cli.health`)."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

from server.environment import PREFIX
from server.runtime.listening import http_url

_TIMEOUT_S = 1.0
#: The defaults of the settings `host` and `http_port`. Importing the settings would be too slow for a health check.
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9095


def url() -> str:
    """Return the URL of `/healthz`, from the environment variables that the server reads as well."""
    host, port = (os.environ.get(f"{PREFIX}{name}", "") for name in ("HOST", "HTTP_PORT"))
    # A port that is not a number is unset, or Kubernetes set it for a Service called pinrank-http.
    scheme = "https" if os.environ.get(f"{PREFIX}TLS__CERTIFICATE") else "http"
    return f"{http_url(host or DEFAULT_HOST, int(port) if port.isdecimal() else DEFAULT_PORT, scheme)}/healthz"


def main() -> None:
    # Bypass the proxy that `http_proxy` names: it cannot reach addresses inside this container.
    # The certificate is for the name that clients use, and this asks its own container by address.
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked))
    try:
        try:
            with ask.open(url(), timeout=_TIMEOUT_S) as answer:
                print(answer.read().decode().strip())  # noqa: T201
        except urllib.error.HTTPError as error:  # the server answers, and its body says why it is not ready
            sys.exit(f"{url()}: {error}\n{error.read().decode()}")
    except OSError as error:
        sys.exit(f"{url()}: {error}")


if __name__ == "__main__":
    main()
