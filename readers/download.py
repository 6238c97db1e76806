"""Downloads an official file: from the first mirror that has it, resumably, checked by its hash."""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from support.errors import UserError, reason_of
from support.files import remove_leftovers
from support.lock import held
from utils import log, progress

TIMEOUT_S = 30  # without a single byte
CHUNK_BYTES = 1 << 16
HEADERS = {"User-Agent": "tiny-ddae", "Accept-Encoding": "identity"}
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416


@dataclass(frozen=True)
class Archive:
    """A file to download, and the digest that tells the original."""

    name: str  # of the file
    urls: tuple[str, ...]  # in the order in which they are tried
    digest: str  # in hexadecimal
    algorithm: str = "md5"  # of hashlib


class Unavailable(Exception):
    """One address did not give the file; the message says why."""


def fetch(archive: Archive, folder: Path) -> Path:
    """The path of the archive in `folder`, downloaded there unless it is there already.

    What has been received stays in `<name>.part` and is continued, by the next address and by
    the next run. Raises UserError if no address gives the file, saying where to get it and
    where to put it, if a file of that name is not the original one, and while another process
    downloads it.
    """
    path = folder / archive.name
    if path.exists():
        try:
            _check_original(path, archive)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({reason_of(error)}): remove it to download it again, or "
                "put the file there"
            ) from None
        return path
    with held(path.with_name(f".{path.name}.lock"), str(path)):
        return _fetched(archive, path)


def _fetched(archive: Archive, path: Path) -> Path:
    """Downloads it to `path`, unless another process has done so meanwhile."""
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    failures = []
    try:
        for url in archive.urls:
            try:
                _download(url, part, archive)
            except Unavailable as failure:
                failures.append(f"{urlsplit(url).netloc}: {failure}")
                if url != archive.urls[-1]:
                    log.info("%s: %s; trying the next address", url, failure)
            else:
                os.replace(part, path)
                log.info("downloaded %s", path)
                return path
    except OSError as error:
        raise UserError(f"{path.parent}: cannot save {archive.name}: {reason_of(error)}") from None
    raise UserError(
        f"{archive.name} could not be downloaded ({'; '.join(failures)}).\n"
        f"Get it from {archive.urls[0]} by other means and put it at {path}"
    )


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .tar.gz or .zip whose only top folder is `folder.name`, to `folder`.

    `folder` appears when all of it is there. Raises UserError if it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        remove_leftovers(folder.parent, folder.name)
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                for member in progress(file.infolist(), f"unpacking {archive.name}", unit="file"):
                    file.extract(member, temporary)
        else:
            with tarfile.open(archive) as file:
                # Python's rule against paths that lead outside; early 3.10 and 3.11 lack it.
                file.extraction_filter = getattr(tarfile, "data_filter", None)
                for member in progress(file, f"unpacking {archive.name}", unit="file"):
                    file.extract(member, temporary)
        try:
            os.replace(temporary / folder.name, folder)
        except OSError:
            if not folder.is_dir():  # else another process has been faster
                raise
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked to {folder}: {reason_of(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_original(path: Path, archive: Archive) -> None:
    found = compute_digest(path, archive.algorithm)
    if found != archive.digest:
        raise UserError(
            f"{path}: not the original file, or not all of it ({archive.algorithm.upper()} "
            f"{found}, not {archive.digest}): remove it to download it again, or replace it"
        )


def compute_digest(path: Path, algorithm: str = "md5") -> str:
    """The hash of a file, in hexadecimal; `algorithm` is one of hashlib, such as md5."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(url: str, part: Path, archive: Archive) -> None:
    """Completes `part` from `url`. Raises Unavailable."""
    found_on_disk = _size(part) > 0
    while True:
        before = _size(part)
        try:
            _receive(url, part)
        except Unavailable:
            if _size(part) <= before:
                raise
            continue  # cut off, but it gave something: ask for the rest
        if compute_digest(part, archive.algorithm) == archive.digest:
            return
        part.unlink()
        if not found_on_disk:
            raise Unavailable(f"sent another file (its {archive.algorithm.upper()} differs)")
        found_on_disk = False  # that beginning may have been of another file: once from zero


def _receive(url: str, part: Path) -> None:
    """Appends to `part` what `url` has beyond it. Raises Unavailable if that ends too early."""
    start = _size(part)
    headers = {**HEADERS, "Range": f"bytes={start}-"} if start else HEADERS
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == RANGE_NOT_SATISFIABLE:
            return  # nothing beyond it: the checksum decides
        raise Unavailable(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(_network_reason(error)) from None
    with response:
        if response.status != PARTIAL_CONTENT:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        received = start
        with (
            open(part, "ab" if start else "wb") as file,
            progress(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar,
        ):
            while chunk := _next_chunk(response):
                file.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
    if total is not None and received < total:
        raise Unavailable(f"cut off after {received} of {total} bytes")


def _next_chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(_network_reason(error)) from None


def _network_reason(error: Exception) -> str:
    return reason_of(getattr(error, "reason", error))  # urllib wraps what the socket said


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
