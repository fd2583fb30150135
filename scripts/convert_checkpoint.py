"""Convert a checkpoint between published and our names, or between formats.

    python scripts/convert_checkpoint.py MoDAT_published.pth ours.pth            # published names -> ours
    python scripts/convert_checkpoint.py ours.pth published.pth --to published   # and back
    python scripts/convert_checkpoint.py ours.pth ours.safetensors               # format by the suffix of the target

Published tensors without use in any model (model.checkpoint.NEVER_USED) are left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import convert
from utils.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Convert one file; returns the exit status, 0 or 2 (an error of the user)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=".pth or .safetensors, published or ours")
    parser.add_argument("target", type=Path, help=".pth or .safetensors")
    parser.add_argument("--to", choices=("ours", "published"), default="ours", help="names in the target")
    options = parser.parse_args(arguments)
    try:
        written, left_out = convert(options.source, options.target, to_published_names=options.to == "published")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.target} cannot be written ({error.strerror or error}).", file=sys.stderr)
        return 2
    print(f"{options.target}: {written} tensors under {options.to} names; {left_out} unused ones left out.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
