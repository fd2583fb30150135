"""A web page that segments what sounds in a video: bash scripts/demo.sh [options]."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import ConfigError  # noqa: E402
from utils.runtime import run  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="demo.sh",
        description="Open a page on this machine: drop a video or record one, and see what the model takes to be "
        "sounding; beside it the same video muted, or with another sound.",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a packed model by name or file, a model folder, or a repository of the hub"
    )
    parser.add_argument("--config", metavar="C", help="config of the weights")
    parser.add_argument(
        "--checkpoint",
        metavar="W",
        help="weights; the packed models and the best weights in work_dir/ can be chosen on the page as well",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--fps", type=float, default=1.0, help="masks per second, 0.1 to 10; default: 1")
    parser.add_argument(
        "--stamps", default="data/stamps", metavar="DIR", help="data for the examples; default: %(default)s"
    )
    parser.add_argument("--precision", choices=("auto", "32", "bf16", "16"), default="auto", help="default: auto")
    return parser.parse_args(arguments)


def main() -> None:
    """Serve the page."""
    given = parse()
    if not 0.1 <= given.fps <= 10:
        raise ConfigError(f"--fps {given.fps:g} is not between 0.1 and 10 masks per second.")
    # Imported only now: --help should not wait for torch.
    from scripts.demo_page.models import Models, find_choices
    from scripts.demo_page.server import serve

    models = Models(find_choices(given.model, given.checkpoint, given.config), given.precision)
    stamps = Path(given.stamps)
    serve(
        models,
        host=given.host,
        port=given.port,
        fps=given.fps,
        stamps=stamps if stamps.is_dir() else ROOT / stamps,
    )


if __name__ == "__main__":
    run(main)
