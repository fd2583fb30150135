"""Serves the page: on this machine only unless told otherwise, without a request to any other machine."""

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from scripts.demo_page.clip import Limits
from scripts.demo_page.desk import Desk
from scripts.demo_page.examples import make_examples
from scripts.demo_page.models import Models
from utils.errors import ConfigError
from utils.optional import import_optional
from utils.runtime import warn

LOCAL = ("127.0.0.1", "localhost", "::1")
PUBLIC = Path("/tmp")
FIRST_PORT, PORTS = 7860, 100
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""The browser loads nothing from elsewhere, whatever a script of the page asks for."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class Headers:
    """ASGI middleware that adds the content security policy to all answers."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, with_headers)


def serve(
    models: Models, *, host: str, port: int | None, fps: float, stamps: Path, limits: Limits | None = None
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; then remove all its files.

    Args:
        models: to choose from; the first is loaded before the page opens.
        host: address to listen on.
        port: None: the first free one from 7860 on.
        fps: masks per second.
        stamps: data for the examples.
        limits: of uploads.

    Raises:
        ConfigError: Gradio is not installed, or the port cannot be had.
    """
    folder = Path(tempfile.mkdtemp(prefix="modat-demo-"))
    link = neutral_name(folder)
    seen = folder if link is None else link
    os.environ.update(  # read by Gradio when it is imported
        GRADIO_TEMP_DIR=str(seen / "files"),
        GRADIO_ANALYTICS_ENABLED="0",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
    )
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    page = None
    try:
        (folder / "files").mkdir()
        import_optional("gradio", "the web page (bash scripts/demo.sh installs it)")
        from starlette.middleware import Middleware

        from scripts.demo_page.page import CSS, build, theme

        chosen = free_port(host, port)
        models.get(models.names[0])
        desk = Desk(models, seen / "files", fps, limits)
        page = build(desk, make_examples(seen / "examples", stamps))
        if stop.is_set():
            return
        page.launch(
            server_name=host,
            server_port=chosen,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=True,
            max_file_size=round(desk.limits.megabytes * 2**20),
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            app_kwargs={"middleware": [Middleware(Headers)]},
            theme=theme(),
            css=CSS,
        )
        if host not in LOCAL:
            warn(f"the page listens on {host}: everyone who reaches this machine can use it. Ctrl-C ends it.")
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        print(f"page: http://{shown}:{chosen}  (Ctrl-C ends it)", flush=True)
        stop.wait()
    finally:
        if page is not None:
            page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)
        if link is not None:
            shutil.rmtree(link.parent, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def neutral_name(folder: Path) -> Path | None:
    """A link to a folder, in a new folder of its own in /tmp; None where the folder is in /tmp, or there is none.

    Gradio's file addresses hold whole paths: with the link they do not show where TMPDIR lies.
    """
    if folder.parent == PUBLIC:
        return None
    try:
        link = Path(tempfile.mkdtemp(prefix="modat-demo-", dir=PUBLIC)) / "page"
        link.symlink_to(folder.resolve(), target_is_directory=True)
    except OSError:
        return None
    return link


def free_port(host: str, port: int | None) -> int:
    """A port that can be listened on.

    Raises:
        ConfigError: it is taken, not allowed, or the host is not an address of this machine.
    """
    if port is not None and not 1 <= port <= 65_535:
        raise ConfigError(f"--port {port} is not between 1 and 65535.")
    reason = ""
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                return candidate
        except OSError as error:
            reason = error.strerror or str(error)
    tried = str(port) if port is not None else f"{FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise ConfigError(f"the page cannot listen on {host}, port {tried} ({reason}): name others with --host and --port.")
