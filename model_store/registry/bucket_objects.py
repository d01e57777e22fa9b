"""Objects in an S3-compatible bucket, accessed with obstore."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from feature_client.redaction import hidden
from model_store.registry.objects import ModelStoreError, NoObjectError, RefusedError, StoredObject, UnfitObjectError

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import ClientConfig, ObjectStore, S3Config

#: Variables of the endpoint, the most specific first, in the order of the AWS tools.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
#: Variables whose values must never appear in logs or messages.
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
#: The error code in the XML of a bucket's answer.
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
#: An object that is written twice, conditionally, to test whether the bucket supports conditional writes. It stays, so
#: that the next test ends after one write.
_PROBE = "conditional-writes"


class BucketObjects:
    """Objects in a bucket. `create` is a conditional write (If-None-Match); a bucket that ignores it is refused."""

    def __init__(self, url: str) -> None:
        self.where = url
        try:
            import obstore  # noqa: PLC0415 - model stores in folders do not need it
            from obstore.store import S3Store  # noqa: PLC0415
        except ImportError as error:
            raise ModelStoreError(f"{url}: buckets need obstore: pip install 'pinrank[s3]'") from error
        self._api = obstore
        self._keeps_conditions = False
        with _bucket_explained(url):
            credentials, config = _profile(url)
            endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), config.get("endpoint"))
            client: ClientConfig = {"timeout": "30s", "connect_timeout": "5s"}
            if endpoint:
                config["endpoint"] = endpoint
            if endpoint and endpoint.lower().startswith("http://"):
                client["allow_http"] = True
            self._store: ObjectStore = S3Store.from_url(
                url,
                config=config,
                client_options=client,
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)},
                credential_provider=credentials,
            )

    def get(self, name: str, bytes_max: int) -> bytes:
        with _bucket_explained(self.where):
            try:
                found = self._api.get(self._store, name)
                if found.meta["size"] > bytes_max:
                    raise UnfitObjectError(
                        f"{self.where}/{name}: it has {found.meta['size']:,} bytes, the limit is {bytes_max:,}"
                    )
                return bytes(found.bytes())
            except FileNotFoundError as error:
                raise NoObjectError(f"{self.where} has no object {name}") from error

    def put(self, name: str, content: bytes) -> None:
        with _bucket_explained(self.where):
            self._api.put(self._store, name, content)

    def create(self, name: str, content: bytes) -> bool:
        if not self._keeps_conditions:
            self._check_conditions()
        if self._written_anew(name, content):
            return True
        try:  # our first attempt may have succeeded although its answer was lost
            return self.get(name, len(content)) == content
        except UnfitObjectError:
            return False

    def _check_conditions(self) -> None:
        """Check that the bucket refuses to overwrite an object by a conditional write.

        Raises:
            RefusedError: it overwrites the object.
        """
        # One of two writes must be refused, unless the bucket ignores the condition.
        if all(self._written_anew(_PROBE, b"Of two writers at once, one is refused.\n") for _ in range(2)):
            raise RefusedError(
                f"{self.where}: this bucket ignores If-None-Match and overwrites existing objects, so that one of two "
                "concurrent changes would be lost, with its line in the audit trail; nothing was changed. Use a bucket "
                "with conditional writes (Amazon S3, MinIO, Cloudflare R2, ...), or a folder"
            )
        self._keeps_conditions = True

    def _written_anew(self, name: str, content: bytes) -> bool:
        """Write the object unless it exists. Return whether it was written."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

        with _bucket_explained(self.where):
            try:
                # The condition covers the whole object only in a single request.
                self._api.put(self._store, name, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

    def listed(self, folder: str, after: str = "") -> list[StoredObject]:
        with _bucket_explained(self.where):
            offset = f"{folder}/{after}" if after else None
            metas = [meta for chunk in self._api.list(self._store, folder, offset=offset) for meta in chunk]
        found = [
            StoredObject(
                meta["path"].rpartition("/")[2], meta["size"], meta["last_modified"].timestamp(),
                meta["e_tag"] or str(meta["last_modified"]),
            )
            for meta in metas
            if meta["path"].rpartition("/")[0] == folder  # a bucket also lists objects in subfolders
        ]  # fmt: skip
        return sorted(found, key=lambda one: one.name)

    def folders(self) -> list[str]:
        with _bucket_explained(self.where):
            return sorted(p.rpartition("/")[2] for p in self._api.list_with_delimiter(self._store)["common_prefixes"])

    def delete(self, name: str) -> None:
        with _bucket_explained(self.where):
            self._api.delete(self._store, name)

    def sweep(self, folder: str, age_s_min: float) -> int:  # noqa: ARG002 - an interrupted upload leaves no object
        return 0


def _profile(url: str) -> tuple[Boto3CredentialProvider | None, S3Config]:
    """Return the credentials, region and endpoint of the profile that AWS_PROFILE names.

    As in the AWS tools, keys in the environment take precedence over a profile.
    """
    name = os.environ.get("AWS_PROFILE")
    if not name or os.environ.get("AWS_ACCESS_KEY_ID"):
        return None, {}
    keys = "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"
    try:
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - only AWS profiles need it
        from botocore.session import Session  # noqa: PLC0415
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415
    except ImportError as error:
        raise ModelStoreError(
            f"{url}: AWS_PROFILE is {name!r}, and profiles need boto3: pip install boto3; or {keys}"
        ) from error
    try:
        session = Session(profile=name)
        credentials = Boto3CredentialProvider(session)
        endpoint, region = session.get_scoped_config().get("endpoint_url"), session.get_config_variable("region")
    except (BotoCoreError, ValueError) as error:
        raise ModelStoreError(f"{url}: AWS_PROFILE: {error}; correct the profile, or {keys}") from error
    config: S3Config = {}
    if region:
        config["region"] = region
    if endpoint:
        config["endpoint"] = endpoint
    return credentials, config


@contextmanager
def _bucket_explained(where: str) -> Iterator[None]:
    from obstore.exceptions import BaseError  # noqa: PLC0415

    try:
        yield
    except BaseError as error:
        # The answer of a bucket quotes the key, and the text that it signed.
        reason = str(error).partition("\n")[0].partition("<")[0].strip()
        if code := _CODE.search(str(error)):
            reason = f"{reason} {code[1]}"
        reason = hidden(reason, (os.environ[name] for name in SECRET_VARIABLES if name in os.environ))
        raise ModelStoreError(f"model store {where}: {reason} (credentials and endpoint: AWS_* variables)") from error
