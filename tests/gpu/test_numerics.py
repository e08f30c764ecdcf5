"""The numerics tests on this device: logits that are large, infinite or NaN, and labels that cannot be.

Defined in tests/test_operator_numerics.py, collected here a second time with this module's DEVICE (conftest.py).
"""

from __future__ import annotations

import pytest

from tests import test_operator_numerics
from tests.gpu.device import require

DEVICE = require()

pytestmark = pytest.mark.usefixtures("poison")

globals().update({name: test for name, test in vars(test_operator_numerics).items() if name.startswith("test_")})
