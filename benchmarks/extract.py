"""Our extraction against a plain PyTorch forward of the same weights: `python -m benchmarks.extract`.

Demo encoder (gPatchTST's tuhab_patch_10 with 3 layers), layers 0 and -1. The forwards take windows in memory and leave
the activations in the host's memory; PyTorch at the reference's batch of 128 and at its best one. "End to end" reads
recordings and writes a store. The limit is the machine's own best float32 matrix product; peak memory is of a process
that does nothing else. Prints Markdown.
"""

import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks.timing import alternate, machine, matrix_product_flops, peak_memory, peak_rss
from convert.checkpoint import load_checkpoint
from convert.encoder import convert_encoder
from convert.plain_torch import forward
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import Encoder, Precision
from minsae_jax.encoder.extract import extract, sharded_hidden
from minsae_jax.encoder.patchtst.model import Architecture
from minsae_jax.parallel.mesh import fetch_batch, make_mesh, put_batch, replicated
from minsae_jax.parallel.processes import start_jax

CHECKPOINT = Path(__file__).parent.parent / "configs/demo/encoder.pth"
BATCH = 128


def flops(a: Architecture, n_layers: int) -> int:
    """Multiplications and additions of all products for a window; queries and keys of layer l are l + 1 heads wide."""
    per_token = 2 * (4 * a.d_model**2 + 2 * a.d_model * a.d_ff)
    attention = [
        2 * a.n_tokens * a.d_model * ((i + 1 if a.res_attention else 1) + 1)
        for i in range(n_layers)
    ]
    embedding = 2 * a.patch_len * a.d_model
    return a.n_vars * a.n_tokens * (n_layers * per_token + sum(attention) + embedding)


def ours(encoder: Encoder, x: np.ndarray, n_layers: int, precision: Precision = "float32"):
    mesh = make_mesh()
    params = jax.device_put(encoder.params, replicated(mesh))
    run = sharded_hidden(mesh, encoder.architecture, (n_layers - 1,), precision=precision)
    return lambda: fetch_batch(run(params, put_batch(mesh, x))[0], len(x))


def pytorch(a: Architecture, x: np.ndarray, n_layers: int, batch: int):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {
        k: torch.from_numpy(v).to(device) for k, v in load_checkpoint(CHECKPOINT).tensors.items()
    }

    def run() -> None:
        with torch.inference_mode():
            for part in torch.from_numpy(x).split(batch):
                forward(a, state, part.to(device), n_layers)[0][-1].cpu()

    return run


def best_batch(a: Architecture, x: np.ndarray, n_layers: int) -> int:
    """PyTorch's fastest batch, from one round of each."""
    batches = [b for b in (1, 2, 4, 8, 16, 32, 64, 128) if b <= len(x) / 2]
    seconds = alternate(
        {str(b): pytorch(a, x[: max(b, 16)], n_layers, b) for b in batches}, rounds=1
    )
    return min(batches, key=lambda b: seconds[str(b)] / max(b, 16))


def end_to_end(encoder: Encoder, n_windows: int, folder: str, batch: int = BATCH) -> float:
    """Windows a second of a whole extraction without its start: reading, computing, hashing, writing."""
    a = encoder.architecture
    root, rng = Path(folder) / "recordings", np.random.default_rng(0)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    rows = ["filename,time_len"]
    for i in range(-(-n_windows // 100)):
        name = f"p{i:05d}_s001_t000_preprocessed.npy"
        length = (a.seq_len + a.patch_len) * min(100, n_windows - 100 * i)
        np.save(root / name, rng.normal(size=(length, a.n_vars)).astype(np.float32))
        rows.append(f"{name},{length}")
    (root / "file_lengths_map.csv").write_text("\n".join(rows) + "\n")
    settings = ExtractConfig(
        root_path=str(root), out=f"{folder}/store", batch_size=batch, split=("all",), overwrite=True
    )
    list(extract(encoder, settings))  # compiles
    began = time.perf_counter()
    list(extract(encoder, settings))
    return n_windows / (time.perf_counter() - began)


def measure_alone(who: str, batch: int, n_layers: int) -> None:
    """Two batches from memory (PyTorch) or a store of four (ours), then this process's peak."""
    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    a = encoder.architecture
    if who == "ours":
        with tempfile.TemporaryDirectory() as folder:
            end_to_end(encoder, 4 * batch, folder, batch)
    else:
        run = pytorch(a, np.zeros((batch, a.seq_len, a.n_vars), np.float32), n_layers, batch)
        run(), run()
    print(peak_rss() // 1_000_000)


def main() -> None:
    start_jax()
    if "--alone" in sys.argv:
        who, batch, n_layers = sys.argv[2:5]
        return measure_alone(who, int(batch), int(n_layers))
    quick = "--quick" in sys.argv
    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    a = encoder.architecture
    windows = BATCH if not quick else 8
    x = np.random.default_rng(0).normal(size=(windows, a.seq_len, a.n_vars)).astype(np.float32)
    limit = matrix_product_flops()
    on_gpu = jax.default_backend() == "gpu"
    print(f"Extraction, {machine()}; demo encoder, float32; limit {limit / 1e9:,.0f} GFLOP/s.\n")
    print("| layer | | windows/s | ours is faster by | of the limit | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layer, n_layers in ((0, 1), (-1, a.n_layers)):
        best = best_batch(a, x, n_layers)
        contestants = {
            "ours": ours(encoder, x, n_layers),
            f"PyTorch, batch {BATCH}": pytorch(a, x, n_layers, BATCH),
            f"PyTorch, batch {best}, its best": pytorch(a, x, n_layers, best),
        }
        if on_gpu:
            contestants["ours, bfloat16 products"] = ours(encoder, x, n_layers, "bfloat16")
        seconds = alternate(contestants, rounds=3 if not quick else 1)
        alone = {}
        if not quick:
            memory = partial(peak_memory, "benchmarks.extract", "--alone")
            layers = str(n_layers)
            alone["ours"] = memory("ours", str(BATCH), layers)
            alone[f"PyTorch, batch {BATCH}"] = memory("pytorch", str(BATCH), layers)
            alone[f"PyTorch, batch {best}, its best"] = memory("pytorch", str(best), layers)
        for name, s in seconds.items():
            share = flops(a, n_layers) * len(x) / s / limit
            memory = f"{alone[name]:,} MB" if name in alone else ""
            print(
                f"| {layer} | {name} | {len(x) / s:.1f} | {s / seconds['ours']:.1f} | {share:.0%} | {memory} |",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        rate = end_to_end(encoder, 4 * windows, folder, windows)
    print(f"| -1 | ours, end to end | {rate:.1f} | | | |")


if __name__ == "__main__":
    main()
