"""Objects of an S3-compatible bucket, through obstore."""

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

#: Where the endpoint may stand, the most specific first, as the AWS tools read it.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
#: What nobody may read in a log.
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
#: In the XML of a refusal.
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
#: Two conditional writes of it show whether the bucket keeps of two writers one. It stays, for the next to see at once.
_PROBE = "conditional-writes"


class BucketObjects:
    """`create` is a conditional write (If-None-Match); a bucket that ignores the condition is refused."""

    def __init__(self, url: str) -> None:
        self.where = url
        try:
            import obstore  # noqa: PLC0415 - folders do not need it
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
                        f"{self.where}/{name}: it has {found.meta['size']:,} bytes, at most {bytes_max:,} are read"
                    )
                return bytes(found.bytes())
            except FileNotFoundError as error:
                raise NoObjectError(f"{self.where} holds no {name}") from error

    def put(self, name: str, content: bytes) -> None:
        with _bucket_explained(self.where):
            self._api.put(self._store, name, content)

    def create(self, name: str, content: bytes) -> bool:
        if not self._keeps_conditions:
            self._check_conditions()
        if self._written_anew(name, content):
            return True
        try:  # a first try whose answer was lost may have been ours
            return self.get(name, len(content)) == content
        except UnfitObjectError:
            return False

    def _check_conditions(self) -> None:
        """Find out whether the bucket refuses to write what is there.

        Raises:
            RefusedError: it does not.
        """
        # The second is refused where the first was not, unless the bucket ignores the condition.
        if all(self._written_anew(_PROBE, b"Of two writers at once, one is refused.\n") for _ in range(2)):
            raise RefusedError(
                f"{self.where}: this bucket ignores If-None-Match and overwrites what is there, so that of two changes "
                "at once one would vanish with its line in the audit trail; nothing was changed. Use a store with "
                "conditional writes (Amazon S3, MinIO, Cloudflare R2, ...), or a folder"
            )
        self._keeps_conditions = True

    def _written_anew(self, name: str, content: bytes) -> bool:
        """Write unless there is such an object; tell whether it was written."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

        with _bucket_explained(self.where):
            try:
                # One request: the condition holds for the whole object.
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
            if meta["path"].rpartition("/")[0] == folder  # a bucket lists what lies deeper too
        ]  # fmt: skip
        return sorted(found, key=lambda one: one.name)

    def folders(self) -> list[str]:
        with _bucket_explained(self.where):
            return sorted(p.rpartition("/")[2] for p in self._api.list_with_delimiter(self._store)["common_prefixes"])

    def delete(self, name: str) -> None:
        with _bucket_explained(self.where):
            self._api.delete(self._store, name)

    def sweep(self, folder: str, age_s_min: float) -> int:  # noqa: ARG002 - an upload that was cut off leaves no object
        return 0


def _profile(url: str) -> tuple[Boto3CredentialProvider | None, S3Config]:
    """Return what AWS_PROFILE names: where its credentials come from, region and endpoint.

    As with the AWS tools, keys in the environment go before a profile.
    """
    name = os.environ.get("AWS_PROFILE")
    if not name or os.environ.get("AWS_ACCESS_KEY_ID"):
        return None, {}
    keys = "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"
    try:
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - only profiles need it
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
        raise ModelStoreError(f"{url}: AWS_PROFILE: {error}; mend the profile, or {keys}") from error
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
        # A bucket's answer quotes the key, and what was signed with it.
        reason = str(error).partition("\n")[0].partition("<")[0].strip()
        if code := _CODE.search(str(error)):
            reason = f"{reason} {code[1]}"
        reason = hidden(reason, (os.environ[name] for name in SECRET_VARIABLES if name in os.environ))
        raise ModelStoreError(f"model store {where}: {reason} (credentials and endpoint: AWS_* variables)") from error
