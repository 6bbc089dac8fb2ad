"""One training step, from loss to update, of all members of a sweep.

Read `member_step` first: it is the whole step. `sweep_step` runs it for every group of members on
all devices. The loss and its gradient are in `kinds/`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from minsae_jax.parallel.mesh import (
    DATA,
    SWEEP,
    after,
    map_first_axis,
    on_cpu,
    sum_devices,
    tile_batch,
)
from minsae_jax.sae.config import OptimizerPlan
from minsae_jax.sae.kinds.base import (
    Batch,
    BatchContext,
    BatchMetrics,
    HyperArrays,
    Objective,
    Params,
    SAEKind,
)
from minsae_jax.sae.precision import matmul_precision, with_bfloat16


class MemberState(NamedTuple):
    """State of one member; in a sweep every array has a leading member axis."""

    params: Params
    opt_state: Any
    tokens_since_fired: Int[Array, "*members d_sae"]  # at most dead_after
    steps: Int[Array, "*members"]  # steps made; fewer than the sweep's if frozen
    frozen: Bool[Array, "*members"]
    metrics: BatchMetrics  # sums over the steps of the unfinished log interval


class TokenMoments(NamedTuple):
    """Moments of the tokens of the unfinished log interval, for the variance in FVU."""

    steps: Int[Array, ""]
    tokens: Float[Array, ""]
    mean: Float[Array, " d_model"]
    m2: Float[Array, ""]  # Σ‖x - mean‖²


class SweepState(NamedTuple):
    """State of a sweep."""

    groups: tuple[MemberState, ...]
    step: Int[Array, ""]
    tokens_seen: Int[Array, ""]  # at most dead_after
    moments: TokenMoments


class ScheduleFactors(NamedTuple):
    """Values of the schedules at a step."""

    sparsity: Float[Array, ""]  # factor of λ
    lr: Float[Array, ""]  # factor of the learning rate


@dataclass(frozen=True)
class StepProgram:
    """The values of a step that are constants of its program."""

    mesh: Mesh
    kinds: tuple[SAEKind, ...]  # one for each group
    objective: Objective
    precision: str  # of matrix products: float32, tf32 or bfloat16
    optimizer: optax.GradientTransformation
    sparsity_schedule: optax.Schedule  # factor of λ at a step
    lr_schedule: optax.Schedule  # factor of the learning rate at a step
    dead_after: int  # tokens
    aux_dead_after: int  # tokens without activity after which AuxK trains a feature
    n_features: int  # of one token in the largest group, over its members on a device

    def schedule_factors(self, step: Int[Array, ""]) -> ScheduleFactors:
        """Return the values of the schedules at a step, counted from 0."""
        number = step.astype(jnp.float32)
        return ScheduleFactors(
            sparsity=jnp.asarray(self.sparsity_schedule(number), jnp.float32),
            lr=jnp.asarray(self.lr_schedule(number), jnp.float32),
        )


def member_step(
    program: StepProgram,
    kind: SAEKind,
    objective: Objective,
    factors: ScheduleFactors,
    n_tokens: int,
    batch: Batch,
    members: MemberState,
    hyper: HyperArrays,
) -> MemberState:
    """Make one step of the members of a group: loss, gradient, Adam update, feature counts.

    batch: this device's tokens; n_tokens: tokens of the batch on all devices. If a member's loss or
    the norm of its gradient is not finite, it stays as it was and is frozen for good.
    """
    if "lambda_sparsity" in hyper:
        hyper = hyper | {"lambda_sparsity": hyper["lambda_sparsity"] * factors.sparsity}
    is_dead = members.tokens_since_fired >= program.aux_dead_after
    # Frozen members train no features, among them copies that fill up a mesh.
    is_dead &= ~members.frozen[:, None]
    most_dead = is_dead.sum(1).max()

    def member_sums(
        params: Params, hyper: HyperArrays, is_dead: Bool[Array, " d_sae"]
    ) -> tuple[Any, BatchContext]:
        # On accelerators members are computed at once, so that only a number which all of them
        # share can skip work.
        member_context = BatchContext(is_dead, is_dead.sum() if on_cpu() else most_dead)
        context = kind.batch_context(params, batch, hyper, objective, member_context)
        sums = kind.batch_sums(params, batch, hyper, objective, context)
        # Pre-activations are large, and the update does not need them.
        return sums, context._replace(pre=None)

    def update(
        state: MemberState, hyper: HyperArrays, sums: Any, context: BatchContext
    ) -> MemberState:
        """Return one member after its step, from sums over the tokens of all devices."""
        gradients, metrics = kind.gradients(state.params, sums, n_tokens, hyper, objective)

        # optax raises β, a float, to the power of an integer count.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = program.optimizer.update(gradients, state.opt_state)
        lr = hyper["lr"] * factors.lr
        params = jax.tree.map(lambda p, step: p - lr * step, state.params, updates)
        params = kind.finish_update(params, context)

        # A count stops at dead_after, so that it never overflows.
        silent_for = jnp.minimum(
            state.tokens_since_fired + min(n_tokens, program.dead_after), program.dead_after
        )
        moved = MemberState(
            params=params,
            opt_state=opt_state,
            tokens_since_fired=jnp.where(metrics.active > 0, 0, silent_for),
            steps=state.steps + 1,
            frozen=state.frozen,
            metrics=jax.tree.map(jnp.add, state.metrics, metrics),
        )
        is_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(optax.tree.norm(gradients))
        moves = is_finite & ~state.frozen
        # A member that does not move keeps its state and is frozen from now on.
        return jax.tree.map(partial(jnp.where, moves), moved, state._replace(frozen=~moves))

    # On CPU one member after the other; the update is faster for all at once.
    sums, contexts = map_first_axis(member_sums, members.params, hyper, is_dead)
    return jax.vmap(update)(members, hyper, sum_devices(sums), contexts)


def sweep_steps(
    program: StepProgram,
    state: SweepState,
    hyper: tuple[HyperArrays, ...],
    x: Float[Array, "*steps rows d_model"],
    scale: Float[Array, ""],
    *,
    n_tokens: int,
) -> tuple[SweepState, Array]:
    """Make one step of all members on a batch, or a step on each of several batches.

    Members are trained on scale * x, of which the first n_tokens rows of a batch are tokens. Wait
    for the second result to wait for the steps.
    """

    def step(state: SweepState, x: Array) -> tuple[SweepState, None]:
        return sweep_step(program, hyper, scale, n_tokens, state, x), None

    state, _ = step(state, x) if x.ndim == 2 else jax.lax.scan(step, state, x)
    # Outside the loop, where these small sums would be several launches of every step.
    batches = (x.astype(jnp.float32) * scale).reshape(-1, *x.shape[-2:])
    sums_done = state.groups[-1].metrics.active
    mean, m2 = _token_moments(program.mesh, batches, n_tokens, sums_done)
    new_tokens = len(batches) * n_tokens
    tokens_seen = state.tokens_seen + min(new_tokens, program.dead_after)
    state = state._replace(
        tokens_seen=jnp.minimum(tokens_seen, program.dead_after),
        moments=_merge_moments(state.moments, mean, m2, len(batches), new_tokens),
    )
    return state, state.groups[0].metrics.loss[0]


def sweep_step(
    program: StepProgram,
    hyper: tuple[HyperArrays, ...],
    scale: Float[Array, ""],
    n_tokens: int,
    state: SweepState,
    x: Float[Array, "rows d_model"],
) -> SweepState:
    """Make one step of all members, see `sweep_steps`, which counts the tokens."""
    tiling = tile_batch(program.mesh, n_tokens, program.n_features)
    objectives = [program.objective] * len(program.kinds)
    if program.precision == "bfloat16":
        # This runs small programs while the step is traced, to see what XLA supports.
        d_saes = [group.tokens_since_fired.shape[1] for group in state.groups]
        objectives = [
            with_bfloat16(program.objective, x.shape[1], d_sae, tiling) for d_sae in d_saes
        ]
    factors = program.schedule_factors(state.step)

    def on_one_device(
        groups: tuple[MemberState, ...],
        hyper: tuple[HyperArrays, ...],
        x: Array,
        factors: ScheduleFactors,
    ) -> tuple[MemberState, ...]:
        # Known when the step is traced, so that batches without padding need no mask.
        is_padded = n_tokens < len(x) * program.mesh.shape[DATA]
        is_token = _is_token(x, n_tokens).reshape(tiling) if is_padded else None
        batch = Batch(_row_major(x).reshape(*tiling, -1), is_token)
        new_groups = []
        for kind, objective, members, members_hyper in zip(
            program.kinds, objectives, groups, hyper, strict=True
        ):
            new_members = member_step(
                program, kind, objective, factors, n_tokens, batch, members, members_hyper
            )
            new_groups.append(new_members)
            batch = after(batch, new_members.metrics.active)
        return tuple(new_groups)

    x = x.astype(jnp.float32) * scale
    run = jax.shard_map(
        on_one_device,
        mesh=program.mesh,
        in_specs=(P(SWEEP), P(SWEEP), P(DATA), P()),
        out_specs=P(SWEEP),
        check_vma=False,  # JAX cannot see that a scan's result is replicated after the psum
    )
    with jax.default_matmul_precision(matmul_precision(program.precision)):
        groups = run(state.groups, hyper, x, factors)
    return state._replace(groups=groups, step=state.step + 1)


def make_optimizer(plan: OptimizerPlan) -> optax.GradientTransformation:
    """Return Adam without its learning rate, after clipping each member's gradient."""
    adam = optax.scale_by_adam(plan.beta1, plan.beta2, plan.eps)
    if plan.max_grad_norm is None:
        return optax.chain(adam)
    return optax.chain(optax.clip_by_global_norm(plan.max_grad_norm), adam)


def make_schedules(plan: OptimizerPlan) -> tuple[optax.Schedule, optax.Schedule]:
    """Return the factors of λ and lr as functions of the step, counted from 0.

    λ rises linearly from 0 during the warm-up; lr falls linearly to 0 at the end.
    """
    sparsity_schedule = optax.constant_schedule(1.0)
    if plan.lambda_warmup_steps:
        sparsity_schedule = partial(_linear_warmup, plan.lambda_warmup_steps)
    lr_schedule = optax.constant_schedule(1.0)
    if plan.lr_decay_steps:
        lr_schedule = partial(_linear_decay, plan.num_steps, plan.lr_decay_steps)
    return sparsity_schedule, lr_schedule


# Not optax.linear_schedule: it computes 1 - (1 - step / n_steps), which loses digits near 0.
def _linear_warmup(n_steps: float, step: Float[ArrayLike, ""]) -> Float[Array, ""]:
    return jnp.minimum(jnp.asarray(step, jnp.float32) / n_steps, 1)


def _linear_decay(end: int, n_steps: float, step: Float[ArrayLike, ""]) -> Float[Array, ""]:
    return jnp.minimum((end - jnp.asarray(step, jnp.float32)) / n_steps, 1)


def _is_token(x: Float[Array, "rows d_model"], n_tokens: int) -> Float[Array, " rows"]:
    """Return 1 for the tokens in this device's share of a batch, 0 for padding."""
    first_row = jax.lax.axis_index(DATA) * len(x)
    return (first_row + jnp.arange(len(x)) < n_tokens).astype(x.dtype)


def _row_major(x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
    """Return x, which an accelerator reads row by row.

    Otherwise XLA for GPU transposes all batches before the loop over steps, since a step subtracts
    x, transposed, from x̂.
    """
    return x if on_cpu() else with_layout_constraint(x, Layout((0, 1)))


def _token_moments(
    mesh: Mesh, x: Float[Array, "steps rows d_model"], n_tokens: int, sums_done: Array
) -> tuple[Float[Array, " d_model"], Float[Array, ""]]:
    """Return the mean token and Σ‖x - mean‖² of all batches and devices; padding is 0.

    n_tokens: of a batch; sums_done: see `after`.
    """

    def on_one_device(x: Array, sums_done: Array) -> tuple[Array, Array]:
        x = after(x, sums_done)
        mean = sum_devices(x.sum((0, 1))) / (len(x) * n_tokens)
        squares = jnp.square(x - mean[None, None]).sum(2)
        m2 = (squares * _is_token(x[0], n_tokens)[None]).sum()
        return mean, sum_devices(m2)

    run = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(P(None, DATA), P(SWEEP)),
        out_specs=P(),
        check_vma=False,  # JAX cannot see that `sums_done`, which differs, changes no result
    )
    return run(x, sums_done)


def _merge_moments(
    before: TokenMoments,
    mean: Float[Array, " d_model"],
    m2: Float[Array, ""],
    n_steps: int,
    n_tokens: int,
) -> TokenMoments:
    """Add the moments of the n_tokens tokens of n_steps batches (Chan, Golub & LeVeque 1983).

    The squared distance between the two means accounts for the variance between them.
    """
    total = before.tokens + n_tokens
    shift = mean - before.mean
    between = jnp.square(shift).sum() * before.tokens * n_tokens / total
    return TokenMoments(
        steps=before.steps + n_steps,
        tokens=total,
        mean=before.mean + shift * (n_tokens / total),
        m2=before.m2 + m2 + between,
    )
