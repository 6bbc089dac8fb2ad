"""A member in a sweep equals the member alone, on any number of devices."""

from dataclasses import replace
from functools import lru_cache

import jax
import ml_dtypes
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.step import make_schedules
from minsae_jax.sae.sweep import CUDA_GRAPHS, Sweep, compiler_options, read_metrics

D = 16
SETTINGS = TrainConfig(
    lambda_sparsity=(1.0, 4.0),
    lr=(1e-3, 3e-3),
    seed=(0, 1),
    feature_dim_factor=(2.0, 3.0),
    num_steps=20,
    batch_size=48,
)
ONE_SIZE = replace(SETTINGS, feature_dim_factor=(2.0,))  # half as much to compile


def batches(count, tokens=48):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(tokens, D)).astype(np.float32) for _ in range(count)]


def make_sweep(settings):
    """Return a sweep, which tests share, so that its programs are compiled once."""
    return cached_sweep(settings, jax.default_backend())


@lru_cache
def cached_sweep(settings, backend):
    return Sweep(settings.plan(), make_groups(settings.plan(), D), D)


def make_step(sweep, state, x, scale=1):
    """Make a step on a batch, or a call of several steps on stacked batches."""
    state, _ = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(scale), n_tokens=x.shape[-2])
    return state


def run(settings, xs):
    """Return the final parameters of every member, and the metrics of every step."""
    sweep = make_sweep(settings)
    state = sweep.init()
    steps = []
    for x in xs:
        state = make_step(sweep, state, x)
        state, metrics = sweep.take_metrics(state)
        steps.append(read_metrics(metrics))
    params = {}
    for group, group_state in zip(sweep.groups, state.groups, strict=True):
        for i, member in enumerate(group):
            params[member] = {k: np.asarray(v[i]) for k, v in group_state.params.items()}
    return params, steps


def test_members():
    groups = make_groups(SETTINGS.plan(), D)
    assert [len(g) for g in groups] == [8, 8]
    names = [m.name for g in groups for m in g]
    assert names[0] == "lambda=1,lr=0.001,seed=0,d_sae=32"
    assert len(set(names)) == 16
    alone = make_groups(
        replace(SETTINGS, lr=(5e-5,), seed=(3,), feature_dim_factor=(2.0,)).plan(), D
    )
    assert [m.name for m in alone[0]] == ["lambda=1", "lambda=4"]
    close = make_groups(replace(SETTINGS, lambda_sparsity=(1.0, 1.0000000000001)).plan(), D)
    assert len({m.name for g in close for m in g}) == 16
    with pytest.raises(UserError, match="gives d_sae 32, 32"):
        make_groups(replace(SETTINGS, feature_dim_factor=(2.0, 2.01)).plan(), D)


def test_a_sweep_is_its_members_alone():
    together, windows = run(SETTINGS, batches(12))
    place = {
        m: (g, i)
        for g, group in enumerate(make_groups(SETTINGS.plan(), D))
        for i, m in enumerate(group)
    }
    weights = [params["W_enc"] for m, params in together.items() if m.d_sae == 32]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(weights) for b in weights[:i])
    # One of each size
    for member in list(together)[5:11:5]:
        own = {n: (member.hyper[n],) for n in ("lambda_sparsity", "lr", "seed")}
        alone, own_windows = run(
            replace(SETTINGS, **own, feature_dim_factor=(member.d_sae / D,)), batches(12)
        )
        ((_, params),) = alone.items()
        for name, value in params.items():
            np.testing.assert_allclose(together[member][name], value, atol=2e-5, rtol=0)
        g, i = place[member]
        for ours, theirs in zip(windows, own_windows, strict=True):
            assert ours[g].loss[i] == pytest.approx(theirs[0].loss[0], rel=1e-5)


def test_gpu_code_path_equals_the_cpu_one(monkeypatch):
    """Members under vmap in large tiles, as on a GPU, equal those one by one in small tiles."""
    _, cpu = run(ONE_SIZE, batches(6, 45))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, accelerator = run(ONE_SIZE, batches(6, 45))
    for step, same_step in zip(cpu, accelerator, strict=True):
        for ours, theirs in zip(step, same_step, strict=True):
            np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
            np.testing.assert_allclose(ours.l0, theirs.l0, rtol=2e-3)


def test_one_compilation():
    sweep = make_sweep(replace(SETTINGS, mesh="1x1"))
    state = sweep.init()
    for x in batches(4):
        state = make_step(sweep, state, x)
        state, _ = sweep.take_metrics(state)
    assert sweep.step._cache_size() == 1


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    ("mesh", "n_members"),
    [
        ("4x2", 3),
        pytest.param("8x1", 3, marks=pytest.mark.slow),
        ("3x2", 3),
        # The mesh that is chosen for them: along data alone, along both axes
        (None, 3),
        (None, 4),
    ],
)
def test_any_mesh(mesh, n_members):
    """45 tokens divide evenly over no eight devices, three members over 3x2 alone."""
    members = (1.0, 2.0, 3.0, 4.0)[:n_members]
    settings = replace(ONE_SIZE, lambda_sparsity=members, lr=(1e-3,), seed=(0,))
    params, meshed = run(replace(settings, mesh=mesh), batches(12, 45))
    expected, one = run(replace(settings, mesh="1x1"), batches(12, 45))
    assert params.keys() == expected.keys()
    for a, b in zip(meshed, one, strict=True):
        for ours, theirs in zip(a, b, strict=True):
            assert ours.loss.shape == (n_members,)
            np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
            np.testing.assert_allclose(ours.fvu, theirs.fvu, rtol=1e-5)
            np.testing.assert_allclose(ours.l0, theirs.l0, rtol=2e-3)
            assert not ours.frozen.any()


@pytest.mark.usefixtures("eight_devices")
def test_a_state_moves_from_mesh_to_mesh():
    settings = replace(ONE_SIZE, lambda_sparsity=(1.0, 2.0, 3.0), lr=(1e-3,), seed=(0,))
    xs = batches(4)
    states = {}
    for mesh in ("4x2", "3x2", "2x4"):
        sweep = make_sweep(replace(settings, mesh=mesh))
        state = sweep.init()
        for x in xs:
            state = make_step(sweep, state, x)
        states[mesh] = sweep.portable(state)
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), states[mesh])
        assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), sweep.abstract_portable())
        there_and_back = sweep.portable(sweep.from_portable(states[mesh]))
        jax.tree.map(np.testing.assert_array_equal, there_and_back, states[mesh])
    for mesh in ("3x2", "2x4"):
        for a, b in zip(jax.tree.leaves(states["4x2"]), jax.tree.leaves(states[mesh]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_padding_repeats_the_last_member_after_a_resume_too():
    """Members of zeros have no norm to divide by, and slow the search of BatchTopK down."""
    settings = replace(SETTINGS, kind=("batchtopk",), lambda_sparsity=(), k=(0.2, 0.3, 0.4))
    settings = replace(settings, lr=(1e-3,), seed=(0,), mesh="2x4")
    sweep = make_sweep(settings)
    state = make_step(sweep, sweep.init(), batches(1)[0])
    resumed = sweep.from_portable(sweep.portable(state))
    for group in resumed.groups:
        assert group.frozen.tolist() == [False, False, False, True]
        for p in group.params.values():
            np.testing.assert_array_equal(p[3], p[2])


@pytest.mark.usefixtures("eight_devices")
def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(UserError, match="--mesh 4x4 needs 16 devices, got 8"):
        make_sweep(replace(SETTINGS, mesh="4x4"))


def test_half_precision_tokens():
    """They go to the devices as they are, and are float32 there."""
    half = [x.astype(ml_dtypes.bfloat16) for x in batches(3)]
    _, ours = run(ONE_SIZE, half)
    _, theirs = run(ONE_SIZE, [x.astype(np.float32) for x in half])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a[0].loss, b[0].loss)


def test_bfloat16_products_train_alike():
    _, exact = run(ONE_SIZE, batches(20))
    _, low = run(replace(ONE_SIZE, precision="bfloat16"), batches(20))
    for a, b in zip(exact[-1], low[-1], strict=True):
        np.testing.assert_allclose(a.fvu, b.fvu, rtol=0.01)
        assert (a.fvu != b.fvu).all()


def test_schedules():
    lambda_schedule, lr_schedule = make_schedules(replace(SETTINGS, num_steps=100).plan().optimizer)
    steps = np.arange(100)
    factors = np.array([[lambda_schedule(float(step)), lr_schedule(float(step))] for step in steps])
    np.testing.assert_allclose(factors[:6, 0], [0, 0.2, 0.4, 0.6, 0.8, 1], atol=1e-6)
    assert (factors[5:, 0] == 1).all()
    assert (factors[:81, 1] == 1).all()
    np.testing.assert_allclose(factors[80:, 1], np.arange(20, 0, -1) / 20, atol=1e-6)
    for schedule in make_schedules(TrainConfig(recipe="minsae").plan().optimizer):
        assert [float(schedule(step)) for step in (0, 5000, 10_719)] == [1, 1, 1]


def test_clipped_gradients_move_no_further_than_unclipped():
    """Adam hides a constant factor, but its first moment is (1 - β1) of the clipped gradient."""
    settings = replace(SETTINGS, max_grad_norm=0.01)
    sweep = make_sweep(settings)
    x = batches(1)[0] * 10
    state = make_step(sweep, sweep.init(), x)
    for group in state.groups:
        moments = jax.tree.leaves(group.opt_state[1].mu)
        norms = np.sqrt(sum((np.asarray(m) ** 2).reshape(len(m), -1).sum(1) for m in moments))
        np.testing.assert_allclose(norms, 0.1 * 0.01, rtol=1e-4)


def test_fvu_is_of_the_whole_log_interval():
    """With a decoder of zeros residual = Σ‖x‖²; the variance is about the interval's mean."""
    settings = replace(
        SETTINGS, lambda_sparsity=(0.0,), lr=(0.0,), seed=(0,), feature_dim_factor=(2.0,)
    )
    sweep = make_sweep(settings)
    start = {
        k: np.zeros(v, np.float32)
        for k, v in {"W_enc": (D, 32), "b_enc": (32,), "W_dec": (32, D), "b_dec": (D,)}.items()
    }
    state = sweep.init(start)
    xs = [x + 5 + i for i, x in enumerate(batches(3))]
    for x in xs:
        state = make_step(sweep, state, x)
    _, ended = sweep.take_metrics(state)
    x = np.concatenate(xs).astype(np.float64)
    expected = (x**2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert read_metrics(ended)[0].fvu[0] == pytest.approx(expected, rel=1e-5)


# 45 tokens do not divide evenly over four devices.
@pytest.mark.parametrize("mesh", ["1x1", pytest.param("2x4", marks=pytest.mark.slow)])
def test_moments_are_of_the_tokens_of_single_steps_and_of_calls_of_several(mesh):
    sweep = make_sweep(replace(ONE_SIZE, lr=(1e-3,), seed=(0,), mesh=mesh, dead_after=200))
    # The means of the batches differ by more than their standard deviations.
    xs = np.stack([x + 5 + 3 * i for i, x in enumerate(batches(5, tokens=45))])
    state = make_step(sweep, sweep.init(), xs[0], scale=2)
    state = make_step(sweep, state, xs[1:4], scale=2)
    assert (state.step, state.tokens_seen) == (4, 180)
    state = make_step(sweep, state, xs[4], scale=2)
    assert (state.step, state.tokens_seen) == (5, 200)  # at most dead_after
    x = 2 * xs.reshape(-1, D).astype(np.float64)
    moments = state.moments
    assert (moments.steps, moments.tokens) == (5, 225)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.m2, np.square(x - x.mean(0)).sum(), rtol=1e-6)


def test_dead_features():
    """Feature 0 always fires, feature 1 never, feature 2 in the first step only."""
    settings = replace(
        SETTINGS,
        lambda_sparsity=(0.0,),
        lr=(0.0,),
        seed=(0,),
        feature_dim_factor=(3 / D,),
        dead_after=100,
    )
    sweep = make_sweep(settings)
    start = {
        "W_enc": np.zeros((D, 3)),
        "b_enc": np.array([1, -1, 0]),
        "W_dec": np.zeros((3, D)),
        "b_dec": np.zeros(D),
    }
    start["W_enc"][0, 2] = 1
    state = sweep.init({k: v.astype(np.float32) for k, v in start.items()})
    dead, active = [], []
    for i in range(4):
        x = np.full((40, D), 1 if i == 0 else -1, np.float32)
        state = make_step(sweep, state, x)
        state, ended = sweep.take_metrics(state)
        (metrics,) = read_metrics(ended)
        dead.append(round(float(metrics.dead_fraction[0]) * 3))
        active.append(metrics.active[0].tolist())
    assert dead == [1, 1, 1, 2]  # feature 2 was silent for 40, 80, 120 >= 100 tokens
    assert active == [[40, 0, 40], [40, 0, 0], [40, 0, 0], [40, 0, 0]]


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    ("kinds", "mesh", "flags", "uses_graphs"),
    [
        ("topk batchtopk", "8x1", "", True),
        ("matryoshka", "1x1", "--xla_gpu_autotune_level=0", True),
        ("topk relu", "1x1", "", False),
        ("batchtopk", "1x8", "", False),
        ("batchtopk", "1x1", "--xla_gpu_enable_command_buffer=", False),
    ],
)
def test_cuda_graphs_are_for_loops_without_sums(monkeypatch, kinds, mesh, flags, uses_graphs):
    sweep = make_sweep(replace(ONE_SIZE, mesh=mesh))
    program = replace(sweep.program, kinds=tuple(KINDS[kind] for kind in kinds.split()))
    assert compiler_options(program) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options(program) == (CUDA_GRAPHS if uses_graphs else None)


def test_xla_knows_the_options_of_cuda_graphs():
    double = jax.jit(lambda x: 2 * x, compiler_options=CUDA_GRAPHS)
    assert double(3) == 6
