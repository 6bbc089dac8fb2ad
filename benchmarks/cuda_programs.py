"""The programs that `make cuda-check` compiles: the package's own, for cards that are not there.

XLA compiles for a card from its description. The members' states, tokens and windows are shapes
only, so nothing is allocated or run.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from minsae_jax.encoder.compute import sharded
from minsae_jax.encoder.native import hidden_function
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.encoder.patchtst.model import PatchTST
from minsae_jax.evaluation import pooling, token_pass
from minsae_jax.parallel.mesh import (
    DATA,
    SWEEP,
    batch_sharding,
    members_sharding,
    replicated,
    tile_batch,
)
from minsae_jax.sae.batches import STEPS_PER_CALL
from minsae_jax.sae.config import SPARSITY_SETTINGS, TrainConfig
from minsae_jax.sae.data import SAMPLE_BATCH
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.measures import batch_program
from minsae_jax.sae.step import sweep_steps
from minsae_jax.sae.sweep import Sweep

# NVIDIA's H100 SXM, as XLA describes it. An H200 has the same chip, with faster memory.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 cuda_compute_capability { major: 9 }
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
N_MEMBERS = 8
D_MODEL = 128
BATCH = 4096  # tokens of a step
SIZES = (1024, 4096, 16384)  # d_sae
PRECISIONS = ("float32", "tf32", "bfloat16")
WINDOWS = 128
SEQUENCES = 64  # of the test store, read at once
SPARSITY = 32.0  # λ, k or target L0; no program depends on it

# The encoder of configs/demo, whose file only torch reads.
DEMO = Architecture(
    n_vars=19,
    seq_len=1000,
    patch_len=10,
    stride=10,
    n_layers=3,
    d_model=D_MODEL,
    n_heads=16,
    d_ff=256,
    activation="relu",
    norm="BatchNorm",
    pre_norm=False,
    res_attention=True,
    shared_embedding=True,
    use_cls_token=True,
    pos_dim=D_MODEL,
    head_type="pretrain",
    target_dim=10,
    individual_head=False,
    revin=False,
    revin_affine=False,
    revin_eps=1e-5,
)
# An array of the residual stream four times as wide. A score matrix of all heads has three times as
# many numbers; cuDNN's values, padded to the width of three layers, have a quarter less.
MAX_EXTRACTION_OUTPUT = 4 * WINDOWS * DEMO.n_vars * DEMO.n_tokens * D_MODEL


@dataclass(frozen=True)
class Program:
    """A program to compile for a mesh of cards."""

    name: str
    d_sae: int | None
    precision: str
    mesh: str  # cards along sweep x cards along data
    lower: Callable[[], jax.stages.Lowered]
    cublas: bool = False  # products by cuBLAS alone, which XLA otherwise compares with Triton
    max_output: float = math.inf  # numbers that a launch may write as one array
    n_steps: int = 1  # training steps of a call

    def __str__(self) -> str:
        size = "" if self.d_sae is None else f", d_sae {self.d_sae:,}"
        library = ", cuBLAS" if self.cublas else ""
        return f"{self.name}{size}, {self.precision}, mesh {self.mesh}{library}"

    def compile(self) -> jax.stages.Compiled:
        options = {"xla_gpu_enable_triton_gemm": False} if self.cublas else None
        return self.lower().compile(options)


def as_on_gpu() -> AbstractContextManager:
    """Return a context in which the package takes its paths for GPUs.

    The process has CPU devices only, and code that asks would take those of the CPU.
    """
    return mock.patch.object(jax, "default_backend", return_value="gpu")


def all_programs() -> Iterator[Program]:
    """Yield every program, large sizes last."""
    yield from _steps(SIZES[0])
    for precision in PRECISIONS:
        step = _step("relu", "lambda_sparsity", SIZES[0], precision, "1x1")
        yield replace(step, cublas=True)
    for layer in (0, -1):
        for precision in PRECISIONS:
            lower = partial(_lower_extraction, layer, precision)
            program = Program(f"extraction, layer {layer}", None, precision, "1x1", lower)
            yield replace(program, max_output=MAX_EXTRACTION_OUTPUT)
    for kind in KINDS:
        yield from _measurements(kind, SIZES[0])
    lower = partial(_lower_merge, SIZES[0])
    yield Program("merge of strongest tokens", SIZES[0], "float32", "1x1", lower)
    for d_sae in SIZES[1:]:
        yield from _steps(d_sae)


def smallest_program() -> Program:
    return _step("relu", "lambda_sparsity", 256, "bfloat16", "1x1")


def _steps(d_sae: int) -> Iterator[Program]:
    """Yield the training steps of all kinds that can be trained."""
    for kind, settings in SPARSITY_SETTINGS.items():
        for setting in settings:
            # By default four cards share the members.
            for mesh in ("1x1", "4x1"):
                for precision in PRECISIONS:
                    yield _step(kind, setting, d_sae, precision, mesh)
            if d_sae == SIZES[0]:
                # Here they share the tokens, and gradients are summed over the cards.
                yield _step(kind, setting, d_sae, "bfloat16", "1x4")
                yield _step(kind, setting, d_sae, "bfloat16", "1x1", STEPS_PER_CALL)


def _measurements(kind: str, d_sae: int) -> Iterator[Program]:
    """Yield held-out measures, and evaluation's two passes over the test store."""
    for mesh in ("1x1", "4x1"):
        lower = partial(_lower_measures, kind, d_sae, mesh)
        yield Program(f"held-out measures, {kind}", d_sae, "float32", mesh, lower)
    lower = partial(_lower_features, kind, d_sae)
    yield Program(f"features of test tokens, {kind}", d_sae, "float32", "1x1", lower)
    lower = partial(_lower_pooling, kind, d_sae)
    yield Program(f"pooling, {kind}", d_sae, "float32", "1x1", lower)


def _step(
    kind: str, setting: str, d_sae: int, precision: str, mesh: str, n_steps: int = 1
) -> Program:
    name = f"step, {kind}" if len(SPARSITY_SETTINGS[kind]) == 1 else f"step, {kind}, {setting}"
    if n_steps > 1:
        name += f", in a call of {n_steps}"
    lower = partial(_lower_step, kind, setting, d_sae, precision, mesh, n_steps)
    return Program(name, d_sae, precision, mesh, lower, n_steps=n_steps)


@lru_cache
def _cards(shape: str) -> Mesh:
    """Return a mesh of described cards, such as "1x4"."""
    n_sweep, n_data = map(int, shape.split("x"))
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x1x{n_sweep * n_data}"
    )
    devices = np.array(topology.devices).reshape(n_sweep, n_data)
    return Mesh(devices, (SWEEP, DATA), axis_types=(AxisType.Auto,) * 2)


def _on(mesh: Mesh, tree: Any) -> Any:
    """Return the shapes of arrays with their shardings on another mesh."""

    def move(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(move, tree)


def _shape(dtype: Any, sharding: NamedSharding, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _lower_step(
    kind: str, setting: str, d_sae: int, precision: str, mesh: str, n_steps: int
) -> jax.stages.Lowered:
    """Lower a call of one or several training steps of 8 members."""
    config = TrainConfig(
        kind=(kind,),
        seed=tuple(range(N_MEMBERS)),
        lr=("auto",),
        feature_dim_factor=(d_sae / D_MODEL,),
        precision=precision,
        mesh=mesh,
        **{setting: (SPARSITY,)},
    )
    plan = config.plan()
    # On simulated CPU devices: its shapes and constants are those on cards.
    sweep = Sweep(plan, make_groups(plan, D_MODEL), D_MODEL)
    cards = _cards(mesh)
    program = replace(sweep.program, mesh=cards)
    n_tiles, tile = tile_batch(cards, BATCH, program.n_features)
    n_rows = n_tiles * tile * cards.shape[DATA]
    shardings = jax.tree.map(lambda s: NamedSharding(cards, s.spec), sweep.shardings)
    step = jax.jit(
        partial(sweep_steps, program),
        donate_argnums=0,
        static_argnames="n_tokens",
        out_shardings=(shardings, replicated(cards)),
    )
    if n_steps == 1:
        x = _shape(jnp.float32, batch_sharding(cards), n_rows, D_MODEL)
    else:
        x = _shape(jnp.float32, batch_sharding(cards, axis=1), n_steps, n_rows, D_MODEL)
    return step.lower(
        _on(cards, sweep.abstract_portable()),
        _on(cards, sweep.hyper),
        x,
        _shape(jnp.float32, replicated(cards)),
        n_tokens=BATCH,
    )


def _lower_extraction(layer: int, precision: str) -> jax.stages.Lowered:
    """Lower a layer of the demo's encoder, for 128 windows."""
    cards = _cards("1x1")
    function = hidden_function(PatchTST, DEMO, (layer % DEMO.n_layers,), precision)
    whole = replicated(cards)
    abstract_params = PatchTSTEncoder.abstract_params(DEMO)
    params = jax.tree.map(lambda a: _shape(a.dtype, whole, *a.shape), abstract_params)
    windows = _shape(jnp.float32, batch_sharding(cards), WINDOWS, DEMO.seq_len, DEMO.n_vars)
    return sharded(cards, function, "float32", precision).lower(params, windows)


def _lower_measures(kind: str, d_sae: int, mesh: str) -> jax.stages.Lowered:
    """Lower the sums over a batch of held-out tokens, for 8 members."""
    cards = _cards(mesh)
    n_features = N_MEMBERS // cards.shape[SWEEP] * d_sae
    n_tiles, tile = tile_batch(cards, SAMPLE_BATCH, n_features)
    n_rows = n_tiles * tile * cards.shape[DATA]
    return batch_program(cards, (KINDS[kind],), n_tiles).lower(
        [_params(kind, d_sae, members_sharding(cards), N_MEMBERS)],
        _shape(jnp.float32, batch_sharding(cards), n_rows, D_MODEL),
        _shape(jnp.float32, replicated(cards)),
        _shape(jnp.int32, replicated(cards)),
    )


def _params(
    kind: str, d_sae: int, sharding: NamedSharding, *members: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the parameters of trained members, as shapes."""
    shapes = KINDS[kind].shapes(D_MODEL, d_sae)
    return {name: _shape(jnp.float32, sharding, *members, *shapes[name]) for name in shapes}


def _lower_features(kind: str, d_sae: int) -> jax.stages.Lowered:
    """Lower moments and strongest tokens of all features, of a batch of the test store."""
    whole = replicated(_cards("1x1"))
    indices = partial(_shape, jnp.int32, whole)
    x = _shape(jnp.float32, whole, SEQUENCES, DEMO.n_tokens, D_MODEL)
    # start and number of sequences, tokens with samples, chosen features
    counts = (indices(2), indices(DEMO.n_patches), indices(4))
    with jax.default_matmul_precision("highest"):
        return token_pass.measure_batch.lower(KINDS[kind], _params(kind, d_sae, whole), x, *counts)


def _lower_merge(d_sae: int) -> jax.stages.Lowered:
    """Lower the choice of the strongest tokens among those so far and those of a batch."""
    whole = replicated(_cards("1x1"))

    def tokens(n: int) -> token_pass.TopTokens:
        indices = _shape(jnp.int32, whole, d_sae, n)
        return token_pass.TopTokens(_shape(jnp.float32, whole, d_sae, n), indices, indices)

    return token_pass.merge_top.lower(tokens(token_pass.TOP), [tokens(SEQUENCES)])


def _lower_pooling(kind: str, d_sae: int) -> jax.stages.Lowered:
    """Lower the sums of features over recordings, for a batch of the test store."""
    whole = replicated(_cards("1x1"))
    x = _shape(jnp.float32, whole, SEQUENCES, DEMO.n_tokens, D_MODEL)
    channel = _shape(jnp.int32, whole, SEQUENCES)
    return pooling.sum_batch.lower(
        KINDS[kind],
        DEMO.n_vars + 1,
        _params(kind, d_sae, whole),
        x,
        channel,
        _shape(jnp.int32, whole),
    )
