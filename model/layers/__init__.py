"""Layers that the boxes of the figure share, and the few kernels that make them fast."""
