"""lab/device.py: precision and memory."""

import platform
import subprocess
import sys

from lab.device import bfloat16_convolutions

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT


def test_bfloat16_convolutions_round_the_operands_and_nothing_else():
    """Float32 as ever, on a CPU without bfloat16; or, to float32's precision, the convolution in
    float64 of operands that were rounded to bfloat16."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 32, 14, 14), torch.randn(32, 32, 3, 3)
    rounded = F.conv2d(x.bfloat16().double(), weight.bfloat16().double()).float()
    before = F.conv2d(x, weight)
    with bfloat16_convolutions():
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
        inside = F.conv2d(x, weight)
    with pytest.raises(KeyError), bfloat16_convolutions():
        raise KeyError
    assert torch.equal(before, F.conv2d(x, weight))
    assert (before - rounded).abs().max() > 0.02
    if not torch.equal(inside, before):
        torch.testing.assert_close(inside, rounded, rtol=0, atol=2e-4)


PAGE_FAULTS = """
import resource
import torch
from lab.device import pick_device

pick_device("cpu")
torch.ones(128 * 2**18)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(64 * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs are left alone")
def test_a_cpu_keeps_freed_memory():
    """Using 64 MiB of 128 freed ones causes no page faults; otherwise there were 16,384."""
    command = [sys.executable, "-c", PAGE_FAULTS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(printed.stdout) < 500
