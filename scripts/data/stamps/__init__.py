"""Clips of sounding things, composed from cut-out photographs and their recordings, in AVSBench's three layouts."""
