"""Thin training package over `coarse_kernels`: data, drawings, two coupled networks, a loop, experiments."""
