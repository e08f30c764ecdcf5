"""opcheck and torch.compile on this device.

Defined in tests/test_compile.py, collected here a second time with this module's DEVICE (conftest.py).
"""

from __future__ import annotations

from tests import test_compile
from tests.gpu.device import require

DEVICE = require()

fresh_compiler = test_compile.fresh_compiler
CPU_ONLY = ("test_opcheck_find_bad_label", "test_find_bad_label_finds_the_first")  # operators for CPU labels

globals().update(
    {name: test for name, test in vars(test_compile).items() if name.startswith("test_") and name not in CPU_ONLY}
)
