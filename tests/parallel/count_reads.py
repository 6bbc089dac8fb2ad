"""Run a command of `minsae` and print how many bytes the kernel read for this process.

python -m tests.parallel.count_reads train --store STORE …
"""

import sys
from pathlib import Path

from minsae_jax.__main__ import main


def bytes_read() -> int:
    """Return what all reads of this process have returned, from the cache of files or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


if __name__ == "__main__":
    main(sys.argv[1:])
    print(bytes_read())
