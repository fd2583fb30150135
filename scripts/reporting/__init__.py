"""The comparison of runs as one HTML page; scripts/report.py is its command."""
