"""Thin training package over `coarse_kernels`: data, drawings, two coupled networks, a loop, experiments."""

IGNORE = 255  # in label maps: nobody drew here; it counts in no loss and in no score
