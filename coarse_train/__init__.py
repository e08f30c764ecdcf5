"""Thin training package over `coarse_kernels`: data, drawings, two coupled networks, a loop, experiments."""

_BACKGROUNDS = ("background", "_background_", "bg")  # the second is labelme's
IGNORE = 255  # in label maps: nobody drew here; it counts in no loss and in no score


def is_background(name: str) -> bool:
    """Whether a class of this name is what nobody draws the outlines of: in whatever letters."""
    return name.strip().lower() in _BACKGROUNDS
