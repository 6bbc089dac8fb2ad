"""Command line of the generated input, see the package."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.hostile.inputs import INPUTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help=f"of {', '.join(INPUTS)}")
    parser.add_argument("--examples", type=int, default=1000, help="cases of each input")
    args = parser.parse_args()
    print("| input | tried | read | refused in one line | slowest, CPU s | additional memory, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.inputs or INPUTS:
        with tempfile.TemporaryDirectory(prefix="hostile") as folder:
            tally = INPUTS[name].run(Path(folder), args.examples)
        print(
            f"| {name} | {tally.tried} | {tally.accepted} | {tally.refused} | "
            f"{tally.slowest:.1f} | {tally.memory / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
