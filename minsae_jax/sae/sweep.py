"""The members of a sweep on the devices: initial state, jitted step, metrics and portable state.

Members of one kind and size form a group, whose arrays have a leading member axis; all groups see
the same tokens. The whole state goes into a checkpoint, the sums of the unfinished log interval
too, so that a resumed run has no gap in its metrics.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from minsae_jax.parallel.mesh import (
    DATA,
    SWEEP,
    make_mesh,
    members_sharding,
    replicated,
    tile_batch,
)
from minsae_jax.parallel.shares import put_shares
from minsae_jax.sae.config import TrainPlan
from minsae_jax.sae.grid import Group
from minsae_jax.sae.kinds.base import BatchMetrics, HyperArrays, Objective, Params
from minsae_jax.sae.step import (
    MemberState,
    ScheduleFactors,
    StepProgram,
    SweepState,
    TokenMoments,
    make_optimizer,
    make_schedules,
    sweep_steps,
)

# XLA's option to run everything in CUDA graphs, loops and branches too.
CUDA_GRAPHS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION"
    )
}


@dataclass(frozen=True)
class IntervalMetrics:
    """Means over a log interval, on the host, for every member of a group.

    All are [members], `active` is [members, d_sae]. NaN where a member is frozen.
    """

    loss: Float[np.ndarray, " members"]
    mse: Float[np.ndarray, " members"]
    l1: Float[np.ndarray, " members"]
    l0: Float[np.ndarray, " members"]
    fvu: Float[np.ndarray, " members"]  # Σ‖x - x̂‖² / Σ‖x - mean‖² over the interval's tokens
    dead_fraction: Float[np.ndarray, " members"]  # at the end of the interval
    active: Int[np.ndarray, "members d_sae"]  # tokens with the feature active: a count, not a mean
    tokens: int  # of the interval
    steps: Int[np.ndarray, " members"]  # made since the start; fewer than the sweep's if frozen
    frozen: Bool[np.ndarray, " members"]
    lambda_factor: float  # of the schedules, at the interval's last step
    lr_factor: float


class DeviceMetrics(NamedTuple):
    """Metrics of a finished log interval, still on the devices; without padding members."""

    sums: tuple[BatchMetrics, ...]
    dead_fractions: tuple[Array, ...]
    steps: tuple[Array, ...]
    frozen: tuple[Array, ...]
    moments: TokenMoments
    factors: ScheduleFactors


class Sweep:
    """The program of a sweep on the devices.

    Call `init`, then for each batch `step(state, hyper, put(x), scale, n_tokens=len(x))`, which is
    `sweep_steps` under jit.
    """

    def __init__(self, plan: TrainPlan, groups: tuple[Group, ...], d_model: int):
        self.plan = plan
        self.groups = groups
        self.d_model = d_model
        self.mesh = make_mesh(*map(len, groups), shape=plan.config.mesh)
        n_sweep = self.mesh.shape[SWEEP]
        # Every position along `sweep` gets the same number of members of each group. Copies of the
        # last member are added for this; they are frozen, and no result has them.
        padding = [group[-1:] * (-len(group) % n_sweep) for group in groups]
        self._is_padded = any(padding)
        self._padded_groups = [g + more for g, more in zip(groups, padding, strict=True)]
        sparsity_schedule, lr_schedule = make_schedules(plan.optimizer)
        self.hyper = tuple(self._put_hyper(group) for group in self._padded_groups)
        self.program = StepProgram(
            mesh=self.mesh,
            kinds=tuple(group[0].kind for group in groups),
            objective=Objective(plan.mean_over_d_model, plan.recon_weight),
            precision=plan.config.precision,
            optimizer=make_optimizer(plan.optimizer),
            sparsity_schedule=sparsity_schedule,
            lr_schedule=lr_schedule,
            dead_after=plan.config.dead_after,
            aux_dead_after=plan.aux_dead_after,
            n_features=max(len(g) // n_sweep * g[0].d_sae for g in self._padded_groups),
        )

        # The shardings below are SweepStates with a sharding as every leaf.
        whole: Any = replicated(self.mesh)
        per_member: Any = members_sharding(self.mesh)
        groups_sharding = (per_member,) * len(groups)
        self.shardings = SweepState(groups_sharding, step=whole, tokens_seen=whole, moments=whole)
        # Without padding, the portable state is the state. Otherwise its members do not divide
        # evenly over the devices, so each device has all of them.
        self._portable_shardings = self.shardings
        if self._is_padded:
            self._portable_shardings = self.shardings._replace(groups=(whole,) * len(groups))
        self._init = jax.jit(self._traced_init, out_shardings=self.shardings)
        # The state is donated: its memory is used for the new one.
        self.step = jax.jit(
            partial(sweep_steps, self.program),
            donate_argnums=0,
            # n_tokens determines the tiling, thus the shapes in the program.
            static_argnames="n_tokens",
            out_shardings=(self.shardings, whole),
            compiler_options=compiler_options(self.program),
        )
        self.take_metrics = jax.jit(
            self._traced_take_metrics, donate_argnums=0, out_shardings=(self.shardings, whole)
        )
        self._dead_fractions = jax.jit(self._traced_dead_fractions, out_shardings=whole)
        # The index is an argument, so that all members of a group share a compilation.
        self._get_member = jax.jit(
            lambda params, i: jax.tree.map(itemgetter(i), params), out_shardings=whole
        )
        self._unpad = jax.jit(self._traced_unpad, out_shardings=self._portable_shardings)
        self._pad = jax.jit(self._traced_pad, out_shardings=self.shardings)

    def init(
        self, start: Params | None = None, median: Float[np.ndarray, " d_model"] | None = None
    ) -> SweepState:
        """Return the state before the first step, from each member's seed or from `start`.

        median: geometric median of the scaled tokens, for kinds that start there.
        """
        return self._init(start, median, self.hyper)

    def put(
        self, x: Float[np.ndarray, "*steps tokens d_model"]
    ) -> Float[Array, "*steps rows d_model"]:
        """Put a batch, or several, on the devices, padded if it does not divide evenly.

        In a cluster, x is this process's share, with zeros for the other tokens.
        """
        return put_shares(self.mesh, x, self.rows_per_device(x.shape[-2]))

    def rows_per_device(self, n_tokens: int) -> int:
        """Return how many rows of a batch each device along `data` has, padding included."""
        n_tiles, tile = tile_batch(self.mesh, n_tokens, self.program.n_features)
        return n_tiles * tile

    def dead_fractions(self, state: SweepState) -> list[Float[np.ndarray, " members"]]:
        """Return for each group the share of each member's features that are dead.

        A feature is dead if it has not been active for dead_after tokens, or since the start. NaN
        where a member is frozen.
        """
        return list(jax.device_get(self._dead_fractions(state.groups, state.tokens_seen)))

    def weights(self, state: SweepState) -> Iterator[Params]:
        """Yield every member's parameters on the host, one member at a time."""
        for group, group_state in zip(self.groups, state.groups, strict=True):
            for i in range(len(group)):
                yield jax.device_get(self._get_member(group_state.params, i))

    def portable(self, state: SweepState) -> SweepState:
        """Return the state without padding members, the same on any mesh, for a checkpoint."""
        return self._unpad(state) if self._is_padded else state

    def from_portable(self, state: SweepState) -> SweepState:
        """Undo `portable` on this mesh."""
        return self._pad(state) if self._is_padded else state

    def abstract_portable(self) -> SweepState:
        """Return shapes, dtypes and shardings of the portable state; nothing is allocated."""

        def init() -> SweepState:
            return self._traced_unpad(self._traced_init(None, None, self.hyper))

        return jax.eval_shape(jax.jit(init, out_shardings=self._portable_shardings))

    def _put_hyper(self, group: Group) -> HyperArrays:
        """Put the sparsity setting and lr of a group's members on the devices."""
        values = {
            group[0].kind.sparsity_name: np.array([m.sparsity for m in group], np.float32),
            "lr": np.array([m.lr for m in group], np.float32),
        }
        return jax.device_put(values, members_sharding(self.mesh))

    # The functions below are traced by jit.

    def _traced_init(
        self, start: Params | None, median: Array | None, hyper: tuple[HyperArrays, ...]
    ) -> SweepState:
        groups = []
        for group, padded, group_hyper in zip(self.groups, self._padded_groups, hyper, strict=True):
            size = len(padded)
            d_sae = group[0].d_sae
            if start is None:
                seeds = jnp.array([m.seed for m in padded], jnp.uint32)
                init_member = partial(self._init_member, group, median)
                params = jax.vmap(init_member)(seeds, group_hyper)
            else:
                params = {k: jnp.broadcast_to(v, (size, *v.shape)) for k, v in start.items()}
                params = jax.vmap(group[0].kind.with_hyper)(params, group_hyper)
            state = MemberState(
                params=params,
                opt_state=jax.vmap(self.program.optimizer.init)(params),
                tokens_since_fired=jnp.zeros((size, d_sae), jnp.int32),
                steps=jnp.zeros(size, jnp.int32),
                frozen=jnp.arange(size) >= len(group),
                metrics=BatchMetrics(
                    loss=jnp.zeros(size),
                    mse=jnp.zeros(size),
                    l1=jnp.zeros(size),
                    l0=jnp.zeros(size),
                    residual=jnp.zeros(size),
                    active=jnp.zeros((size, d_sae), jnp.int32),
                ),
            )
            groups.append(state)
        moments = TokenMoments(
            steps=jnp.int32(0),
            tokens=jnp.zeros(()),
            mean=jnp.zeros(self.d_model),
            m2=jnp.zeros(()),
        )
        return SweepState(
            groups=tuple(groups), step=jnp.int32(0), tokens_seen=jnp.int32(0), moments=moments
        )

    def _init_member(
        self, group: Group, median: Array | None, seed: Array, hyper: HyperArrays
    ) -> Params:
        key = jax.random.key(seed)
        kind = group[0].kind
        if self.plan.tied_init:
            params = kind.init_tied(key, self.d_model, group[0].d_sae, self.plan.decoder_norm)
        else:
            params = kind.init_torch(key, self.d_model, group[0].d_sae)
        params = kind.complete_init(params, median if kind.starts_at_median else None)
        return kind.with_hyper(params, hyper)

    def _traced_take_metrics(self, state: SweepState) -> tuple[SweepState, DeviceMetrics]:
        """End a log interval: return the state with empty sums, and the metrics."""
        members = self._traced_unpad(state).groups
        dead = self._traced_dead_fractions(state.groups, state.tokens_seen)
        metrics = DeviceMetrics(
            sums=tuple(m.metrics for m in members),
            dead_fractions=dead,
            steps=tuple(m.steps for m in members),
            frozen=tuple(m.frozen for m in members),
            moments=state.moments,
            # Steps count from 0. Computed here, since an operation outside of jit would wait for
            # all calls that are queued on the devices.
            factors=self.program.schedule_factors(state.step - 1),
        )
        zeros_like = optax.tree.zeros_like
        groups = [group._replace(metrics=zeros_like(group.metrics)) for group in state.groups]
        return state._replace(groups=tuple(groups), moments=zeros_like(state.moments)), metrics

    def _traced_dead_fractions(
        self, groups: tuple[MemberState, ...], tokens_seen: Array
    ) -> tuple[Array, ...]:
        fractions = []
        for state, group in zip(groups, self.groups, strict=True):
            # Both counts stop at dead_after: not active for that long, or since the start.
            dead = (state.tokens_since_fired >= tokens_seen).mean(1)
            fractions.append(jnp.where(state.frozen, jnp.nan, dead)[: len(group)])
        return tuple(fractions)

    def _traced_unpad(self, state: SweepState) -> SweepState:
        groups = []
        for group_state, group in zip(state.groups, self.groups, strict=True):
            groups.append(jax.tree.map(itemgetter(slice(len(group))), group_state))
        return state._replace(groups=tuple(groups))

    def _traced_pad(self, state: SweepState) -> SweepState:
        groups = []
        for group_state, group, padded in zip(
            state.groups, self.groups, self._padded_groups, strict=True
        ):
            rows = jnp.arange(len(padded))
            # The last member repeats.
            state_of_rows = itemgetter(jnp.minimum(rows, len(group) - 1))
            padded_state = jax.tree.map(state_of_rows, group_state)
            frozen = padded_state.frozen | (rows >= len(group))
            groups.append(padded_state._replace(frozen=frozen))
        return state._replace(groups=tuple(groups))


def compiler_options(program: StepProgram) -> dict[str, str] | None:
    """Return XLA's options for a step.

    At a loop whose end depends on the data the host waits for the GPU, for a quarter of a BatchTopK
    step on an H200; in a CUDA graph the GPU itself decides. Other kinds do not gain by this.
    Programs with sums over devices have no graphs, and XLA_FLAGS has priority.
    """
    has_data_dependent_loop = any(kind.has_data_dependent_loop for kind in program.kinds)
    is_on_gpu = jax.default_backend() == "gpu"
    is_set = any(option in os.environ.get("XLA_FLAGS", "") for option in CUDA_GRAPHS)
    if is_on_gpu and has_data_dependent_loop and program.mesh.shape[DATA] == 1 and not is_set:
        return CUDA_GRAPHS
    return None


def read_metrics(metrics: DeviceMetrics) -> list[IntervalMetrics] | None:
    """Fetch the metrics of a log interval, one for each group; None if tokens were not finite."""
    host: Any = jax.device_get(metrics)
    n_steps = int(host.moments.steps)
    n_tokens = int(host.moments.tokens)
    variance = host.moments.m2
    if not np.isfinite(variance):
        return None
    groups = []
    for sums, dead_fraction, steps, frozen in zip(
        host.sums, host.dead_fractions, host.steps, host.frozen, strict=True
    ):
        means = {name: getattr(sums, name) / n_steps for name in ("loss", "mse", "l1", "l0")}
        # Both are sums over the interval's tokens. Equal tokens have no variance.
        means["fvu"] = sums.residual / (variance or np.nan)
        means["dead_fraction"] = dead_fraction
        means = {name: np.where(frozen, np.float32(np.nan), mean) for name, mean in means.items()}
        interval = IntervalMetrics(
            **means,
            active=sums.active,
            tokens=n_tokens,
            steps=steps,
            frozen=frozen,
            lambda_factor=float(host.factors.sparsity),
            lr_factor=float(host.factors.lr),
        )
        groups.append(interval)
    return groups
