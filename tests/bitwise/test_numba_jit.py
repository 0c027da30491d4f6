"""Compiled functions work where no folder can be written."""

import os
import subprocess
import sys

CODE = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import numpy as np
from fxq.bitwise import numba_add, numba_floats, numba_select
from fxq.bitwise.layout import AddConstants
a = np.arange(8, dtype=np.uint8)
assert numba_add.add(a, a, AddConstants(1.0, 1.0, 0.0)).tolist() == (2 * a).tolist()
out = np.empty((1, 1, 1, 2), np.float32)
numba_floats.float_pool(np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2), np.array([2, 2, 1, 1, 0, 0, 1, 1]), out)
assert out.reshape(-1).tolist() == [3.0, 7.0]
print("none kept", numba_add._add._cache.__class__.__name__)
"""


def test_without_a_folder_for_the_cache() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "none kept NullCache"
