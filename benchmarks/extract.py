"""Our extraction against a plain PyTorch forward of the same weights: `python -m benchmarks.extract`.

Windows in memory, activations of the last layer back in the host's memory, float32; PyTorch at the reference's batch
of 128 and at one that fits the cache. Prints Markdown.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks.timing import alternate, machine
from convert.checkpoint import load_checkpoint
from convert.encoder import convert_encoder
from convert.plain_torch import forward
from minsae_jax import sharding
from minsae_jax.encoder.extract import sharded_hidden

CHECKPOINT = Path(__file__).parent.parent / "configs/demo/encoder.pth"


def main() -> None:
    sharding.start()
    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    a, mesh = encoder.architecture, sharding.make_mesh()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {k: torch.from_numpy(v).to(device) for k, v in load_checkpoint(CHECKPOINT).tensors.items()}
    batch = 128 if "--quick" not in sys.argv else 8
    x = np.random.default_rng(0).normal(size=(batch, a.seq_len, a.n_vars)).astype(np.float32)
    params = jax.device_put(encoder.params, sharding.everywhere(mesh))
    run = sharded_hidden(mesh, a, (a.n_layers - 1,))

    def pytorch(piece: int) -> None:
        with torch.inference_mode():
            for part in torch.from_numpy(x).split(piece):
                forward(a, state, part.to(device))[0][-1].cpu()

    seconds = alternate(
        {
            "ours": lambda: np.asarray(run(params, sharding.put_rows(mesh, x))[0]),
            "PyTorch, batch 128": lambda: pytorch(128),
            "PyTorch, batch 4": lambda: pytorch(4),
        },
        rounds=3,
    )
    print(f"Extraction, {machine()}; demo encoder, layer -1, float32.\n")
    print("| | windows/s | ours is faster by |\n| --- | --- | --- |")
    for name, s in seconds.items():
        print(f"| {name} | {len(x) / s:.1f} | {s / seconds['ours']:.1f} |")


if __name__ == "__main__":
    main()
