"""Extraction compared with a plain PyTorch forward of the same weights.

    python -m benchmarks.extract [--quick]

Demo encoder (gPatchTST's tuhab_patch_10 with 3 layers), layers 0 and -1. The forwards take windows
in memory and leave the activations in the host's memory; PyTorch runs with the reference's batch of
128 and with its fastest one. "End to end" reads recordings and writes a store. The limit is the
machine's best float32 matrix product; peak memory is that of a process that does nothing else.
Prints Markdown.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
from jax.sharding import Mesh

from benchmarks.timing import (
    alternate,
    machine,
    matrix_product_flops,
    peak_memory,
    peak_rss,
    row,
)
from convert.checkpoint import load_checkpoint
from convert.encoder import convert_encoder
from convert.patchtst_torch import forward
from minsae_jax.encoder.base import ComputeOptions, HiddenFunction, Precision
from minsae_jax.encoder.compute import sharded
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.extract import extract
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.parallel.mesh import (
    fetch_batch,
    make_mesh,
    put_batch,
    replicated,
    start_fetch,
)
from minsae_jax.parallel.processes import start_jax

CHECKPOINT = Path(__file__).parent.parent / "configs/demo/encoder.pth"
BATCH = 128
WINDOWS_PER_RECORDING = 100
TORCH_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def flops(a: Architecture, n_layers: int) -> int:
    """Return multiplications and additions of all matrix products for one window."""
    per_token = 2 * (4 * a.d_model**2 + 2 * a.d_model * a.d_ff)
    attention = 0
    for layer in range(n_layers):
        # With residual scores, queries and keys of layer l are l + 1 heads wide.
        width = layer + 1 if a.res_attention else 1
        attention += 2 * a.n_tokens * a.d_model * (width + 1)
    embedding = 2 * a.patch_len * a.d_model
    return a.n_vars * a.n_tokens * (n_layers * per_token + attention + embedding)


def flax_forward(
    encoder: PatchTSTEncoder, x: np.ndarray, n_layers: int, precision: Precision = "float32"
) -> Callable[[], object]:
    """Return a function that computes the last of n_layers and copies it to the host.

    As in `minsae extract`, a batch is computed while the one before it is copied.
    """
    mesh = make_mesh()
    function = encoder.function((n_layers - 1,), ComputeOptions(precision))
    program = flax_program(encoder, mesh, function, precision)
    batches = np.split(x, range(BATCH, len(x), BATCH))

    def run() -> None:
        before = None
        for batch in batches:
            running = start_fetch(program(put_batch(mesh, batch)))
            if before is not None:
                fetch_batch(before, BATCH)
            before = running
        fetch_batch(before, len(batches[-1]))

    return run


def flax_program(
    encoder: PatchTSTEncoder, mesh: Mesh, function: HiddenFunction, precision: Precision
) -> Callable[[jax.Array], jax.Array]:
    """Return the compiled function of windows on the devices, with the encoder's parameters."""
    params = jax.device_put(encoder.params, replicated(mesh))
    run = sharded(mesh, function, "float32", precision)
    return lambda x: run(params, x)[0]


def forward_windows(batch: int) -> int:
    """Return how many windows to compute: on a GPU several batches, so that copies overlap."""
    return batch * (1 if jax.default_backend() == "cpu" else 4)


def torch_forward(a: Architecture, x: np.ndarray, n_layers: int, batch: int) -> Callable[[], None]:
    """Return the same in PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = load_checkpoint(CHECKPOINT).tensors
    state = {key: torch.from_numpy(array).to(device) for key, array in tensors.items()}

    def run() -> None:
        with torch.inference_mode():
            for part in torch.from_numpy(x).split(batch):
                forward(a, state, part.to(device), n_layers)[0][-1].cpu()

    return run


def best_batch(a: Architecture, x: np.ndarray, n_layers: int) -> int:
    """Return PyTorch's fastest batch, from one round of each."""
    seconds_per_window = {}
    for batch in TORCH_BATCHES:
        if batch > len(x) / 2:
            continue
        n_windows = max(batch, 16)
        run = torch_forward(a, x[:n_windows], n_layers, batch)
        seconds = alternate({"pytorch": run}, rounds=1)
        seconds_per_window[batch] = seconds["pytorch"] / n_windows
    return min(seconds_per_window, key=lambda batch: seconds_per_window[batch])


def write_recordings(root: Path, a: Architecture, n_windows: int) -> None:
    """Write noise that has n_windows windows."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = ["filename,time_len"]
    for i, start in enumerate(range(0, n_windows, WINDOWS_PER_RECORDING)):
        name = f"p{i:05d}_s001_t000_preprocessed.npy"
        length = (a.seq_len + a.patch_len) * min(WINDOWS_PER_RECORDING, n_windows - start)
        np.save(root / name, rng.normal(size=(length, a.n_vars)).astype(np.float32))
        rows.append(f"{name},{length}")
    (root / "file_lengths_map.csv").write_text("\n".join(rows) + "\n")


def end_to_end(encoder: PatchTSTEncoder, n_windows: int, folder: str, batch: int = BATCH) -> float:
    """Return windows per second of a whole extraction: reading, computing, hashing, writing."""
    root = Path(folder) / "recordings"
    write_recordings(root, encoder.architecture, n_windows)
    config = ExtractConfig(
        root_path=str(root),
        checkpoint_path=str(CHECKPOINT),
        out=f"{folder}/store",
        batch_size=batch,
        split=("all",),
        overwrite=True,
    )
    extract(encoder, config)  # compiles
    started_at = time.perf_counter()
    extract(encoder, config)
    return n_windows / (time.perf_counter() - started_at)


def measure_alone(program: str, batch: int, n_layers: int) -> None:
    """Print this process's peak memory in MB.

    PyTorch computes two batches from memory; minsae_jax writes a store of four.
    """
    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    a = encoder.architecture
    if program == "minsae_jax":
        with tempfile.TemporaryDirectory() as folder:
            end_to_end(encoder, 4 * batch, folder, batch)
    else:
        x = np.zeros((batch, a.seq_len, a.n_vars), np.float32)
        run = torch_forward(a, x, n_layers, batch)
        run()
        run()
    print(peak_rss() // 1_000_000)


def measure_layer(
    encoder: PatchTSTEncoder, x: np.ndarray, n_layers: int, rounds: int
) -> tuple[dict[str, float], int]:
    """Return seconds of each contestant for the last of n_layers, and PyTorch's best batch."""
    a = encoder.architecture
    best = best_batch(a, x, n_layers)
    contestants = {
        "minsae_jax": flax_forward(encoder, x, n_layers),
        f"PyTorch, batch {BATCH}": torch_forward(a, x, n_layers, BATCH),
        f"PyTorch, batch {best}, its best": torch_forward(a, x, n_layers, best),
    }
    if jax.default_backend() == "gpu":
        contestants["minsae_jax, bfloat16 products"] = flax_forward(
            encoder, x, n_layers, "bfloat16"
        )
    return alternate(contestants, rounds), best


def print_layer(
    encoder: PatchTSTEncoder, x: np.ndarray, layer: int, n_layers: int, limit: float, quick: bool
) -> None:
    """Print the rows of one layer."""
    seconds, best = measure_layer(encoder, x, n_layers, rounds=1 if quick else 3)
    peaks = {}
    if not quick:
        measure = partial(peak_memory, "benchmarks.extract", "--alone")
        peaks["minsae_jax"] = measure("minsae_jax", str(BATCH), str(n_layers))
        peaks[f"PyTorch, batch {BATCH}"] = measure("pytorch", str(BATCH), str(n_layers))
        peaks[f"PyTorch, batch {best}, its best"] = measure("pytorch", str(best), str(n_layers))
    for name, s in seconds.items():
        share = flops(encoder.architecture, n_layers) * len(x) / s / limit
        peak = f"{peaks[name]:,} MB" if name in peaks else ""
        rate = len(x) / s
        speedup = s / seconds["minsae_jax"]
        cells = (str(layer), name, f"{rate:.1f}", f"{speedup:.1f}", f"{share:.0%}", peak)
        print(row(*cells), flush=True)


def main() -> None:
    start_jax()
    if "--alone" in sys.argv:
        program, batch, n_layers = sys.argv[2:5]
        measure_alone(program, int(batch), int(n_layers))
        return
    quick = "--quick" in sys.argv
    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    a = encoder.architecture
    n_windows = 2 if quick else forward_windows(BATCH)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_windows, a.seq_len, a.n_vars)).astype(np.float32)
    limit = matrix_product_flops(quick=quick)
    print(f"Extraction, {machine()}; demo encoder, float32; limit {limit / 1e9:,.0f} GFLOP/s.\n")
    print("| layer | | windows/s | minsae_jax is faster by | of the limit | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    print_layer(encoder, x, 0, 1, limit, quick)
    print_layer(encoder, x, -1, a.n_layers, limit, quick)
    with tempfile.TemporaryDirectory() as folder:
        batch = min(n_windows, BATCH)
        rate = end_to_end(encoder, 4 * batch, folder, batch)
    print(f"| -1 | minsae_jax, end to end | {rate:.1f} | | | |")


if __name__ == "__main__":
    main()
