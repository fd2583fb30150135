"""What the page says: sentences without paths of the server."""

import html
import re
from pathlib import Path

_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/:;,()'\"]+/)*([^\s/:;,()'\"]+)")


def public(message: str, named: Path | None = None) -> str:
    """A message with file names in place of paths, escaped for HTML.

    Args:
        message: of an error.
        named: a path that may occur in it, spaces included.
    """
    if named is not None:
        message = message.replace(str(named), named.name)
    return html.escape(_PATH.sub(r"\1", message), quote=False)
