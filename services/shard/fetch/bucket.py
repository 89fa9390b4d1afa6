"""A model's files from an S3 bucket, or from what speaks like one.

Where the bucket is and who asks is boto3's own to know: AWS_ENDPOINT_URL_S3, AWS_REGION,
AWS_ACCESS_KEY_ID and the other ways that its documentation lists.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from infermesh.errors import ModelLoadFailed

SCHEME = "s3://"
_AWS = (".amazonaws.com", ".amazonaws.com.cn")
_CONNECT_S, _READ_S, _ATTEMPTS = 10, 60, 5


def download(url: str, into: Path) -> None:
    """Every object below s3://BUCKET/PREFIX; one that is there already, whole, is not asked for.

    Raises:
        ModelLoadFailed: why the bucket can't give them.
    """
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    settings = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
    try:
        client = boto3.client("s3", config=settings)
        if not (urlsplit(client.meta.endpoint_url).hostname or "").endswith(_AWS):
            # few stores but AWS' own have a DNS name per bucket
            by_path = Config(s3={"addressing_style": "path"})
            client = boto3.client("s3", config=settings.merge(by_path))
        found = _listed(client, bucket, f"{prefix.strip('/')}/")
        if not found:
            raise ModelLoadFailed(f"{url} holds no objects")
        _tidy(into, set(found))
        for name, (key, size) in found.items():
            target = into / name
            # written beside it and renamed: what has the name is whole
            if not (target.is_file() and target.stat().st_size == size):
                target.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, key, str(target))
    except ClientError as exc:
        code = exc.response.get("Error", {}).get("Code", "?")
        raise ModelLoadFailed(f"{url} could not be downloaded: the store says {code}") from exc
    except (Boto3Error, BotoCoreError) as exc:
        raise ModelLoadFailed(f"{url} could not be downloaded: {exc}") from exc


def _tidy(folder: Path, wanted: set[str]) -> None:
    """Removes what an attempt that died left half written, under a name of its own."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            path.unlink()


def _listed(client: Any, bucket: str, prefix: str) -> dict[str, tuple[str, int]]:
    """Name below the prefix to key and bytes.

    Raises:
        ModelLoadFailed: a key would lead out of the folder.
    """
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", ()):
            key, name = item["Key"], item["Key"].removeprefix(prefix)
            if not name or name.endswith("/"):  # a "folder" that some tools make
                continue
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ModelLoadFailed(f"{bucket} has an object {key!r}, which is no file's name")
            found[name] = (key, item["Size"])
    return found
