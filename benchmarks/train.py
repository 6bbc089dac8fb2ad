"""Our step for all members against a plain PyTorch loop, one member after the other: `python -m benchmarks.train`.

Both do float32 arithmetic on the same tokens, in memory: minSAE's loss, Adam, and its statistics at every step. The
limit is this machine's best float32 matrix product at 10 d_model d_sae flops a token and member. Prints Markdown.
"""

import sys

import numpy as np
import torch

from benchmarks.timing import alternate, machine, matrix_product_flops
from minsae_jax import sharding
from minsae_jax.config import Train
from minsae_jax.sae.sweep import Sweep, make_groups

D_MODEL, FACTOR = 128, 8.0


def ours(members: int, x: np.ndarray):
    lambdas = tuple(0.01 * (i + 1) for i in range(members))
    settings = Train(recipe="minsae", lambda_sparsity=lambdas, feature_dim_factor=(FACTOR,)).resolved()
    sweep = Sweep(settings, make_groups(settings, D_MODEL), D_MODEL)
    state = sweep.init()

    def step() -> None:
        nonlocal state
        state, loss = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(1), tokens=len(x))
        loss.block_until_ready()

    return step


def pytorch(members: int, x: np.ndarray):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d_sae = int(D_MODEL * FACTOR)
    models = []
    for i in range(members):
        encoder, decoder = torch.nn.Linear(D_MODEL, d_sae).to(device), torch.nn.Linear(d_sae, D_MODEL).to(device)
        adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
        models.append((0.01 * (i + 1), encoder, decoder, adam))

    def step() -> None:
        tokens = torch.from_numpy(x).to(device)
        for lambda_sparsity, encoder, decoder, adam in models:
            features = torch.relu(encoder(tokens))
            mse = torch.nn.functional.mse_loss(decoder(features), tokens)
            l1 = lambda_sparsity * (features * decoder.weight.norm(dim=0)).sum(1).mean()
            adam.zero_grad()
            (mse + l1).backward()
            adam.step()
            active = features > 0
            mse.item(), l1.item(), active.sum(1).float().mean().item(), active.sum(0).cpu()

    return step


def main() -> None:
    sharding.start()
    rng = np.random.default_rng(0)
    limit = matrix_product_flops() / (10 * D_MODEL * D_MODEL * FACTOR)
    print(f"Training, {machine()}; d_model {D_MODEL}, d_sae {int(D_MODEL * FACTOR)}, float32.")
    print(f"Limit {limit / 1e3:,.0f} thousand tokens x members a second.\n")
    print("| members | batch | ours | PyTorch | ratio | of the limit |\n| --- | --- | --- | --- | --- | --- |")
    for members, batch in ((1, 4096), (8, 4096)) if "--quick" not in sys.argv else ((2, 512),):
        x = rng.normal(size=(batch, D_MODEL)).astype(np.float32)
        seconds = alternate({"ours": ours(members, x), "pytorch": pytorch(members, x)})
        rates = {name: members * batch / s for name, s in seconds.items()}
        print(
            f"| {members} | {batch:,} | {rates['ours'] / 1e3:,.0f} k/s | {rates['pytorch'] / 1e3:,.0f} k/s "
            f"| {rates['ours'] / rates['pytorch']:.1f} | {rates['ours'] / limit:.0%} |"
        )


if __name__ == "__main__":
    main()
