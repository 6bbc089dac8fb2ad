"""Run a command of `minsae` that makes four steps per call, as accelerators make ten.

python -m tests.sae.four_steps_per_call train --store STORE …
"""

import sys

from minsae_jax.__main__ import main
from minsae_jax.sae import batches

if __name__ == "__main__":
    batches.on_cpu = lambda: False
    batches.STEPS_PER_CALL = 4
    main(sys.argv[1:])
