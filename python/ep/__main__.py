# SPDX-License-Identifier: MIT
"""`python -m ep`: the program ep, as `make` builds it."""
import os
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent / "bin" / "ep"


def main() -> None:
    os.execv(PROGRAM, ["ep"] + sys.argv[1:])


if __name__ == "__main__":
    main()
