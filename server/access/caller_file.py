"""Reads the file of callers (TOML), and says what is wrong with it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_store.bundle.plain_files import UnfitFileError, read_plain
from server.access.callers import Anonymous, Caller, Callers, Permission, Unit, buckets
from server.access.jwts import JwtVerifier
from server.access.token_bucket import TokenBucket
from server.config import ConfigError
from server.scheduling.lanes import Lane

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RESERVED = ("admin", "anonymous", "unknown")
#: Each caller has metrics of its own.
_CALLERS_MAX = 500
_BYTES_MAX = 1 << 20

Rate = Annotated[float, Field(gt=0, le=1e9)]


def _is_sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("use the SHA-256 of a token in hexadecimal, 64 digits: printf %s TOKEN | sha256sum")
    return text.lower()


class _Rights(BaseModel):
    """What calls with and without an identity have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    may: tuple[Permission, ...]
    requests_per_s: Rate | None = None
    rows_per_s: Rate | None = None
    actions_per_s: Rate | None = None
    burst_s: Annotated[float, Field(gt=0, le=3_600)] = 1.0
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    share: Annotated[float, Field(gt=0, le=1_000)] = 1.0

    @property
    def claim(self) -> Lane:
        return Lane(self.priority, self.share)

    def quotas(self) -> dict[Unit, TokenBucket]:
        per_s: dict[Unit, float | None] = {
            "requests": self.requests_per_s, "rows": self.rows_per_s, "actions": self.actions_per_s,
        }  # fmt: skip
        return buckets(per_s, self.burst_s)


class _CallerSettings(_Rights):
    certificates: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    tokens_sha256: tuple[Annotated[str, AfterValidator(_is_sha256)], ...] = ()
    subjects: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    speaks_for_others: bool = False

    @model_validator(mode="after")
    def _can_be_known(self) -> _CallerSettings:
        if not (self.certificates or self.tokens_sha256 or self.subjects):
            raise ValueError("nothing tells its calls from others; give certificates, tokens_sha256 or subjects")
        return self


class _JwtSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    jwks: Path
    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]


class _CallerFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    anonymous: _Rights = _Rights(may=())
    callers: Annotated[dict[str, _CallerSettings], Field(min_length=1, max_length=_CALLERS_MAX)]
    jwt: _JwtSettings | None = None

    @model_validator(mode="after")
    def _models_need_an_identity(self) -> _CallerFile:
        if Permission.MODELS in self.anonymous.may:
            raise ValueError("anonymous.may: only callers with an identity may manage models")
        return self

    @model_validator(mode="after")
    def _subjects_can_be_checked(self) -> _CallerFile:
        with_subjects = [name for name, one in self.callers.items() if one.subjects]
        if with_subjects and self.jwt is None:
            raise ValueError(f"callers.{with_subjects[0]}.subjects: add [jwt] with jwks, issuer and audience")
        return self


def read_callers(path: Path) -> tuple[Callers, JwtVerifier | None, bytes]:
    """Read a file of callers.

    Returns:
        The callers, what verifies their JWTs, and the content of all files read.

    Raises:
        ConfigError: a file cannot be read, or names callers that cannot be told apart; the message names the entry.
    """
    content = _content(path)
    try:
        given = _CallerFile.model_validate(tomllib.loads(content.decode()), strict=False)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"callers_file {path}: no valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"callers_file {path}: {'; '.join(_problems(error))}") from error
    named = {name: _named(path, name, one) for name, one in given.callers.items()}
    verifier = None
    if given.jwt is not None:
        keys = _content(path.parent / given.jwt.jwks)
        content += b"\0" + keys
        try:
            verifier = JwtVerifier(json.loads(keys), given.jwt.issuer, given.jwt.audience)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"callers_file {path}: jwt.jwks {given.jwt.jwks}: {error}") from error
    callers = Callers(
        Anonymous(frozenset(given.anonymous.may), given.anonymous.claim, given.anonymous.quotas()),
        _by(path, given, "certificates", named),
        {bytes.fromhex(digest): caller for digest, caller in _by(path, given, "tokens_sha256", named).items()},
        _by(path, given, "subjects", named),
        {caller.flow: caller for caller in named.values()},
    )
    return callers, verifier, content


def _content(path: Path) -> bytes:
    try:
        return read_plain(path, _BYTES_MAX, follow_links=True)  # a pipe would hold up the event loop
    except UnfitFileError as error:
        raise ConfigError(f"callers_file: {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"callers_file: cannot read {path}: {error.strerror}") from error


def _named(path: Path, name: str, given: _CallerSettings) -> Caller:
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"callers_file {path}: callers.{name}: use a name of small letters, digits, '.', '_' and '-', at most 63, "
            f"and none of {', '.join(_RESERVED)}"
        )
    return Caller(name, frozenset(given.may), given.claim, given.quotas(), name, given.speaks_for_others)


def _by(path: Path, given: _CallerFile, kind: str, named: dict[str, Caller]) -> dict[str, Caller]:
    """Return the callers by what they identify themselves with, one kind of it."""
    found: dict[str, Caller] = {}
    for name, one in given.callers.items():
        identities: Sequence[str] = getattr(one, kind)
        for identity in identities:
            if (other := found.setdefault(identity, named[name])) is not named[name]:
                raise ConfigError(
                    f"callers_file {path}: callers.{name}.{kind} and callers.{other.name}.{kind} both have {identity!r}"
                )
    return found


def _problems(error: ValidationError) -> Iterator[str]:
    for one in error.errors(include_url=False, include_input=False):
        where: tuple[Any, ...] = one["loc"]
        yield f"{'.'.join(map(str, where))}: {one['msg']}" if where else one["msg"]
