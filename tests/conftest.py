import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_make_collect_report(collector):
    torch.manual_seed(0)  # for what a test module draws when it is imported, right after this


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
