"""What Redis servers answer: which replies each command of ours may get, and what each error means for a connection.

Errors are named by their code, in our words: a server's text may quote keys, values or a password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType

from redis._parsers import BaseParser
from redis.exceptions import MovedError, RedisError, ResponseError

from feature_client.stores.redis.resp import MalformedReplyError, Reply
from feature_client.stores.redis.slots import SLOTS
from feature_client.stores.store import StoreUnavailableError

Command = tuple[bytes | str | int, ...]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an error reply says of the server that sent it.

    Attributes:
        text: for people.
        reconnect: another server may have taken over: the connection is dropped, and the next one looks its name up
            again.
        node_failed: the server can do nothing now: its circuit breaker hears of it.
    """

    text: str
    reconnect: bool = False
    node_failed: bool = False


_UNKNOWN = Meaning("")

#: By the code that an error reply begins with. What is not here is only told.
MEANINGS: Mapping[str, Meaning] = {
    "READONLY": Meaning("it is a replica now and takes no writes", reconnect=True),
    "NOREPLICAS": Meaning("it has too few replicas to take writes", reconnect=True),
    "UNBLOCKED": Meaning("its role changed while a read waited", reconnect=True),
    "MASTERDOWN": Meaning("it is a replica that lost its primary", reconnect=True, node_failed=True),
    "LOADING": Meaning("it is still loading its data", reconnect=True, node_failed=True),
    "NOAUTH": Meaning("it asks for a password", reconnect=True, node_failed=True),
    "WRONGPASS": Meaning("user or password are wrong", reconnect=True, node_failed=True),
    "BUSY": Meaning("it runs a script that does not end", node_failed=True),
    "CLUSTERDOWN": Meaning("its cluster lacks nodes and serves no keys now"),
    "TRYAGAIN": Meaning("the keys' slot is on its way to another node"),
    "CROSSSLOT": Meaning("the keys are of several slots"),
    "MOVED": Meaning("another node of its cluster holds the key"),
    "ASK": Meaning("another node of its cluster holds the key for now"),
    "MISCONF": Meaning("it cannot save to its disk and takes no writes"),
    "OOM": Meaning("its memory is full (maxmemory) and it takes no writes"),
    "NOPERM": Meaning("its user may not use this command or key"),
    "WRONGTYPE": Meaning("the key holds a value of another kind"),
    "NOSCRIPT": Meaning("it does not know the script"),
    "EXECABORT": Meaning("it gave the transaction up"),
    "BUSYGROUP": Meaning("the consumer group is there already"),
    "NOGROUP": Meaning("the stream or its consumer group is gone"),
    "ERR": Meaning("it refused the command"),
}

#: Texts of ERR replies that quote nothing; redis-py knows some of them by heart.
_ERR_TEXTS = (
    "max number of clients reached",
    "invalid password",
    "wrong number of arguments for 'auth' command",
    "wrong number of arguments for 'AUTH' command",
    (
        "AUTH <password> called without any password configured for the default user. "
        "Are you sure your configuration is correct?"
    ),
    "Client sent AUTH, but no password is set",
    "DB index is out of range",
    "invalid DB index",
    "SELECT is not allowed in cluster mode",
    "This instance has cluster support disabled",
    "unknown command",
)
_CODE = re.compile(r"[A-Z]{2,20}\Z")
_STREAM_NUMBER = re.compile(rb"\d{1,20}-\d{1,20}\Z")
#: Up to Redis 6.2 a command that fails in a script is an ERR that quotes the error.
_IN_SCRIPT = re.compile(r"^Error running script .*@user_script: ?\d+: -?([A-Z]{2,20})\b")
_HOST = re.compile(rb"[0-9A-Za-z.:_-]{1,253}\Z")
_REDIRECT = re.compile(r"(?:MOVED|ASK) \d{1,5} (?:[0-9A-Za-z.:_-]{1,253})?:\d{1,5}\Z")


def error_of(text: str) -> Exception:
    """Return redis-py's exception for an error reply, without what the server wrote in its own words.

    Raises:
        MalformedReplyError: a redirect that names no node.
    """
    code, _, rest = text.partition(" ")
    if inner := _IN_SCRIPT.search(rest):
        code = inner[1]
    if code in {"MOVED", "ASK"}:
        if not _REDIRECT.match(text):
            raise MalformedReplyError("a redirect that names no node")
    elif code == "ERR":
        text = f"ERR {next((known for known in _ERR_TEXTS if rest.startswith(known)), MEANINGS['ERR'].text)}"
    elif code in MEANINGS:
        text = f"{code} {MEANINGS[code].text}"
    else:
        text = code if _CODE.match(code) else "an error without a code"
    error: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]
    return error


def code_of(error: RedisError) -> str:
    """Return the code of an error that `error_of` made."""
    return error.status_code or str(error).partition(" ")[0]


def meaning_of(reply: Reply) -> Meaning:
    """Return what a reply says of its server; nothing, for all but errors."""
    return MEANINGS.get(code_of(reply), _UNKNOWN) if isinstance(reply, RedisError) else _UNKNOWN


def failure_of(error: ResponseError, what: str, name: str = "") -> StoreUnavailableError:
    """Return what a caller is told when a node answered a command with an error; the error is its cause.

    Args:
        error: the reply.
        what: was asked.
        name: of the node, where it is known.
    """
    at, told = f" at {name}" if name else "", meaning_of(error).text or "it answered with an error"
    of_a_cluster = isinstance(error, MovedError) or code_of(error) == "CROSSSLOT"
    advice = "; use redis+cluster:// for a cluster" if of_a_cluster else ""
    failure = StoreUnavailableError(f"Redis{at} failed {what}: {code_of(error)}, {told}{advice}")
    failure.__cause__ = error
    return failure


def is_answer(command: Command, reply: Reply) -> bool:
    """Tell whether a reply, no error, is of the kind that the command gets."""
    return _ANSWERS[str(command[0])](command, reply)


def _is_ok(_: Command, reply: Reply) -> bool:
    return bool(reply == "OK")


def _is_number(_: Command, reply: Reply) -> bool:
    return isinstance(reply, int)


def _is_value(_: Command, reply: Reply) -> bool:
    return reply is None or isinstance(reply, bytes)


def _is_added(_: Command, reply: Reply) -> bool:
    return _is_number_in_stream(reply)


def _is_echo(command: Command, reply: Reply) -> bool:
    return bool(reply == (command[1] if len(command) > 1 else "PONG"))


def _are_values(command: Command, reply: Reply) -> bool:
    return isinstance(reply, list) and len(reply) == len(command) - 1 and _of_types(reply, bytes, NoneType)


def _is_page(_: Command, reply: Reply) -> bool:
    """Tell whether it is of a SCAN: the next cursor and keys."""
    match reply:
        case [bytes() as cursor, list() as keys]:
            return cursor.isdigit() and _of_types(keys, bytes)
    return False


def _is_layout(_: Command, reply: Reply) -> bool:
    """Tell whether it is of CLUSTER SLOTS: ranges, each with its primary first."""
    return isinstance(reply, list) and all(map(_is_range, reply))


def _is_range(found: Reply) -> bool:
    match found:
        case [int() as first, int() as last, [bytes() | None as host, int() as port, *_], *_]:
            return 0 <= first <= last < SLOTS and 0 <= port < 1 << 16 and (not host or bool(_HOST.match(host)))
    return False


def _is_number_in_stream(found: Reply) -> bool:
    return isinstance(found, bytes) and bool(_STREAM_NUMBER.match(found))


def _are_streams(_: Command, reply: Reply) -> bool:
    """Tell whether it is of an XREADGROUP of one stream: nothing, or its name and entries."""
    match reply:
        case None:
            return True
        case [[bytes(), list() as entries]]:
            return all(map(_is_entry, entries))
    return False


def _are_claimed(_: Command, reply: Reply) -> bool:
    """Tell whether it is of an XAUTOCLAIM: where to go on, entries (nil where one is gone), in Redis 7 those gone."""
    match reply:
        case [cursor, list() as entries, *gone] if all(isinstance(one, list) for one in gone):
            return _is_number_in_stream(cursor) and all(entry is None or _is_entry(entry) for entry in entries)
    return False


def _is_entry(found: Reply) -> bool:
    """Tell whether it is an entry of a stream: its number, and names and values, nil when it was deleted."""
    match found:
        case [number, None]:
            return _is_number_in_stream(number)
        case [number, list() as fields]:
            return _is_number_in_stream(number) and len(fields) % 2 == 0 and _of_types(fields, bytes)
    return False


def _are_groups(_: Command, reply: Reply) -> bool:
    """Tell whether it is of XINFO GROUPS: by consumer group, a list of names and what they stand for."""
    return isinstance(reply, list) and all(map(_is_group, reply))


def _is_group(found: Reply) -> bool:
    if not isinstance(found, list) or len(found) % 2 or not _of_types(found[::2], bytes):
        return False
    told = dict(zip(found[::2], found[1::2], strict=True))
    return (
        isinstance(told.get(b"name"), bytes)
        and isinstance(told.get(b"pending"), int)
        and _is_number_in_stream(told.get(b"last-delivered-id"))
    )


def _is_summary(_: Command, reply: Reply) -> bool:
    """Tell whether it is of an XPENDING without a range: how many, the first, the last, and by consumer."""
    match reply:
        case [int(), None, None, list() | None]:
            return True
        case [int(), first, last, list()]:
            return _is_number_in_stream(first) and _is_number_in_stream(last)
    return False


def _of_types(found: Iterable[Reply], *types: type) -> bool:
    return set(map(type, found)) <= set(types)


_ANSWERS: Mapping[str, Callable[[Command, Reply], bool]] = {
    "ASKING": _is_ok,
    "CLUSTER": _is_layout,
    "EVAL": _is_number,
    "GET": _is_value,
    "MGET": _are_values,
    "MSET": _is_ok,
    "PING": _is_echo,
    "SCAN": _is_page,
    "SET": _is_ok,
    "XACK": _is_number,
    "XADD": _is_added,
    "XAUTOCLAIM": _are_claimed,
    "XGROUP": _is_ok,
    "XINFO": _are_groups,
    "XPENDING": _is_summary,
    "XREADGROUP": _are_streams,
    "XTRIM": _is_number,
}
