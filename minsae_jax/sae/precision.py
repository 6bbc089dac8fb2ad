"""How matrix products are computed: in float32, TF32 or of bfloat16 factors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from minsae_jax.parallel.mesh import on_cpu
from minsae_jax.sae.kinds import KINDS, Batch, BatchContext, Objective


def matmul_precision(precision: str) -> str:
    """Return JAX's precision of products of float32 factors.

    GPUs multiply float32 in TF32 (10 bits of mantissa) by default; CPUs have no TF32.
    """
    return "default" if precision == "tf32" else "highest"


def with_bfloat16(
    objective: Objective, d_model: int, d_sae: int, tiling: tuple[int, int]
) -> Objective:
    """Return the objective with bfloat16 factors in its products.

    XLA's CPU runtime lacks bfloat16 products for some shapes, among them those of a single tile;
    there factors are rounded to bfloat16 and multiplied in float32. It reports this only when a
    program runs, so on CPU a small one is tried, that of ReLU, whose products all kinds have.
    """
    low = replace(objective, factors="bfloat16")
    if not on_cpu():
        return low
    n_tiles, tile = tiling
    relu = KINDS["relu"]
    shapes = relu.shapes(d_model, d_sae)
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    hyper = {"lambda_sparsity": np.float32(0)}
    try:
        with jax.ensure_compile_time_eval():
            # Created in here, so that they are arrays and not traced.
            context = BatchContext(is_dead=jnp.zeros(d_sae, bool), n_dead=jnp.int32(0))
            x = jnp.zeros((min(n_tiles, 2), tile, d_model))
            run = jax.jit(relu.batch_sums, static_argnums=3)
            jax.block_until_ready(run(params, Batch(x, None), hyper, low, context))
    except jax.errors.JaxRuntimeError:
        return replace(objective, factors="rounded")
    return low
