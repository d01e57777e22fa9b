"""What a file of callers may say, and what is said of one that is wrong."""

from __future__ import annotations

import hashlib
import os

import pytest

from server.access.caller_file import read_callers
from server.access.callers import Permission
from server.config import ConfigError
from server.scheduling.lanes import Lane

DIGEST = hashlib.sha256(b"secret").hexdigest()
GOOD = f"""
[anonymous]
may = ["rank"]
requests_per_s = 5

[callers.home-feed]
certificates = ["spiffe://prod/home-feed", "home-feed.prod.svc"]
tokens_sha256 = ["{DIGEST}"]
may = ["rank", "seen"]
rows_per_s = 1000
burst_s = 2
priority = 3
share = 2.5

[callers.trainer]
certificates = ["trainer"]
may = ["models"]
"""


def test_a_file_names_callers_by_what_they_identify_themselves_with(tmp_path):
    (tmp_path / "callers.toml").write_text(GOOD)
    callers, verifier, content = read_callers(tmp_path / "callers.toml")
    feed = callers.by_token[hashlib.sha256(b"secret").digest()]
    assert (feed.name, feed.flow, feed.claim) == ("home-feed", "home-feed", Lane(3, 2.5))
    assert feed.may == {Permission.RANK, Permission.SEEN}
    assert {unit: bucket.size for unit, bucket in feed.quotas.items()} == {"rows": 2000}
    assert callers.by_certificate["spiffe://prod/home-feed"] is callers.by_certificate["home-feed.prod.svc"] is feed
    assert callers.by_certificate["trainer"].may == {Permission.MODELS}
    anonymous = callers.anonymous.from_peer("ipv4:127.0.0.1:5")
    assert (anonymous.name, anonymous.may) == ("anonymous", {Permission.RANK})
    assert callers.anonymous.from_peer("ipv4:127.0.0.1:6").quotas is anonymous.quotas, "one quota for all of them"
    assert verifier is None
    assert content == GOOD.encode()


def test_without_a_section_calls_without_an_identity_may_nothing(tmp_path):
    (tmp_path / "callers.toml").write_text(GOOD[GOOD.index("[callers.home") :])
    assert not read_callers(tmp_path / "callers.toml")[0].anonymous.may


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "no valid TOML"),
        (b"[callers", "no valid TOML"),
        (b"[" * 100_000, "no valid TOML"),
        (b"", "callers: Field required"),
        (b"[callers]", "callers: Dictionary should have at least 1 item"),
        (b'[callers.a]\nmay = ["rank"]', "nothing tells its calls from others; give certificates, tokens_sha256"),
        (b'[callers.a]\ncertificates = ["a"]', "callers.a.may: Field required"),
        (b'[callers.a]\nmay = ["fly"]\ncertificates = ["a"]', "callers.a.may.0: Input should be 'rank', 'labels'"),
        (b'[callers.a]\nmay = []\ncertificates = ["a"]\nrequest_per_s = 3', "callers.a.request_per_s: Extra inputs"),
        (b'[callers.a]\nmay = []\ncertificates = ["a"]\nrows_per_s = 0', "callers.a.rows_per_s: Input should be gre"),
        (b'[callers.a]\nmay = []\ntokens_sha256 = ["a"]', "callers.a.tokens_sha256.0: Value error, use the SHA-256"),
        (b'[callers.a]\nmay = []\nsubjects = ["a"]', "callers.a.subjects: add [jwt] with jwks, issuer and audience"),
        (b'[callers.A]\nmay = []\ncertificates = ["a"]', "callers.A: use a name of small letters"),
        (b'[callers.admin]\nmay = []\ncertificates = ["a"]', "callers.admin: use a name of small letters"),
        (
            b'[callers.a]\nmay = []\ncertificates = ["x"]\n[callers.b]\nmay = []\ncertificates = ["x"]',
            "callers.b.certificates and callers.a.certificates both have 'x'",
        ),
        (
            b'[anonymous]\nmay = ["models"]\n[callers.a]\nmay = []\ncertificates = ["x"]',
            "only callers with an identity",
        ),
        (
            b'[jwt]\njwks = "none.json"\nissuer = "i"\naudience = "a"\n[callers.a]\nmay = []\nsubjects = ["x"]',
            "none.json: No such file",
        ),
        (b"#" * (1 << 20) + b"#", "it has 1,048,577 bytes, the limit is 1,048,576"),
    ],
)
def test_what_is_wrong_is_said_with_the_place(tmp_path, content, problem):
    (tmp_path / "callers.toml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_callers(tmp_path / "callers.toml")
    assert problem in str(raised.value)
    assert "callers_file" in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"callers_file: cannot read .*no\.toml: No such file"):
        read_callers(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "no key set, an object with `keys`"),
        ('{"keys": []}', "no key set"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}]}', "none of its keys is for one of"),
    ],
)
def test_keys_that_cannot_be_used(tmp_path, keys, problem):
    (tmp_path / "jwks.json").write_text(keys)
    (tmp_path / "callers.toml").write_text(
        '[jwt]\njwks = "jwks.json"\nissuer = "i"\naudience = "a"\n[callers.a]\nmay = []\nsubjects = ["x"]'
    )
    with pytest.raises(ConfigError, match="jwt.jwks") as raised:
        read_callers(tmp_path / "callers.toml")
    assert problem in str(raised.value)


def test_a_pipe_is_no_file_of_callers(tmp_path):
    os.mkfifo(tmp_path / "callers.toml")
    with pytest.raises(ConfigError, match=r"callers.toml: it is a pipe, not a regular file"):
        read_callers(tmp_path / "callers.toml")


def test_keys_that_are_nested_too_deeply_are_refused(tmp_path):
    (tmp_path / "callers.toml").write_text(
        '[callers.a]\nsubjects = ["a"]\nmay = ["rank"]\n[jwt]\njwks = "keys"\nissuer = "i"\naudience = "a"\n'
    )
    (tmp_path / "keys").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="jwt.jwks keys: maximum recursion depth"):
        read_callers(tmp_path / "callers.toml")
