"""Members of a sweep side by side: their state, and one jitted step that moves them all.

Members of one d_sae form a group, whose arrays have a leading member axis; all groups see the same tokens. The state
is a plain tree and all of it goes into a checkpoint, the running sums of the unfinished window too, so that an
interruption leaves no gap.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import (
    DATA,
    SWEEP,
    make_mesh,
    map_members,
    members_sharding,
    put_batch,
    replicated,
    shard_over_members_and_batch,
    tile_batch,
)
from minsae_jax.sae import member as model
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.objective import Objective, Statistics, Sums, batch_sums, finish, with_bfloat16

State = dict[str, Any]
LARGEST_D_SAE = 2**24


@dataclass(frozen=True)
class Member:
    name: str
    lambda_sparsity: float
    lr: float
    seed: int
    d_sae: int


Group = tuple[Member, ...]


def make_groups(settings: TrainConfig, d_model: int) -> tuple[Group, ...]:
    """The members of a sweep by size: in each group all combinations of λ, lr and seed."""
    sizes = [int(factor * d_model) for factor in settings.feature_dim_factor]
    if len(set(sizes)) < len(sizes) or not 1 <= min(sizes) <= max(sizes) <= LARGEST_D_SAE:
        raise UserError(
            f"--feature_dim_factor makes d_sae {', '.join(map(str, sizes))} at d_model {d_model}: "
            f"each must be from 1 to {LARGEST_D_SAE:,}, and no two the same"
        )
    varied = [
        name
        for name, values in (
            ("lr", settings.lr),
            ("seed", settings.seed),
            ("d_sae", settings.feature_dim_factor),
        )
        if len(values) > 1
    ]
    combinations = list(product(settings.lambda_sparsity, settings.lr, settings.seed))
    groups = ([Member("", *combination, d_sae) for combination in combinations] for d_sae in sizes)
    return tuple(
        tuple(dataclasses.replace(m, name=_name(m, varied)) for m in group) for group in groups
    )


def _name(member: Member, varied: list[str]) -> str:
    """`lambda=5`, with `,lr=…,seed=…,d_sae=…` where the sweep varies them."""
    values = {"lambda": member.lambda_sparsity} | {name: getattr(member, name) for name in varied}
    return ",".join(f"{k}={_short(v)}" for k, v in values.items())


def _short(value: int | float) -> str:
    """A short text that is exactly this number: 5, 0.01, 5e-05, 1024."""
    return (
        str(value)
        if isinstance(value, int)
        else next(t for d in range(6, 18) if float(t := f"{value:.{d}g}") == value)
    )


@dataclass(frozen=True)
class Window:
    """Means over a window of steps, on the host, of every member of a group: [members], active [members, d_sae]. NaN
    where a member is frozen."""

    loss: Float[np.ndarray, " members"]
    mse: Float[np.ndarray, " members"]
    l1: Float[np.ndarray, " members"]
    l0: Float[np.ndarray, " members"]
    fvu: Float[
        np.ndarray, " members"
    ]  # Σ‖x - x̂‖² / Σ‖x - mean of x‖², both over the window's tokens
    dead_fraction: Float[np.ndarray, " members"]  # at the window's end
    active: Int[
        np.ndarray, "members d_sae"
    ]  # tokens on which each feature was active: a count, not a mean
    steps: Int[
        np.ndarray, " members"
    ]  # that each member has made since it began; fewer than the sweep's if frozen
    frozen: Bool[np.ndarray, " members"]


class Sweep:
    """The program of a sweep on all devices: `init`, `put`, `step`, `take_window`."""

    def __init__(self, settings: TrainConfig, groups: tuple[Group, ...], d_model: int):
        self.settings, self.groups, self.d_model = settings, groups, d_model
        self.mesh = make_mesh(*map(len, groups), shape=settings.mesh)
        sweep = self.mesh.shape[SWEEP]
        self.sizes = [
            -(-len(g) // sweep) * sweep for g in groups
        ]  # with members that are frozen from the start
        self.objective = Objective(settings.recipe == "minsae", settings.recon_weight or 1.0)
        clip = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
        self.adam = optax.chain(
            *clip, optax.scale_by_adam(settings.beta1, settings.beta2, settings.adam_eps)
        )
        per_member, whole = members_sharding(self.mesh), replicated(self.mesh)
        self.shardings = {"groups": per_member, "step": whole, "seen": whole, "moments": whole}
        self.hyper = self._put_hyper()
        out = (self.shardings, whole)
        self.step = jax.jit(
            self._step, donate_argnums=0, static_argnames="tokens", out_shardings=out
        )
        self.take_window = jax.jit(self._take_window, donate_argnums=0, out_shardings=out)
        self._dead = jax.jit(self._dead_fractions, out_shardings=whole)
        self._one_member = jax.jit(
            lambda params, i: jax.tree.map(lambda a: a[i], params), out_shardings=whole
        )
        self._without_padding = jax.jit(self._cut, out_shardings=self._portable_shardings())

    def _put_hyper(self) -> list[dict[str, Array]]:
        def values(group: Group, name: str, size: int) -> np.ndarray:
            own = [getattr(member, name) for member in group]
            return np.array(own + own[-1:] * (size - len(own)), np.float32)

        names, groups = ("lambda_sparsity", "lr"), zip(self.groups, self.sizes, strict=True)
        hyper = [{name: values(group, name, size) for name in names} for group, size in groups]
        return jax.device_put(hyper, members_sharding(self.mesh))

    def init(self, start: model.Params | None = None) -> State:
        """The state before the first step: weights by the recipe's law from each member's seed, or from `start`."""
        return jax.jit(self._init, out_shardings=self.shardings)(start)

    def portable(self, state: State) -> State:
        """The state of the members alone, the same on any mesh: what goes into a checkpoint."""
        return self._without_padding(state) if self._is_padded else state

    def abstract_portable(self) -> State:
        """Its shapes, dtypes and shardings; nothing is allocated."""
        shapes = jax.eval_shape(lambda: self._cut(self._init(None)))
        shardings = {
            name: jax.tree.map(lambda _, s=s: s, shapes[name])
            for name, s in self._portable_shardings().items()
        }
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )

    def from_portable(self, state: State) -> State:
        """`portable` undone."""
        return jax.jit(self._pad, out_shardings=self.shardings)(state) if self._is_padded else state

    @property
    def _is_padded(self) -> bool:
        return self.sizes != [len(group) for group in self.groups]

    def _portable_shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        return self.shardings | ({"groups": replicated(self.mesh)} if self._is_padded else {})

    def _cut(self, state: State) -> State:
        def first(arrays: State, count: int) -> State:
            return jax.tree.map(lambda a: a[:count], arrays)

        groups = zip(state["groups"], self.groups, strict=True)
        return state | {"groups": [first(arrays, len(group)) for arrays, group in groups]}

    def _pad(self, state: State) -> State:
        groups = []
        for arrays, group, size in zip(state["groups"], self.groups, self.sizes, strict=True):
            padded = jax.tree.map(partial(_with_rows, size - len(group)), arrays)
            groups.append(padded | {"frozen": padded["frozen"].at[len(group) :].set(True)})
        return state | {"groups": groups}

    def _init(self, start: model.Params | None) -> State:
        groups = []
        for group, size in zip(self.groups, self.sizes, strict=True):
            if start is None:
                seeds = jnp.array([m.seed for m in group] + [0] * (size - len(group)), jnp.uint32)
                params = jax.vmap(partial(self._init_member, d_sae=group[0].d_sae))(seeds)
            else:
                params = {k: jnp.broadcast_to(v, (size, *v.shape)) for k, v in start.items()}
            silent = jnp.zeros(
                params["b_enc"].shape, jnp.int32
            )  # tokens since a feature was active, up to dead_after
            steps, frozen = jnp.zeros(size, jnp.int32), jnp.arange(size) >= len(group)
            opt = jax.vmap(self.adam.init)(params)
            groups.append(
                {"params": params, "opt": opt, "silent": silent, "steps": steps, "frozen": frozen}
            )
        state = {
            "groups": groups,
            "step": jnp.int32(0),
            "seen": jnp.int32(0),
        }  # seen: tokens, up to dead_after
        return self._with_empty_window(state)

    def _init_member(self, seed: Array, d_sae: int) -> model.Params:
        if self.settings.recipe == "minsae":
            return model.init_torch(jax.random.key(seed), self.d_model, d_sae)
        return model.init_tied(
            jax.random.key(seed), self.d_model, d_sae, _given(self.settings.decoder_norm)
        )

    def _with_empty_window(self, state: State) -> State:
        groups = []
        for group, size in zip(state["groups"], self.sizes, strict=True):
            zero = jnp.zeros(size)
            sums = Statistics(
                zero, zero, zero, zero, zero, jnp.zeros(group["silent"].shape, jnp.int32)
            )
            groups.append(group | {"window": sums})
        moments = {
            "steps": jnp.int32(0),
            "tokens": jnp.zeros(()),
            "mean": jnp.zeros(self.d_model),
            "m2": jnp.zeros(()),
        }
        return state | {"groups": groups, "moments": moments}

    def dead_fractions(self, state: State) -> list[Float[np.ndarray, " members"]]:
        """Of every group's members: share of features that were silent over the last dead_after tokens, or since the
        start; NaN where a member is frozen."""
        return jax.device_get(self._dead(state["groups"], state["seen"]))

    def weights(self, state: State) -> Iterator[model.Params]:
        """Every member's parameters on the host, one member after the other."""
        for group, arrays in zip(self.groups, state["groups"], strict=True):
            for i in range(len(group)):
                yield jax.device_get(self._one_member(arrays["params"], i))

    def _take_window(self, state: State) -> tuple[State, State]:
        """The state with an empty window, and what `read_window` wants of the ended one (still on the devices)."""
        groups = self._cut(state)["groups"]
        dead = self._dead_fractions(state["groups"], state["seen"])
        ended = {
            "groups": [
                (g["window"], d, g["steps"], g["frozen"]) for g, d in zip(groups, dead, strict=True)
            ],
            "moments": state["moments"],
        }
        return self._with_empty_window(state), ended

    def _dead_fractions(self, groups: list[State], seen: Array) -> list[Array]:
        limit = jnp.minimum(seen, self.settings.dead_after)
        found = [jnp.where(g["frozen"], jnp.nan, (g["silent"] >= limit).mean(1)) for g in groups]
        return [dead[: len(members)] for dead, members in zip(found, self.groups, strict=True)]

    def _pieces(self, tokens: int) -> tuple[int, int]:
        """Into how many pieces of how many tokens each device of `data` cuts its share."""
        groups, sweep = zip(self.groups, self.sizes, strict=True), self.mesh.shape[SWEEP]
        features = max(size // sweep * group[0].d_sae for group, size in groups)
        return tile_batch(self.mesh, tokens, features)

    def put(self, x: Float[np.ndarray, "tokens d_model"]) -> Float[Array, "rows d_model"]:
        """A batch on the devices, padded where it does not divide evenly."""
        pieces, piece = self._pieces(len(x))
        return put_batch(self.mesh, x, pieces * piece)

    def schedules(self, step: Array | int) -> tuple[Array, Array]:
        """Factors of λ and lr at a step, counted from 0: λ rises from 0 linearly, lr falls to 0 linearly at the end."""
        s, step = self.settings, jnp.asarray(step, jnp.float32)
        num_steps = _given(s.num_steps)
        warmup, decay = num_steps * (s.lambda_warmup or 0), num_steps * (s.lr_decay or 0)
        lambda_factor = jnp.minimum(step / warmup, 1) if warmup else jnp.ones(())
        return lambda_factor, jnp.minimum((num_steps - step) / decay, 1) if decay else jnp.ones(())

    def _step(
        self,
        state: State,
        hyper: Any,
        x: Float[Array, "rows d_model"],
        scale: Float[Array, ""],
        *,
        tokens: int,
    ) -> tuple[State, Array]:
        """One step of all members on scale * x, of which the first `tokens` rows count. Returns a loss to wait on."""
        lambda_factor, lr_factor = self.schedules(state["step"])
        lambdas = [h["lambda_sparsity"] * lambda_factor for h in hyper]
        x = x.astype(jnp.float32) * scale
        members = [
            (g["params"], lambda_now)
            for g, lambda_now in zip(state["groups"], lambdas, strict=True)
        ]
        sums, moments = self._sums(members, x, tokens)
        news = min(tokens, self.settings.dead_after)
        groups = []
        for group, lambda_now, lr, sums_here in zip(
            state["groups"], lambdas, hyper, sums, strict=True
        ):
            move = partial(self._move, tokens, news)
            groups.append(jax.vmap(move)(group, lambda_now, lr["lr"] * lr_factor, sums_here))
        new_state = {
            "groups": groups,
            "step": state["step"] + 1,
            "seen": jnp.minimum(state["seen"] + news, self.settings.dead_after),
            "moments": _merge_moments(state["moments"], *moments, tokens),
        }
        return new_state, groups[0]["window"].loss[0]

    def _move(
        self, tokens: int, news: int, member: State, lambda_now: Array, lr: Array, sums: Sums
    ) -> State:
        """One member after a step of Adam; as it was, and frozen for good, where loss or gradient are not finite."""
        gradients, statistics = finish(member["params"], sums, tokens, lambda_now, self.objective)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax raises β, a float, to the power of an integer count
            updates, opt = self.adam.update(gradients, member["opt"])
        silent = jnp.minimum(member["silent"] + news, self.settings.dead_after)
        moved = {
            "params": jax.tree.map(lambda p, u: p - lr * u, member["params"], updates),
            "opt": opt,
            "silent": jnp.where(statistics.active > 0, 0, silent),
            "window": jax.tree.map(jnp.add, member["window"], statistics),
            "steps": member["steps"] + 1,
            "frozen": member["frozen"],
        }
        largest = jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(gradients)]).max()
        is_well = ~member["frozen"] & jnp.isfinite(statistics.loss) & jnp.isfinite(largest)
        return jax.tree.map(partial(jnp.where, is_well), moved, member | {"frozen": ~is_well})

    def _sums(
        self, members: list[tuple[model.Params, Array]], x: Array, tokens: int
    ) -> tuple[list[Sums], tuple[Array, Array]]:
        """Sums of every group over all tokens, and x's mean and Σ‖x - mean‖²."""
        pieces, piece = self._pieces(tokens)
        padded = tokens < len(x)
        objectives = [
            self._objective(params["b_enc"].shape[1], pieces, piece) for params, _ in members
        ]

        def on_one_device(members: list[tuple[model.Params, Array]], x: Array):
            first = jax.lax.axis_index(DATA) * len(x)
            is_token = (first + jnp.arange(len(x)) < tokens).astype(x.dtype)
            cut = x.reshape(pieces, piece, -1)
            mask = is_token.reshape(pieces, piece) if padded else None
            sums = [
                map_members(lambda p, lam, o=objective: batch_sums(p, cut, mask, lam, o), *group)
                for group, objective in zip(members, objectives, strict=True)
            ]
            mean = jax.lax.psum(x.sum(0), DATA) / tokens  # padding is 0
            m2 = (jnp.square(x - mean[None]).sum(1) * is_token).sum()
            sums, m2 = jax.lax.psum((sums, m2), DATA)
            return sums, (mean, m2)

        with jax.default_matmul_precision("highest"):
            return shard_over_members_and_batch(self.mesh, on_one_device)(members, x)

    def _objective(self, d_sae: int, pieces: int, piece: int) -> Objective:
        if self.settings.precision == "float32":
            return self.objective
        return with_bfloat16(self.objective, self.d_model, d_sae, pieces, piece)


def _with_rows(count: int, a: Array) -> Array:
    return jnp.concatenate([a, jnp.zeros((count, *a.shape[1:]), a.dtype)])


def _merge_moments(before: State, mean: Array, m2: Array, tokens: int) -> State:
    """Mean and Σ‖x - mean‖² of a window with a batch more (Chan et al. 1983)."""
    total = before["tokens"] + tokens
    shift = mean - before["mean"]
    return {
        "steps": before["steps"] + 1,
        "tokens": total,
        "mean": before["mean"] + shift * (tokens / total),
        "m2": before["m2"] + m2 + jnp.square(shift).sum() * before["tokens"] * tokens / total,
    }


def read_window(ended: State) -> list[Window] | None:
    """Fetch an ended window from the devices, a Window a group; None where the tokens were not finite."""
    host = jax.device_get(ended)
    steps, variance = int(host["moments"]["steps"]), host["moments"]["m2"]
    if not np.isfinite(variance):
        return None
    windows = []
    for sums, dead_fraction, own_steps, frozen in host["groups"]:
        figures = {name: getattr(sums, name) / steps for name in ("loss", "mse", "l1", "l0")}
        figures |= {"fvu": sums.residual / (variance or np.nan), "dead_fraction": dead_fraction}
        figures = {
            name: np.where(frozen, np.float32(np.nan), value) for name, value in figures.items()
        }
        windows.append(Window(**figures, active=sums.active, steps=own_steps, frozen=frozen))
    return windows


def _given(value: Any) -> Any:
    """A setting that `Train.resolved` has filled in."""
    assert value is not None
    return value
