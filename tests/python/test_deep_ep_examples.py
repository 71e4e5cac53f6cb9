# SPDX-License-Identifier: MIT
"""The examples over deep_ep run, and check their own results, in a short setting."""
import os
import subprocess
import sys

import pytest

from conftest import DEVICE

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../examples")


@pytest.mark.parametrize("example, words", [
    ("moe_inference.py --steps 1 --tokens 64", "from each rank alone it differs by"),
    ("moe_train.py --steps 6 --layers 1 --check 1e-3", "the largest difference of a step is")])
def test_an_example_agrees_with_one_process(example, words):
    name, *args = example.split()
    done = subprocess.run([sys.executable, os.path.join(FOLDER, name), "--ranks", "4", *args], capture_output=True,
                          text=True, timeout=400, env={**os.environ, "EP_DEVICE": DEVICE})
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
