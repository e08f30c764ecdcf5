"""The differential tests on this device: every fused backend, the same shapes and options, poisoned memory.

Defined in tests/test_operator_differential.py, collected here a second time with this module's DEVICE (conftest.py).
"""

from __future__ import annotations

import pytest

from tests import test_operator_differential
from tests.gpu.device import require

DEVICE = require()

pytestmark = pytest.mark.usefixtures("poison")

globals().update({name: test for name, test in vars(test_operator_differential).items() if name.startswith("test_")})
