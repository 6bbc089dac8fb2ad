"""Run a command of `minsae` and print how many bytes the kernel read for this process.

python -m tests.parallel.count_reads train --store STORE …
"""

import sys
from pathlib import Path

from minsae_jax.__main__ import main

main(sys.argv[1:])
counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
print(counts["rchar"])
