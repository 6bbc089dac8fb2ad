"""The report of a large SAE: seconds of each part, bytes and memory.

    python -m benchmarks.report [--d_sae 16384] [--tokens 500000 1000000] [--features 2048]

For each number of tokens, a store of made-up activations in float16 (256 bytes each) and its
recordings are written to a temporary folder. Tokens are sums of a few directions, the r-th of which
is in a share of the tokens about proportional to 1 / r; an SAE with these directions has 32 active
features per token. Each size is measured in a process of its own. The evaluation's measures are not
part of it.
"""

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from minsae_jax.activations.manifest import StoreIdentity
from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.parallel.processes import start_jax
from minsae_jax.report.budget import choose_features, plan_pages
from minsae_jax.report.context import Context
from minsae_jax.report.describe import describe_all, feature_row
from minsae_jax.report.examples import collect
from minsae_jax.report.excerpts import shown_samples
from minsae_jax.report.folder import write_pages
from minsae_jax.sae.member import SparseAutoencoder
from tests.report.made_up import make_meta

D_MODEL = 128
N_VARS = 19
SEQ_LEN = 300  # samples
PATCH_LEN = 10
GRID = TokenGrid.patches(SEQ_LEN // PATCH_LEN, PATCH_LEN, n_cls=1)
WINDOWS = 120  # of a recording: six minutes
N_ATOMS = 12  # directions in a token
N_ACTIVE = 32  # features of a token
# Of a feature: top examples, those of one recording, and patches around each
TOP = 16
PER_RECORDING = 3
W = 10


def directions(d_sae: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(d_sae, D_MODEL)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_tokens(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return sums of N_ATOMS directions; the share of the r-th is about proportional to 1 / r."""
    rank = len(rows) ** rng.random((n, N_ATOMS)) - 1
    strength = rng.exponential(size=(n, N_ATOMS)).astype(np.float32)
    x = np.zeros((n, D_MODEL), np.float32)
    for i in range(N_ATOMS):
        x += strength[:, i, None] * rows[rank[:, i].astype(int)]
    return x


def make_sae(d_sae: int, kind: str) -> SparseAutoencoder:
    rows = directions(d_sae)
    params = {"W_enc": rows.T, "b_enc": np.zeros(d_sae), "W_dec": rows, "b_dec": np.zeros(D_MODEL)}
    pre = make_tokens(rows, 256, np.random.default_rng(1)) @ rows.T
    threshold = np.quantile(pre, 1 - N_ACTIVE / d_sae)
    config = {"kind": kind}
    if kind == "relu":
        params["b_enc"] -= threshold
    elif kind == "batchtopk":
        params["threshold"] = threshold
    elif kind == "topk":
        config["k"] = N_ACTIVE
    return SparseAutoencoder(params, config)


def write_data(folder: Path, n_tokens: int, d_sae: int) -> None:
    """Write recordings of brown noise and a store of their tokens, without flushing to the disk."""
    rng = np.random.default_rng(2)
    rows = directions(d_sae)
    n_recordings = max(1, round(n_tokens / (WINDOWS * N_VARS * GRID.n_tokens)))
    names = [f"p{i:05d}_s001_t000_preprocessed.npy" for i in range(n_recordings)]
    n_samples = WINDOWS * SEQ_LEN
    (folder / "recordings").mkdir()
    with (folder / "recordings/file_lengths_map.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "time_len"), *((n, n_samples) for n in names)])
    for name in names:
        eeg = np.cumsum(rng.normal(size=(n_samples, N_VARS)), axis=0)
        eeg -= eeg.mean(axis=0)
        np.save(folder / "recordings" / name, (eeg / eeg.std(axis=0)).astype(np.float32))
    data = {"split": "test", "seq_len": SEQ_LEN, "revin": False}
    identity = StoreIdentity(
        layer=-1,
        layer_index=0,
        dtype="float16",
        n_tokens=GRID.n_tokens,
        d_model=D_MODEL,
        encoder="0" * 64,
        data=data,
    )
    sequences = WINDOWS * N_VARS
    with mock.patch("os.fsync"), StoreWriter(folder / "store/l-1", identity) as writer:
        writer.begin()
        for number in range(n_recordings):
            x = make_tokens(rows, sequences * GRID.n_tokens, rng).astype(np.float16)
            writer.write(number, [x.reshape(sequences, GRID.n_tokens, D_MODEL)])
        provenance = {
            "recordings": np.array(names),
            "shifted": np.zeros(n_recordings, bool),
            "recording": np.repeat(np.arange(n_recordings), sequences).astype(np.int32),
            "window": np.tile(np.repeat(np.arange(WINDOWS), N_VARS), n_recordings).astype(np.int32),
            "channel": np.tile(np.arange(N_VARS), WINDOWS * n_recordings).astype(np.int32),
        }
        writer.finish(provenance, GRID)


@contextmanager
def measured(what: str, n_tokens: int | None = None) -> Iterator[None]:
    wall = time.perf_counter()
    cpu = time.process_time()
    yield
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    speed = "" if n_tokens is None else f", {n_tokens / wall:,.0f} tokens/s"
    print(f"{what}: {wall:.1f} s wall, {cpu:.1f} s CPU{speed}; {memory:.2f} GB", flush=True)


def write_report(
    folder: Path, dataset: Dataset, sae: SparseAutoencoder, n_features: int | None
) -> None:
    n_tokens = dataset.store.total_tokens
    with measured("examples", n_tokens):
        activity = collect(dataset, sae, TOP, PER_RECORDING)
    n_active = int((activity.active > 0).sum())
    n_samples = shown_samples(dataset, W)
    budget = plan_pages(dataset, n_samples, TOP, n_active, n_features)
    print(f"{budget.n_features:,} of {n_active:,} active features have a page, "
          f"with {budget.montage_examples} montages")  # fmt: skip
    context = Context(dataset, sae, activity, None, W, montage_examples=budget.montage_examples)
    chosen = choose_features(sae, activity, [], budget.n_features)
    others = sorted(set(range(sae.d_sae)) - set(chosen))
    rows = (feature_row(context, feature) for feature in others)
    with measured("pages"):
        write_pages(folder, make_meta(), describe_all(context, chosen), rows)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    index = (folder / "index_data.js").stat().st_size
    print(f"report: {sum(sizes) / 1e6:.0f} MB in {len(sizes)} files, index {index / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--d_sae", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500_000, 1_000_000])
    parser.add_argument("--kind", default="batchtopk", choices=["relu", "batchtopk", "topk"])
    parser.add_argument("--features", type=int, help="features with a page; default: that fit")
    args = parser.parse_args()
    if len(args.tokens) > 1:
        for n_tokens in args.tokens:
            of_size = ["--d_sae", str(args.d_sae), "--tokens", str(n_tokens), "--kind", args.kind]
            if args.features is not None:
                of_size += ["--features", str(args.features)]
            subprocess.run([sys.executable, "-m", "benchmarks.report", *of_size], check=True)
        return
    start_jax()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, args.tokens[0], args.d_sae)
        dataset = open_dataset(folder / "store", -1, None, folder / "recordings")
        n_recordings = len(dataset.recordings)
        print(f"{args.kind}, {args.d_sae:,} features, {dataset.store.total_tokens:,} tokens of "
              f"{n_recordings} recordings, {jax.devices()}")  # fmt: skip
        sae = make_sae(args.d_sae, args.kind)
        write_report(folder / "report", dataset, sae, args.features)


if __name__ == "__main__":
    main()
