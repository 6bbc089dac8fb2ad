"""Our step for all members against plain PyTorch loops, one member after the other: `python -m benchmarks.train`.

All do the same arithmetic on the same tokens, in memory: minSAE's loss and Adam. "eager" is the loop as minSAE runs it,
with its statistics at every step; "compiled" is torch.compile, which wants a C++ compiler, with fused Adam and no
statistics; ours has all of its own. The limit is this machine's best matrix product of that precision at
10 d_model d_sae flops a token and member. "End to end" is a run from a store, with everything that a run does but
evaluations. Prints Markdown; --quick runs everything once, small.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import alternate, machine, matrix_product_flops, peak_memory, peak_rss
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.sweep import Sweep, make_groups
from minsae_jax.sae.trainer import train

D_MODEL, BATCH, FILE = (
    128,
    4096,
    245_632,
)  # the last: tokens of a whole shard, which is minSAE's batch
COLUMNS = ("ours", "eager", "compiled")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], None]


def lambdas(members: int) -> tuple[float, ...]:
    return tuple(0.01 * (i + 1) for i in range(members))


def ours(members: int, d_sae: int, precision: str, x: np.ndarray) -> Step:
    settings = TrainConfig(
        recipe="minsae",
        lambda_sparsity=lambdas(members),
        feature_dim_factor=(d_sae / D_MODEL,),
        precision=precision,
    ).resolved()
    sweep = Sweep(settings, make_groups(settings, D_MODEL), D_MODEL)
    state = sweep.init()

    def step() -> None:
        nonlocal state
        state, loss = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(1), tokens=len(x))
        loss.block_until_ready()

    return step


def pytorch(
    members: int, d_sae: int, precision: str, x: np.ndarray, compiled: bool = False
) -> Step:
    def loss(encoder, decoder, tokens, lambda_sparsity):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            features = torch.relu(encoder(tokens))
            x_hat = decoder(features)
        mse = torch.nn.functional.mse_loss(x_hat.float(), tokens)
        l1 = lambda_sparsity * (features * decoder.weight.norm(dim=0)).sum(1).mean()
        return mse, l1, features

    run = torch.compile(loss) if compiled else loss
    models = []
    for lambda_sparsity in lambdas(members):
        encoder, decoder = (
            torch.nn.Linear(*s).to(DEVICE) for s in ((D_MODEL, d_sae), (d_sae, D_MODEL))
        )
        adam = torch.optim.Adam(
            [*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=compiled
        )
        models.append((torch.tensor(lambda_sparsity, device=DEVICE), encoder, decoder, adam))

    def step() -> None:
        tokens = torch.from_numpy(x).to(DEVICE)
        for lambda_sparsity, encoder, decoder, adam in models:
            mse, l1, features = run(encoder, decoder, tokens, lambda_sparsity)
            adam.zero_grad()
            (mse + l1).backward()
            adam.step()
            if not compiled:
                active = features > 0
                (
                    (mse + l1).item(),
                    mse.item(),
                    l1.item(),
                    active.sum(1).float().mean().item(),
                    active.sum(0).cpu(),
                )
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def print_rates(
    d_sae: int,
    precision: str,
    members: tuple[int, ...],
    batch: int,
    rounds: int,
    with_compiled: bool = True,
) -> None:
    limit = matrix_product_flops(dtype=precision) / (10 * D_MODEL * d_sae)
    x = np.random.default_rng(0).normal(size=(batch, D_MODEL)).astype(np.float32)
    for count in members:
        contestants = {
            "ours": ours(count, d_sae, precision, x),
            "eager": pytorch(count, d_sae, precision, x),
        }
        if with_compiled:
            contestants["compiled"] = pytorch(count, d_sae, precision, x, compiled=True)
        seconds = alternate(contestants, rounds)
        rates = [
            count * batch / seconds[name] / 1e3 if name in seconds else np.nan for name in COLUMNS
        ]
        cells = [
            f"{d_sae:,}",
            precision,
            f"{count}",
            f"{batch:,}",
            *(f"{rate:,.0f}" for rate in rates),
        ]
        cells += [f"{rates[0] / rate:.1f}" for rate in rates[1:]]
        print(
            f"| {' | '.join(cells)} | {rates[0] * 1e3 / limit:.0%} of {limit / 1e3:,.0f} |",
            flush=True,
        )


def end_to_end(members: int, steps: int) -> float:
    """Tokens x members a second of a run, without its start and end: from a long one and a short one."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store/l-1"
        store.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(4):
            np.save(
                store / f"b{i:04d}.npy", rng.normal(size=(512, 101, D_MODEL)).astype(np.float32)
            )
        seconds = []
        for num_steps in (10, 10, steps + 10):  # the first compiles
            settings = TrainConfig(
                store=str(store.parent), run_dir=f"{folder}/run", lambda_sparsity=lambdas(members),
                num_steps=num_steps, overwrite=True, checkpoint_every=10**6,
            )  # fmt: skip
            began = time.perf_counter()
            train(settings)
            seconds.append(time.perf_counter() - began)
            shutil.rmtree(f"{folder}/run")
    return members * steps * BATCH / (seconds[2] - seconds[1])


def measure_alone(who: str, members: int, batch: int) -> None:
    """Two steps, then this process's peak."""
    x = np.random.default_rng(0).normal(size=(batch, D_MODEL)).astype(np.float32)
    step = (
        ours(members, 1024, "float32", x) if who == "ours" else pytorch(members, 1024, "float32", x)
    )
    step(), step()
    print(peak_rss() // 1_000_000)


def main() -> None:
    start_jax()
    if "--alone" in sys.argv:
        who, members, batch = sys.argv[2:5]
        return measure_alone(who, int(members), int(batch))
    quick = "--quick" in sys.argv
    print(f"Training, {machine()}; d_model {D_MODEL}; thousand tokens x members a second.\n")
    print(
        "| d_sae | products | members | batch | ours | eager | compiled | ours / eager | ours / compiled | limit |"
    )
    print("| --- " * 10 + "|")
    if quick:
        print_rates(256, "float32", (2,), 512, rounds=1, with_compiled=False)
        return
    for d_sae in (1024, 4096):
        for precision in ("float32", "bfloat16"):
            print_rates(d_sae, precision, (1, 4, 8, 16), BATCH, rounds=5 if d_sae == 1024 else 3)
    print_rates(1024, "float32", (1,), FILE, rounds=2)
    limit = matrix_product_flops() / (10 * D_MODEL * 1024)
    rate = end_to_end(members=8, steps=100)
    print(
        f"\nEnd to end, 8 members, d_sae 1,024, float32: {rate / 1e3:,.0f}, {rate / limit:.0%} of {limit / 1e3:,.0f}."
    )
    print("\n| members | batch | peak memory, ours | eager |\n| --- | --- | --- | --- |")
    for members, batch in ((1, BATCH), (8, BATCH), (1, FILE), (8, FILE)):
        alone = [
            peak_memory("benchmarks.train", "--alone", who, str(members), str(batch))
            for who in ("ours", "eager")
        ]
        print(f"| {members} | {batch:,} | {alone[0]:,} MB | {alone[1]:,} MB |", flush=True)


if __name__ == "__main__":
    main()
