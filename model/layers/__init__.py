"""Layers that several modules share: attention, position, dropout, recomputation, upsampling, initialisation."""
