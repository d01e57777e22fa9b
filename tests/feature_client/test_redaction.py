"""What is shown of URLs and of servers' errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_client.redaction import hidden, redacted, secrets_of
from feature_client.stores.open_store import open_store
from feature_client.stores.redis.node import RedisNode
from feature_client.stores.store import StoreConfigError, StoreUnavailableError
from tests.scripted_redis import ScriptedRedis, echo, echoing_error

PASSWORD = "planted-password"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:planted-password@host:6379/0?password=planted-password", "redis://host:6379/0"),
        ("redis://:planted-password@host", "redis://host"),
        ("redis://:planted/-password@host:6379/0", "redis://host:6379/0"),
        ("redis://:pl@nted-planted-password@host/0", "redis://host/0"),
        ("redis://:what?planted-password@host/0", "redis://***"),
        ("redis://host/0?password=pl@nted-password", "redis://***"),
        ("redis://:planted#password@host", "redis://***"),
        ("user:planted-password@host:6379", "***"),
        ("lmdb:///var/lib/features", "lmdb:///var/lib/features"),
        ("memory://", "memory://"),
    ],
)
def test_urls_are_shown_without_their_secrets(url, shown):
    assert redacted(url) == shown


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=6, max_size=20))
def test_no_password_shows_however_it_is_written_into_a_url(password):
    assert password not in redacted(f"redis://planteduser:{password}@h:1/0").removeprefix("redis://")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:planted/planted-password@host:6379/0",
        "redis://user:planted-password@host:port/0",
        "redis://user:planted-password@ho\u2100st/0",
        "redis://user:planted-password@[::1/0",
        "lmdb://user:planted-password@host/features",
        "ldap://user:planted-password@host",
        "user:planted-password@host",
        "redis://host/0?socket_timeout=soon&password=planted-password",
        "redis://host/0?no_such_option=planted-password",
    ],
)
async def test_a_url_that_cannot_be_used_is_refused_without_its_password(url):
    with pytest.raises(StoreConfigError) as refused:
        await open_store(url).start()
    assert "planted" not in str(refused.value)
    assert refused.value.__context__ is None or refused.value.__suppress_context__


def test_passwords_are_known_in_every_form_in_which_they_may_be_quoted():
    assert secrets_of("redis://user:pl%40nted@host/0?ssl_password=other-one") == {"pl@nted", "pl%40nted", "other-one"}
    assert secrets_of("redis://host:6379/0") == set()
    assert hidden("AUTH user pl@nted failed", secrets_of("redis://:pl%40nted@host")) == "AUTH user *** failed"


def no_permission(_: list[bytes]) -> bytes:
    """Refuse as Redis does where a user's rules do not let it."""
    return b"-NOPERM User planted-user has no permissions to run the 'mget' command\r\n"


@pytest.mark.parametrize("answer", [echoing_error, echo, no_permission], ids=lambda answer: answer.__name__)
async def test_a_server_that_sends_back_what_it_was_sent_brings_no_password_into_errors(answer):
    async with ScriptedRedis(answer) as server:
        node = RedisNode(f"redis://planted-user:{PASSWORD}@127.0.0.1:{server.port}/0", 1, 5.0)
        try:
            replies = await node.call([("MGET", b"planted-key")], None, idempotent=False)
        except StoreUnavailableError as error:
            replies = [error]
        assert "planted" not in repr([str(reply) for reply in replies])
        await node.close()
