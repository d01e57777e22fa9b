"""Replies of Redis: which replies each of our commands can get, and what each error means for a connection.

Errors are described by their code and in our own words, because a server's text can quote keys, values or a password.
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
    """What an error reply says about the server that sent it.

    Attributes:
        text: a description for people.
        reconnect: whether another server may have taken over. The connection is dropped, and the next one resolves the
            host name again.
        node_failed: whether the server cannot serve any call now. It counts as a failure for the circuit breaker.
    """

    text: str
    reconnect: bool = False
    node_failed: bool = False


_UNKNOWN = Meaning("")

#: By the code that an error reply begins with. An error with another code is only reported.
MEANINGS: Mapping[str, Meaning] = {
    "READONLY": Meaning("it is a replica now and accepts no writes", reconnect=True),
    "NOREPLICAS": Meaning("it has too few replicas to accept writes", reconnect=True),
    "UNBLOCKED": Meaning("its role changed while a read was waiting", reconnect=True),
    "MASTERDOWN": Meaning("it is a replica that lost its primary", reconnect=True, node_failed=True),
    "LOADING": Meaning("it is still loading its data", reconnect=True, node_failed=True),
    "NOAUTH": Meaning("it requires a password", reconnect=True, node_failed=True),
    "WRONGPASS": Meaning("the user or password is wrong", reconnect=True, node_failed=True),
    "BUSY": Meaning("it is busy with a script that does not end", node_failed=True),
    "CLUSTERDOWN": Meaning("its cluster lacks nodes and serves no keys now"),
    "TRYAGAIN": Meaning("the slot of the keys is being moved to another node"),
    "CROSSSLOT": Meaning("the keys belong to several slots"),
    "MOVED": Meaning("another node of its cluster holds the key"),
    "ASK": Meaning("another node of its cluster holds the key for now"),
    "MISCONF": Meaning("it cannot save to its disk and accepts no writes"),
    "OOM": Meaning("its memory is full (maxmemory) and it accepts no writes"),
    "NOPERM": Meaning("the user is not allowed to use this command or key"),
    "WRONGTYPE": Meaning("the key holds a value of another type"),
    "NOSCRIPT": Meaning("it does not know the script"),
    "EXECABORT": Meaning("it aborted the transaction"),
    "BUSYGROUP": Meaning("the consumer group exists already"),
    "NOGROUP": Meaning("the stream or its consumer group does not exist"),
    "ERR": Meaning("it refused the command"),
}

#: Texts of ERR replies that quote nothing. redis-py recognises some of them.
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
#: Up to Redis 6.2, a command that fails in a script gives an ERR that quotes the original error.
_IN_SCRIPT = re.compile(r"^Error running script .*@user_script: ?\d+: -?([A-Z]{2,20})\b")
_HOST = re.compile(rb"[0-9A-Za-z.:_-]{1,253}\Z")
_REDIRECT = re.compile(r"(?:MOVED|ASK) \d{1,5} (?:[0-9A-Za-z.:_-]{1,253})?:\d{1,5}\Z")


def error_of(text: str) -> Exception:
    """Return the exception of redis-py for an error reply, without the text that the server wrote.

    Raises:
        MalformedReplyError: the reply is a redirect that does not name a node.
    """
    code, _, rest = text.partition(" ")
    if inner := _IN_SCRIPT.search(rest):
        code = inner[1]
    if code in {"MOVED", "ASK"}:
        if not _REDIRECT.match(text):
            raise MalformedReplyError("a redirect does not name a node")
    elif code == "ERR":
        text = f"ERR {next((known for known in _ERR_TEXTS if rest.startswith(known)), MEANINGS['ERR'].text)}"
    elif code in MEANINGS:
        text = f"{code} {MEANINGS[code].text}"
    else:
        text = code if _CODE.match(code) else "an error without a code"
    error: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]
    return error


def code_of(error: RedisError) -> str:
    """Return the code of an error that `error_of` returned."""
    return error.status_code or str(error).partition(" ")[0]


def meaning_of(error: RedisError) -> Meaning:
    """Return what an error says about its server."""
    return MEANINGS.get(code_of(error), _UNKNOWN)


def meanings_of(replies: Iterable[Reply]) -> list[Meaning]:
    """Return what the errors among the replies say about their server; the other replies say nothing."""
    return [meaning_of(reply) for reply in replies if isinstance(reply, RedisError)]


def failure_of(error: ResponseError, what: str, name: str = "") -> StoreUnavailableError:
    """Return the exception for a command that a node answered with an error; that error is its cause.

    Args:
        error: the reply.
        what: what the command does, such as "a read".
        name: the name of the node, if it is known.
    """
    at, told = f" at {name}" if name else "", meaning_of(error).text or "it answered with an error"
    of_a_cluster = isinstance(error, MovedError) or code_of(error) == "CROSSSLOT"
    advice = "; use redis+cluster:// for a cluster" if of_a_cluster else ""
    failure = StoreUnavailableError(f"Redis{at} failed {what}: {code_of(error)}, {told}{advice}")
    failure.__cause__ = error
    return failure


def is_answer(command: Command, reply: Reply) -> bool:
    """Return whether a reply that is no error has the form that the command gets."""
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


def are_values(count: int, reply: Reply) -> bool:
    """Return whether this is a reply to an MGET of `count` keys."""
    return isinstance(reply, list) and len(reply) == count and _of_types(reply, bytes, NoneType)


def _are_values(command: Command, reply: Reply) -> bool:
    return are_values(len(command) - 1, reply)


def _is_page(_: Command, reply: Reply) -> bool:
    """Return whether this is a reply to SCAN: the next cursor and keys."""
    match reply:
        case [bytes() as cursor, list() as keys]:
            return cursor.isdigit() and _of_types(keys, bytes)
    return False


def _is_layout(_: Command, reply: Reply) -> bool:
    """Return whether this is a reply to CLUSTER SLOTS: ranges, each with its primary first."""
    return isinstance(reply, list) and all(map(_is_range, reply))


def _is_range(found: Reply) -> bool:
    match found:
        case [int() as first, int() as last, [bytes() | None as host, int() as port, *_], *_]:
            return 0 <= first <= last < SLOTS and 0 <= port < 1 << 16 and (not host or bool(_HOST.match(host)))
    return False


def _is_number_in_stream(found: Reply) -> bool:
    return isinstance(found, bytes) and bool(_STREAM_NUMBER.match(found))


def _are_streams(_: Command, reply: Reply) -> bool:
    """Return whether this is a reply to XREADGROUP for one stream: nothing, or its name and entries."""
    match reply:
        case None:
            return True
        case [[bytes(), list() as entries]]:
            return all(map(_is_entry, entries))
    return False


def _are_claimed(_: Command, reply: Reply) -> bool:
    """Return whether this is a reply to XAUTOCLAIM: a cursor, entries or nil, and since Redis 7 the deleted ids."""
    match reply:
        case [cursor, list() as entries, *gone] if all(isinstance(one, list) for one in gone):
            return _is_number_in_stream(cursor) and all(entry is None or _is_entry(entry) for entry in entries)
    return False


def _is_entry(found: Reply) -> bool:
    """Return whether this is an entry of a stream: its id, then names and values, or nil if it was deleted."""
    match found:
        case [number, None]:
            return _is_number_in_stream(number)
        case [number, list() as fields]:
            return _is_number_in_stream(number) and len(fields) % 2 == 0 and _of_types(fields, bytes)
    return False


def _are_groups(_: Command, reply: Reply) -> bool:
    """Return whether this is a reply to XINFO GROUPS: for each consumer group, a list of names and values."""
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
    """Return whether this is a reply to XPENDING without a range: the count, the first and last id, the consumers."""
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
    "DBSIZE": _is_number,
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
