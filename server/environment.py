"""Tells `PINRANK_*` settings in the environment from variables that Kubernetes sets for Services called pinrank.

By default, Kubernetes gives every container variables for every Service of its namespace ("service links"). Those of a
Service called pinrank or pinrank-canary look like settings.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

PREFIX = "PINRANK_"
#: File with the token that commands send which call a server; a server reads `admin_token_file` instead.
TOKEN_FILE = f"{PREFIX}TOKEN_FILE"
#: TLS of the commands that call a server: authorities, the client's own certificate and key, the server's name.
TLS_CA, TLS_CERT, TLS_KEY, TLS_NAME = (f"{PREFIX}TLS_{name}" for name in ("CA", "CERT", "KEY", "NAME"))
#: Variables that commands read and that are not settings of the server.
OF_COMMANDS = frozenset({TOKEN_FILE, TLS_CA, TLS_CERT, TLS_KEY, TLS_NAME})

_PROTOCOL = "(TCP|UDP|SCTP)"
_LINK = re.compile(r"PINRANK(_[A-Z0-9_]+?)??_(?P<kind>SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_.+)?)")
_LINK_PORT = re.compile(rf"PORT_\d+_{_PROTOCOL}(_(?P<part>PROTO|PORT|ADDR))?")
_URL = re.compile(rf"{_PROTOCOL.lower()}://(?P<host>.+):(?P<port>\d+)")


def is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes set a variable for a Service called pinrank or pinrank-anything.

    The name alone does not tell, because a Service's link can have a setting's name: PINRANK_GRPC_PORT is the setting
    if its value is a number, and the link of a Service called pinrank-grpc if its value is `tcp://10.0.0.1:50051`.
    """
    link = _LINK.fullmatch(name)
    if link is None:
        return False
    kind = link["kind"]
    if kind == "SERVICE_HOST":
        return _is_address(value)
    if kind.startswith("SERVICE_PORT"):
        return _is_port(value)
    if kind == "PORT":
        return _is_url(value)
    port = _LINK_PORT.fullmatch(kind)
    if port is None:
        return False
    match port["part"]:
        case "PROTO":
            return value.upper() == port[1]
        case "PORT":
            return _is_port(value)
        case "ADDR":
            return _is_address(value)
    return _is_url(value)


def service_links(variables: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the variables that Kubernetes set for Services called pinrank or pinrank-anything."""
    return frozenset(name for name, value in variables.items() if is_service_link(name, value))


def _is_url(value: str) -> bool:
    url = _URL.fullmatch(value)
    return url is not None and _is_address(url["host"].strip("[]")) and _is_port(url["port"])


def _is_port(value: str) -> bool:
    return value.isascii() and value.isdecimal() and int(value) <= 65_535


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True
