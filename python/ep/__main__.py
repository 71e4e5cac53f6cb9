# SPDX-License-Identifier: MIT
"""`python -m ep`: the program ep, which `make` builds: bench, demo, doctor, env, run."""
import os
import subprocess
import sys
from typing import List

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin", "ep")


def run(args: List[str]) -> int:
    """Its status, when it has ended."""
    return subprocess.call([PROGRAM] + args)


def main() -> None:
    sys.stdout.flush()
    os.execv(PROGRAM, [PROGRAM] + sys.argv[1:])


if __name__ == "__main__":
    main()
