"""The parts of scripts/data/prepare_avsbench.py."""
