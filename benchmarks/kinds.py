"""The training step of every kind of SAE against ReLU's: part of `make bench-train`.

Each kind has a sweep of its own, and all take turns on the same tokens. In rows with "dead" some
features are counted as dead at every step, which then learn from the residual (AuxK).
Prints Markdown; --quick runs everything once, small.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.timing import alternate_all, machine
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.step import SweepState
from minsae_jax.sae.sweep import Sweep

D_MODEL = 128
N_MEMBERS = 8
NEVER = 2**29  # tokens
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {"kind": ("relu",), "lambda_sparsity": (5.0,)},
    "topk": {"kind": ("topk",), "k": (32.0,)},
    "batchtopk": {"kind": ("batchtopk",), "k": (32.0,)},
    "matryoshka": {"kind": ("matryoshka",), "k": (32.0,)},
    "jumprelu, tanh": {"kind": ("jumprelu",), "lambda_sparsity": (5.0,)},
    "jumprelu, target L0": {"kind": ("jumprelu",), "target_l0": (32.0,)},
}
AUX_KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu, target L0")
DEAD_SHARES = (0.05, 0.5)


def sweep_of(
    name: str, d_sae: int, n_members: int, precision: str = "float32", mesh: str | None = None
) -> Sweep:
    """Return a sweep of one kind, a key of SETTINGS, whose members differ in their seeds."""
    config = TrainConfig(
        seed=tuple(range(n_members)),
        lr=("auto",),
        feature_dim_factor=(d_sae / D_MODEL,),
        dead_after=NEVER,
        aux_dead_after=NEVER,
        precision=precision,
        mesh=mesh,
        **SETTINGS[name],
    )
    plan = config.plan()
    return Sweep(plan, make_groups(plan, D_MODEL), D_MODEL)


def with_dead(state: SweepState, share: float) -> SweepState:
    """Return the state of a sweep with the first share of the features counted as dead."""
    (group,) = state.groups
    n_members, d_sae = group.tokens_since_fired.shape
    is_dead = np.arange(d_sae) < share * d_sae
    silent = np.tile(np.where(is_dead, NEVER, 0).astype(np.int32), (n_members, 1))
    dead = jax.device_put(silent, group.tokens_since_fired.sharding)
    return state._replace(groups=(group._replace(tokens_since_fired=dead),))


def step_of(
    name: str, d_sae: int, x: np.ndarray, n_members: int, dead_share: float = 0
) -> Callable[[], None]:
    """Return a function that makes one step of a sweep of one kind, and waits for it."""
    sweep = sweep_of(name, d_sae, n_members)
    state = sweep.init(median=np.zeros(D_MODEL, np.float32))

    def run() -> None:
        nonlocal state
        if dead_share:
            # Most features are active in every batch of these tokens and would never be dead.
            state = with_dead(state, dead_share)
        tokens = sweep.put(x)
        state, loss = sweep.step(state, sweep.hyper, tokens, np.float32(1), n_tokens=len(x))
        loss.block_until_ready()

    return run


def print_kinds(d_sae: int, batch: int, n_members: int, rounds: int) -> None:
    """Print one row for each kind: milliseconds of a step and member, and its ratio to ReLU."""
    x = np.random.default_rng(0).normal(size=(batch, D_MODEL)).astype(np.float32)
    contestants = {name: step_of(name, d_sae, x, n_members) for name in SETTINGS}
    for name in AUX_KINDS:
        for share in DEAD_SHARES:
            run = step_of(name, d_sae, x, n_members, share)
            contestants[f"{name}, {share:.0%} dead"] = run
    seconds = alternate_all(contestants, rounds)
    for name, times in seconds.items():
        # Of the same round: the load of the machine changes from round to round.
        ratios = [time / relu for time, relu in zip(times, seconds["relu"], strict=True)]
        ms = [1e3 * value / n_members for value in (statistics.median(times), min(times))]
        cells = [f"{d_sae:,}", name, f"{ms[0]:.1f}", f"{ms[1]:.1f}"]
        cells += [f"{statistics.median(ratios):.2f}", f"{min(times) / min(seconds['relu']):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    start_jax()
    is_quick = "--quick" in sys.argv
    batch = 256 if is_quick else 4096
    n_members = 2 if is_quick else N_MEMBERS
    print(f"\nKinds, {machine()}; d_model {D_MODEL}, batch {batch:,}, {n_members} members.\n")
    print("| d_sae | kind | ms per member, median | minimum | / relu, median | of minima |")
    print("| --- " * 6 + "|")
    if is_quick:
        print_kinds(256, batch, n_members, rounds=1)
        return
    print_kinds(1024, batch, n_members, rounds=11)
    print_kinds(4096, batch, n_members, rounds=5)


if __name__ == "__main__":
    main()
