"""SAEs trained by minsae_jax and by dictionary_learning on the same store: quality and time.

    pip install dictionary-learning
    make extract
    python -m benchmarks.libraries embeddings/store

Kinds, sparsity, learning rates, batch size, number of steps and the decay of the learning rate
are the same, and so is the scale of the tokens, a mean norm of √d_model; all in float32.
dictionary_learning's own settings are for long runs. In these short ones it has no warm-up of the
learning rate, thresholds from the first step on and AuxK after a sixteenth of the run, as
minsae_jax. Its AuxK and its penalty for the target L0 have d_model times their weights, since they
are for tokens of norm 1.

Of each kind and sparsity, the learning rate with the lowest FVU on the val store is shown, measured
on the test store. Time is CPU time for an SAE: minsae_jax trains all in one run from the store,
dictionary_learning one after the other from memory. Prints Markdown; --quick runs everything once,
small.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import minsae_jax as ms
from benchmarks.timing import machine, row, table_head
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.hyper import sparsity

KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu")
SPARSITIES = (4.0, 16.0)  # k, or target L0
LRS = (4e-3, 8e-3)
D_SAE_FACTOR = 8  # d_sae / d_model
GROUPS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of Matryoshka's features; minsae_jax's default
BATCH = 1024  # tokens
TILE = 4096  # tokens that are encoded at once
COLUMNS = ("kind", "k or target L0", "library", "lr", "L0", "FVU", "never active", "CPU s")
Numbers = np.ndarray  # tokens [tokens, d_model] or features [tokens, d_sae], float32


@dataclass(frozen=True)
class Trained:
    """An SAE that one of the libraries trained."""

    library: str
    kind: str
    sparsity: float
    lr: float
    seconds: float  # CPU time of its training
    encode: Callable[[Numbers], Numbers]
    decode: Callable[[Numbers], Numbers]


@dataclass(frozen=True)
class Measures:
    """Measures of an SAE on the tokens of a store."""

    l0: float
    fvu: float
    never_active: float  # share of the features


def read_tokens(store: str) -> Numbers:
    opened = ms.open_store(store)
    return opened.read_rows(0, opened.total_tokens)


def to_numpy(function: Callable[[Numbers], Any]) -> Callable[[Numbers], Numbers]:
    """Return the function with a NumPy array as its result."""
    return lambda x: np.asarray(function(x))


def measure(sae: Trained, x: Numbers) -> Measures:
    """Measure an SAE on tokens."""
    squares = 0.0
    n_active: Any = 0  # tokens on which each feature is active
    for start in range(0, len(x), TILE):
        tile = x[start : start + TILE]
        features = sae.encode(tile)
        squares += float(np.square(sae.decode(features) - tile).sum())
        n_active += (features > 0).sum(0)
    variance = float(np.square(x - x.mean(0)).sum())
    return Measures(n_active.sum() / len(x), squares / variance, float((n_active == 0).mean()))


def train_ours(store: Path, n_steps: int) -> Iterator[Trained]:
    """Train the members of one sweep."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = ms.TrainConfig(
            store=str(store),
            run_dir=f"{folder}/run",
            recipe="modern",
            kind=KINDS,
            k=SPARSITIES,
            target_l0=SPARSITIES,
            lr=LRS,
            feature_dim_factor=(D_SAE_FACTOR,),
            num_steps=n_steps,
            batch_size=BATCH,
        )
        run = ms.train(config)
        seconds = (time.process_time() - started) / len(run.members)
        for member in run.members:
            setting = sparsity(member.hyper)
            assert setting is not None
            sae = member.load()
            yield Trained(
                library="minsae_jax",
                kind=str(member.hyper["kind"]),
                sparsity=setting[1],
                lr=float(member.hyper["lr"]),
                seconds=seconds,
                encode=to_numpy(sae.encode),
                decode=to_numpy(sae.decode),
            )


def make_trainer(kind: str, n_active: float, lr: float, n_steps: int, d_model: int) -> Any:
    """Return a trainer of dictionary_learning. n_active: k or target L0."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    settings: dict[str, Any] = {
        "steps": n_steps,
        "activation_dim": d_model,
        "dict_size": D_SAE_FACTOR * d_model,
        "layer": -1,
        "lm_name": "",
        "lr": lr,
        "warmup_steps": 0,
        "decay_start": n_steps * 4 // 5,
        "seed": 0,
        "device": "cpu",
    }
    if kind == "jumprelu":
        settings |= {"target_l0": n_active, "sparsity_penalty": float(d_model)}
        return JumpReluTrainer(**settings, sparsity_warmup_steps=0)
    settings |= {"k": int(n_active), "threshold_start_step": 0, "auxk_alpha": d_model / 32}
    if kind == "topk":
        trainer = TopKTrainer(**settings)
    elif kind == "batchtopk":
        trainer = BatchTopKTrainer(**settings, threshold_beta=0.99)
    else:
        settings["group_fractions"] = list(GROUPS)
        trainer = MatryoshkaBatchTopKTrainer(**settings, threshold_beta=0.99)
    trainer.dead_feature_threshold = n_steps * BATCH // 16
    return trainer


def train_theirs(kind: str, n_active: float, lr: float, x: Numbers, n_steps: int) -> Trained:
    """Train an SAE with dictionary_learning on x, in a random order."""
    scale = np.float32(x.shape[1] ** 0.5 / np.linalg.norm(x, axis=1).mean())
    order = np.random.default_rng(0).permutation(len(x))
    n_batches = len(x) // BATCH
    started = time.process_time()
    trainer = make_trainer(kind, n_active, lr, n_steps, x.shape[1])
    for step in range(n_steps):
        first = step % n_batches * BATCH
        tokens = x[order[first : first + BATCH]] * scale
        trainer.update(step, torch.from_numpy(tokens))
    seconds = time.process_time() - started
    sae = trainer.ae.requires_grad_(False)
    return Trained(
        library="dictionary_learning",
        kind=kind,
        sparsity=n_active,
        lr=lr,
        seconds=seconds,
        encode=lambda x: sae.encode(torch.from_numpy(x * scale)).numpy(),
        decode=lambda features: sae.decode(torch.from_numpy(features)).numpy() / scale,
    )


def main() -> None:
    store = Path(sys.argv[1])
    is_quick = "--quick" in sys.argv
    n_steps = 20 if is_quick else 1000
    start_jax()
    # With several, torch's threads use CPU time while they wait for each other.
    torch.set_num_threads(1)
    train, val, test = (read_tokens(f"{store}{split}") for split in ("", "_val", "_test"))
    print(f"{machine()}; {n_steps:,} steps of {BATCH:,} tokens, d_model {train.shape[1]}\n")
    print(table_head(*COLUMNS), flush=True)
    ours = list(train_ours(store, n_steps))
    for kind in KINDS:
        for n_active in SPARSITIES:
            theirs = [train_theirs(kind, n_active, lr, train, n_steps) for lr in LRS]
            same = [sae for sae in ours if (sae.kind, sae.sparsity) == (kind, n_active)]
            for saes in (same, theirs):
                print_best(saes, val, test)


def print_best(saes: Sequence[Trained], val: Numbers, test: Numbers) -> None:
    """Print the measures on test tokens of the SAE with the lowest FVU on val tokens."""
    best = min(saes, key=lambda sae: measure(sae, val).fvu)
    measured = measure(best, test)
    cells = [
        best.kind,
        f"{best.sparsity:g}",
        best.library,
        f"{best.lr:g}",
        f"{measured.l0:.1f}",
        f"{measured.fvu:.4f}",
        f"{measured.never_active:.1%}",
        f"{best.seconds:.0f}",
    ]
    print(row(*cells), flush=True)


if __name__ == "__main__":
    main()
