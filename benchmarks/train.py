"""The training step of a sweep against PyTorch loops over its members: `make bench-train`.

All do the same arithmetic on the same tokens, given in host memory: minSAE's loss and Adam.
"eager" is the loop as minSAE runs it, with its statistics at every step; "compiled" is
torch.compile (which needs a C++ compiler) with fused Adam and no statistics; minsae_jax includes
its statistics. A call makes STEPS steps and waits for the last. The limit is the machine's best
matrix product at 10 d_model d_sae FLOP for a token and member. "End to end" is a run from a store,
without evaluations. Prints Markdown; --quick runs everything once, small.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.kinds import SETTINGS
from benchmarks.timing import (
    alternate,
    import_torch,
    machine,
    matrix_product_flops,
    peak_memory,
    peak_rss,
    row,
    table_head,
)
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.sweep import Sweep
from minsae_jax.sae.trainer import train

D_MODEL = 128
BATCH = 4096  # tokens
SHARD = 245_632  # tokens of a shard, which is minSAE's batch
MARGIN = 50  # steps of a run before and after those that are timed; a log interval
CONTESTANTS = ("minsae_jax", "eager", "compiled")
COLUMNS = ("d_sae", "products", "members", "batch", *CONTESTANTS, "/ eager", "/ compiled", "limit")
Steps = Callable[[], None]
torch = import_torch()  # only PyTorch's loops need it


def lambdas(n_members: int) -> tuple[float, ...]:
    return tuple(0.01 * (i + 1) for i in range(n_members))


def jax_steps(n_members: int, d_sae: int, precision: str, x: np.ndarray, n_steps: int) -> Steps:
    config = TrainConfig(
        recipe="minsae",
        lambda_sparsity=lambdas(n_members),
        feature_dim_factor=(d_sae / D_MODEL,),
        precision=precision,
    )
    plan = config.plan()
    sweep = Sweep(plan, make_groups(plan, D_MODEL), D_MODEL)
    state = sweep.init()

    def run() -> None:
        nonlocal state
        for _ in range(n_steps):
            tokens = sweep.put(x)
            state, loss = sweep.step(state, sweep.hyper, tokens, np.float32(1), n_tokens=len(x))
        loss.block_until_ready()

    return run


def pytorch_steps(
    n_members: int,
    d_sae: int,
    precision: str,
    x: np.ndarray,
    n_steps: int,
    compiled: bool = False,
) -> Steps:
    use_bfloat16 = precision == "bfloat16"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def loss(encoder, decoder, tokens, lambda_sparsity):
        with torch.autocast(device, torch.bfloat16, enabled=use_bfloat16):
            features = torch.relu(encoder(tokens))
            x_hat = decoder(features)
        mse = torch.nn.functional.mse_loss(x_hat.float(), tokens)
        l1 = lambda_sparsity * (features * decoder.weight.norm(dim=0)).sum(1).mean()
        return mse, l1, features

    run_loss = torch.compile(loss) if compiled else loss
    models = []
    for lambda_sparsity in lambdas(n_members):
        encoder = torch.nn.Linear(D_MODEL, d_sae).to(device)
        decoder = torch.nn.Linear(d_sae, D_MODEL).to(device)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        adam = torch.optim.Adam(parameters, lr=1e-3, fused=compiled)
        models.append((torch.tensor(lambda_sparsity, device=device), encoder, decoder, adam))

    def run() -> None:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for _ in range(n_steps):
            tokens = torch.from_numpy(x).to(device)
            for lambda_sparsity, encoder, decoder, adam in models:
                mse, l1, features = run_loss(encoder, decoder, tokens, lambda_sparsity)
                adam.zero_grad()
                (mse + l1).backward()
                adam.step()
                if not compiled:
                    log_as_minsae(mse, l1, features)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def log_as_minsae(mse: Any, l1: Any, features: Any) -> None:
    """Fetch the statistics that minSAE fetches at every step, from torch's tensors."""
    active = features > 0
    for value in (mse + l1, mse, l1, active.sum(1).float().mean()):
        value.item()
    active.sum(0).cpu()


def measure_rates(
    d_sae: int,
    precision: str,
    n_members: int,
    batch: int,
    rounds: int,
    with_compiled: bool = True,
) -> dict[str, float]:
    """Return tokens x members per second of each contestant."""
    x = np.random.default_rng(0).normal(size=(batch, D_MODEL)).astype(np.float32)
    # On a GPU one step is too short to be timed alone.
    n_steps = 20 if jax.default_backend() == "gpu" and batch == BATCH else 1
    arguments = (n_members, d_sae, precision, x, n_steps)
    contestants = {"minsae_jax": jax_steps(*arguments), "eager": pytorch_steps(*arguments)}
    if with_compiled:
        contestants["compiled"] = pytorch_steps(*arguments, compiled=True)
    tokens = n_members * batch * n_steps
    return {name: tokens / seconds for name, seconds in alternate(contestants, rounds).items()}


def rates_row(
    d_sae: int, precision: str, n_members: int, batch: int, rates: dict[str, float], flops: float
) -> str:
    """Return a row of COLUMNS: thousand tokens x members per second.

    flops: FLOP/s of the machine's best product.
    """
    limit = flops / (10 * D_MODEL * d_sae)
    cells = [f"{d_sae:,}", precision, f"{n_members}", f"{batch:,}"]
    cells += [f"{rates.get(name, np.nan) / 1e3:,.0f}" for name in CONTESTANTS]
    rate = rates["minsae_jax"]
    cells += [f"{rate / rates.get(name, np.nan):.1f}" for name in CONTESTANTS[1:]]
    return row(*cells, f"{rate / limit:.0%} of {limit / 1e3:,.0f}")


def print_rates(
    d_sae: int,
    precision: str,
    member_counts: tuple[int, ...],
    batch: int,
    rounds: int,
    quick: bool = False,
) -> None:
    """Print one row for each number of members.

    quick: without torch.compile, which needs a C++ compiler.
    """
    flops = matrix_product_flops(precision, quick)
    for n_members in member_counts:
        rates = measure_rates(d_sae, precision, n_members, batch, rounds, with_compiled=not quick)
        print(rates_row(d_sae, precision, n_members, batch, rates, flops), flush=True)


def write_noise_store(store: Path, n_shards: int, n_sequences: int) -> None:
    """Write a store of random tokens; n_sequences: of 101 tokens, in a shard."""
    folder = store / "l-1"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n_shards):
        shard = rng.normal(size=(n_sequences, 101, D_MODEL)).astype(np.float32)
        np.save(folder / f"b{i:04d}.npy", shard)


def end_to_end(
    n_members: int,
    n_steps: int,
    precision: str = "float32",
    d_sae: int = 1024,
    batch: int = BATCH,
    kind: str = "relu",
) -> float:
    """Return tokens x members per second of a run, without its start and end.

    n_steps: that are timed, a multiple of MARGIN. The steps before them compile; those after them
    keep the last checkpoint out. The host is as many calls ahead of the devices when the time
    starts as when it stops. kind: a key of `kinds.SETTINGS`.
    """
    times = {}

    def on_step(step: int) -> None:
        times[step] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        write_noise_store(Path(folder) / "store", n_shards=4, n_sequences=512)
        config = TrainConfig(
            store=f"{folder}/store",
            run_dir=f"{folder}/run",
            seed=tuple(range(n_members)),
            feature_dim_factor=(d_sae / D_MODEL,),
            batch_size=batch,
            num_steps=n_steps + 2 * MARGIN,
            precision=precision,
            eval_window=MARGIN,
            checkpoint_every=10**6,
            **SETTINGS[kind],
        )
        train(config, on_step=on_step)
    seconds = times[MARGIN + n_steps] - times[MARGIN]
    return n_members * n_steps * batch / seconds


def measure_alone(contestant: str, n_members: int, batch: int) -> None:
    """Make two steps, then print this process's peak memory in MB."""
    x = np.random.default_rng(0).normal(size=(batch, D_MODEL)).astype(np.float32)
    make = jax_steps if contestant == "minsae_jax" else pytorch_steps
    run = make(n_members, 1024, "float32", x, n_steps=2)
    run()
    print(peak_rss() // 1_000_000)


def print_memory() -> None:
    print("\n| members | batch | peak memory, minsae_jax | eager |\n| --- | --- | --- | --- |")
    for n_members, batch in ((1, BATCH), (8, BATCH), (1, SHARD), (8, SHARD)):
        megabytes = []
        for contestant in ("minsae_jax", "eager"):
            arguments = ("--alone", contestant, str(n_members), str(batch))
            megabytes.append(peak_memory("benchmarks.train", *arguments))
        print(
            f"| {n_members} | {batch:,} | {megabytes[0]:,} MB | {megabytes[1]:,} MB |", flush=True
        )


def main() -> None:
    start_jax()
    if "--alone" in sys.argv:
        contestant, n_members, batch = sys.argv[2:5]
        measure_alone(contestant, int(n_members), int(batch))
        return
    print(f"Training, {machine()}; d_model {D_MODEL}; thousand tokens x members per second.\n")
    print(table_head(*COLUMNS))
    if "--quick" in sys.argv:
        print_rates(256, "float32", (2,), 512, rounds=1, quick=True)
        return
    precisions = ["float32", "bfloat16"]
    if jax.default_backend() == "gpu":
        precisions.insert(1, "tf32")
    for d_sae in (1024, 4096):
        for precision in precisions:
            rounds = 5 if d_sae == 1024 else 3
            print_rates(d_sae, precision, (1, 4, 8, 16), BATCH, rounds)
    print_rates(1024, "float32", (1,), SHARD, rounds=2)
    for precision in precisions:
        limit = matrix_product_flops(precision) / (10 * D_MODEL * 1024)
        rate = end_to_end(n_members=8, n_steps=100, precision=precision)
        print(
            f"\nEnd to end, 8 members, d_sae 1,024, {precision}: {rate / 1e3:,.0f}, "
            f"{rate / limit:.0%} of {limit / 1e3:,.0f}."
        )
    print_memory()


if __name__ == "__main__":
    main()
