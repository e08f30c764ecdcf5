"""The contract tests on this device: autograd, strides, missing labels, determinism, autocast.

Defined in tests/test_operator_contract.py, collected here a second time with this module's DEVICE (conftest.py).
"""

from __future__ import annotations

import pytest

from tests import test_operator_contract
from tests.gpu.device import require

DEVICE = require()

pytestmark = pytest.mark.usefixtures("poison")

globals().update({name: test for name, test in vars(test_operator_contract).items() if name.startswith("test_")})
