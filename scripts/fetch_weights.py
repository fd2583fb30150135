"""Fetch pretrained weights: python scripts/fetch_weights.py [NAME... | CONFIG.py]; without arguments it lists them."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.runtime import find_file, run  # noqa: E402


def main() -> int:
    """List the catalogue, or fetch what is named and missing."""
    words = [str(find_file(word, "the config")) if word.endswith(".py") else word for word in sys.argv[1:]]
    os.chdir(ROOT)
    from model.pretrained import CATALOGUE, fetch_missing, fetch_weights, resolve_weights
    from utils.config import load_config
    from utils.errors import ConfigError
    from utils.registry import suggestion

    if not words:
        for name, entry in CATALOGUE.items():
            state = "there" if resolve_weights(name).is_file() else "missing"
            print(f"{name:20} {state:8} {entry.megabytes:4} MB  {entry.path}: {entry.fits}; {entry.licence}")
    for word in words:
        if word.endswith(".py"):
            fetch_missing(load_config(word).model)
        elif word not in CATALOGUE:
            raise ConfigError(f"{word!r} is not in the catalogue of weights: {suggestion(word, list(CATALOGUE))}")
        else:
            fetch_weights([word])
            print(f"{word}: {resolve_weights(word)}")
    return 0


if __name__ == "__main__":
    run(main)
