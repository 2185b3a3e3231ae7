import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from fxquant.kernels.extension import NOT_BUILT, _native
from tests.compare import BFLOAT16_SETS


def pytest_make_collect_report(collector):
    torch.manual_seed(0)  # for what a test module draws when it is imported, right after this


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def float32_products():
    """Multiply float32 activations as they are, also where the CPU has products of bfloat16.

    What is compared to more than two or three digits needs it.
    """
    if NOT_BUILT is not None:
        yield
        return
    sets = _native.instruction_sets()
    _native.use(next(name for name in sets if name not in BFLOAT16_SETS))
    yield
    _native.use(sets[0])
