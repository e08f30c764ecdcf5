"""Pictures: what is seen where, in which colours."""

from __future__ import annotations

import numpy as np
import pytest

from coarse_train.data import IGNORE, Classes
from coarse_train.data.classes import palette
from coarse_train.pictures import draw_maps, draw_matrix, overlay

CLASSES = Classes(("road", "car", "sky"), palette(3))
ORANGE, BLUE, GREEN = CLASSES.colours


def test_an_overlay_has_the_colours_over_grey_and_leaves_what_is_not_drawn() -> None:
    image = np.zeros((5, 6, 3), np.uint8)
    image[..., 0] = 200  # grey: 60
    labels = np.full((5, 6), IGNORE, np.uint8)
    labels[:, :3] = 1
    found = overlay(image, labels, CLASSES, 0.5)
    assert (found[:, :2] == (73, 120, 146)).all()  # (60 + (86, 180, 233)) / 2
    assert (found[:4, 2] == BLUE).all()  # its border
    assert (found[:, 3:] == (200, 0, 0)).all()
    np.testing.assert_array_equal(overlay(image, labels, CLASSES, 0.0), image)
    assert (overlay(image, labels, CLASSES, 1.0)[:, :3] == BLUE).all()


def test_a_picture_keeps_the_pixels_of_the_image_and_names_the_classes_that_occur() -> None:
    image = np.random.default_rng(0).integers(0, 256, (210, 230, 1), dtype=np.uint8)
    labels = np.zeros((210, 230), np.uint8)
    labels[100:] = 2
    picture = np.array(draw_maps(image, {"mask": labels, "prediction": labels}, CLASSES, title="a"))
    np.testing.assert_array_equal(picture[48:258, 8:238], np.broadcast_to(image, (210, 230, 3)))
    legend = picture[266:].reshape(-1, 3).tolist()
    assert legend.count(list(ORANGE)) == legend.count(list(GREEN)) == 12 * 12
    assert list(BLUE) not in legend
    small = draw_maps(image, {"mask": labels}, CLASSES, largest=100)
    assert small.width == 2 * 208 + 8  # room for titles


def test_many_classes_have_a_legend_of_several_lines() -> None:
    names = tuple(f"a class with a long name, {number}" for number in range(12))
    classes = Classes(names, palette(12))
    labels = np.repeat(np.arange(12, dtype=np.uint8), 4).reshape(6, 8)
    one, all_ = (draw_maps(np.zeros((6, 8, 3), np.uint8), {"mask": m}, classes) for m in (labels * 0, labels))
    assert (all_.height - one.height) % 20 == 0
    assert all_.height - one.height >= 5 * 20


@pytest.mark.parametrize("name", ["$\\foo", "_x", "<b>", "ß" * 200, "машина", "a\nb"])
def test_names_may_be_anything(name: str) -> None:
    classes = Classes((name, "b"), palette(2))
    draw_maps(np.zeros((2, 2, 3), np.uint8), {name: np.zeros((2, 2), np.uint8)}, classes, title=name)
    assert draw_matrix(np.eye(2), classes.names, title=name, rows=name, columns="x").width < 10_000


def test_a_matrix_is_blue_where_it_is_1_and_white_where_it_is_0() -> None:
    matrix = np.array([[1.0, 0.0], [np.nan, 0.5]])
    picture = np.array(draw_matrix(matrix, ("a", "b"), title="t", rows="true", columns="predicted"))
    cells = picture[-8 - 2 * 34 : -8]
    left = int((cells == (0, 114, 178)).all(-1).any(0).argmax())
    corner = cells[2, left + 2], cells[2, left + 36], cells[36, left + 2], cells[36, left + 36]
    assert [tuple(one.tolist()) for one in corner] == [
        (0, 114, 178),
        (255, 255, 255),
        (255, 255, 255),
        (128, 184, 216),
    ]
