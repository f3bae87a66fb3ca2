"""Downloads that a config pins: over https, streamed into a cache, in place only when the sha256 is right.

`torch.hub.download_url_to_file` downloads too, and is not used: it follows a redirect away from https, and where no
sha256 is known it takes what is shorter than the server said for the whole file.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit

from vlm_export.bundle.cache_directory import CACHE_VARIABLE, cache_directory
from vlm_export.bundle.environment import check_free_space
from vlm_export.bundle.staging import put_file, staging
from vlm_export.checkpoint.names import check_plain_name
from vlm_export.checkpoint.seen_file import Progress, hash_file, see_file
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.machine_faults import machine_fault

_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 1 << 20


class Response(Protocol):
    """What is used of an HTTP response."""

    def read(self, size: int, /) -> bytes: ...


def fetch_url(url: str, sha256: str | None, progress: Progress | None = None) -> Path:
    """The cached file of `url`, downloaded when it is not there yet.

    Raises:
        UsageError: the address is not https.
        EnvironmentFailure: no network, the server refuses, or the disk is full.
        InputError: what arrived is not what `sha256` pins.
    """
    target = cached_path(url, sha256)
    if _is_cached(target, sha256, progress):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One process downloads, others wait for it; what a killed one left is swept.
        with staging(target.absolute(), wait=True) as staged:
            if not _is_cached(target, sha256, progress):
                _download(url, staged.path, target, sha256, progress)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise machine_fault(error, str(target)) or EnvironmentFailure(
            "the checkpoint cannot be downloaded",
            where=url,
            got=f"{type(error).__name__}: {error}",
            fix=f"connect to the network and try again, or put the file at {target} by other means",
        ) from error
    return target


def _is_cached(target: Path, sha256: str | None, progress: Progress | None) -> bool:
    return target.is_file() and (sha256 is None or hash_file(see_file(target), target.name, progress).sha256 == sha256)


def cached_path(url: str, sha256: str | None) -> Path:
    """Where the download of `url` is kept; UsageError when the address is not https."""
    parts = urlsplit(url)
    name = parts.path.rsplit("/", 1)[-1]
    check_plain_name(name, where=url)
    if parts.scheme != "https":
        raise UsageError("only https addresses are downloaded", where=url, got=parts.scheme or "no scheme")
    # One folder per address: the same file name may come from two publishers.
    return cache_directory() / (sha256 or hashlib.sha256(url.encode()).hexdigest())[:16] / name


def _download(url: str, staged: Path, target: Path, sha256: str | None, progress: Progress | None) -> None:
    with staged.open("xb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
        if urlsplit(response.geturl()).scheme != "https":
            raise OSError("the server redirects away from https")
        stated = response.headers.get("Content-Length") or ""
        total = int(stated) if stated.isdecimal() else 0
        check_free_space(
            target.parent, total, fix=f"free some space, or set {CACHE_VARIABLE} to a directory on a larger disk"
        )
        found = _stream(response, file, target.name, total, progress)
    if sha256 is not None and found != sha256:
        raise InputError(
            "the download is not the file that the config pins: its sha256 differs",
            where=url,
            expected=f"sha256 {sha256}",
            got=f"sha256 {found}",
            fix="try again; if it stays so, the publisher changed the file or the connection is tampered with",
        )
    put_file(staged, target, is_result=False)


def _stream(response: Response, file: BinaryIO, name: str, total: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    done = 0
    while chunk := response.read(_CHUNK_BYTES):
        file.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        if progress is not None:
            progress(name, done, max(total, done))
    if done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
    return digest.hexdigest()
