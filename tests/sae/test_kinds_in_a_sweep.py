"""All kinds side by side in one run: training, resume, meshes and loading."""

import csv
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from minsae_jax import UserError, load_sae
from minsae_jax.activations.store import open_store
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.data import geometric_median, open_train_data
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.hyper import sparsity
from minsae_jax.sae.kinds import KINDS as KIND_OF_NAME
from minsae_jax.sae.kinds import BatchContext
from minsae_jax.sae.member import save_member
from minsae_jax.sae.run import load_run
from minsae_jax.sae.sweep import Sweep, read_metrics
from minsae_jax.sae.trainer import train
from tests.conftest import sharing_programs, write_small_store
from tests.interrupt import train_until

KINDS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")
NAMES = [
    "batchtopk,k=2",
    "batchtopk,k=4",
    "jumprelu,target_l0=3",
    "lambda=1",
    "matryoshka,k=2",
    "matryoshka,k=4",
    "topk,k=2",
    "topk,k=4",
]
# Of the members in the order of sweep.csv.
SETTINGS = [
    ("relu", ("lambda_sparsity", 1.0)),
    ("topk", ("k", 2.0)),
    ("topk", ("k", 4.0)),
    ("batchtopk", ("k", 2.0)),
    ("batchtopk", ("k", 4.0)),
    ("jumprelu", ("target_l0", 3.0)),
    ("matryoshka", ("k", 2.0)),
    ("matryoshka", ("k", 4.0)),
]


def mixed_settings(folder):
    """Settings of a run of all kinds, and its stores in the folder."""
    store = write_small_store(folder / "store", seed=0)
    write_small_store(folder / "store_val", seed=1)
    return TrainConfig(
        store=str(store),
        run_dir=str(folder / "run"),
        kind=KINDS,
        k=(2.0, 4.0),
        lambda_sparsity=(1.0,),
        target_l0=(3.0,),
        lr=(3e-3,),
        num_steps=40,
        feature_dim_factor=(2.0,),
        batch_size=32,
        eval_window=8,
        eval_every=20,
        checkpoint_every=10,
        aux_dead_after=64,
        mesh="1x1",
    )


@pytest.fixture
def mixed(tmp_path):
    return mixed_settings(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Settings of a finished run on a mesh that the members of some groups do not fill."""
    settings = replace(mixed_settings(tmp_path_factory.mktemp("kinds")), mesh="2x4")
    with sharing_programs():
        train(settings)
    return settings


def hparams(member):
    """Return what TensorBoard's HParams tab shows of a member."""
    events = EventAccumulator(str(member)).Reload()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    return {name: getattr(v, v.WhichOneof("kind")) for name, v in values.items()}


def member_files(run):
    return {
        str(path.relative_to(run)): path.read_bytes()
        for name in ("metrics.csv", "act_freqs.csv", "sae.safetensors", "sweep.csv", "eval.csv")
        for path in sorted(run.rglob(name))
    }


@pytest.mark.slow
def test_run_of_all_kinds_resumes_to_the_same_bytes(finished, tmp_path):
    run = load_run(finished.run_dir)
    assert sorted(member.name for member in run.members) == NAMES
    other = replace(finished, run_dir=str(tmp_path / "other"))
    train_until(other, 26)
    train(other)
    assert member_files(tmp_path / "other") == member_files(run.folder)


@pytest.mark.slow
def test_members_load_with_their_kind(finished):
    run = load_run(finished.run_dir)
    x = open_store(finished.store, -1).read(0).reshape(-1, 16)
    for member in run.members:
        sae = member.load()
        config = json.loads((member.folder / "config.json").read_text())
        assert sae.kind.name == config["kind"] == member.hyper["kind"]
        assert sae(x).shape == x.shape
        some = sae.encode_features(x, [3, 0])
        np.testing.assert_allclose(some, np.asarray(sae.encode(x))[:, [3, 0]], atol=1e-6)
        if config["kind"] in ("topk", "matryoshka"):
            np.testing.assert_allclose(np.linalg.norm(sae.unit_directions, axis=1), 1, rtol=1e-5)
    assert [(m.hyper["kind"], sparsity(m.hyper)) for m in run.members] == SETTINGS
    assert [hparams(member.folder) for member in run.members] == [
        {"kind": kind, setting: value, "lr": 3e-3, "seed": 0, "d_sae": 32}
        for kind, (setting, value) in SETTINGS
    ]
    topk = load_sae(run.folder / "members/topk,k=4")
    assert (np.asarray(topk.encode(x)) > 0).sum(1).max() == 4


def train_on_sources(settings, num_steps, n_tokens):
    """Train on mixtures of sparse sources; return the features of new tokens, for each member."""
    plan = replace(settings, num_steps=num_steps, mesh="1x1").plan()
    sweep = Sweep(plan, make_groups(plan, 16), 16)
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(24, 16))

    def tokens(n):
        sources = rng.exponential(size=(n, 24)) * (rng.random((n, 24)) < 0.1)
        x = sources @ directions
        return (x / np.sqrt((x**2).mean())).astype(np.float32)

    state = sweep.init(median=geometric_median(tokens(500)))
    for _ in range(num_steps):
        x = tokens(n_tokens)
        state, _ = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(1), n_tokens=n_tokens)
    x = jnp.asarray(tokens(2000))
    members = [member for group in sweep.groups for member in group]
    return {
        member: np.asarray(member.kind.encode(params, x))
        for member, params in zip(members, sweep.weights(state), strict=True)
    }


def test_inference_threshold_gives_k_features(mixed):
    """On tokens that were not trained on, within 10 %."""
    kinds = replace(mixed, kind=("batchtopk", "matryoshka"), lambda_sparsity=(), target_l0=())
    for member, features in train_on_sources(kinds, num_steps=400, n_tokens=128).items():
        assert (features > 0).sum(1).mean() == pytest.approx(member.sparsity, rel=0.1)


def test_target_l0_is_reached(mixed):
    """On tokens that were not trained on, within 10 %."""
    kind = replace(mixed, kind=("jumprelu",), k=(), lambda_sparsity=(), target_l0=(4.0, 16.0, 64.0))
    large = replace(kind, feature_dim_factor=(16.0,))
    for member, features in train_on_sources(large, num_steps=500, n_tokens=128).items():
        assert (features > 0).sum(1).mean() == pytest.approx(member.sparsity, rel=0.1)


def losses(settings, n_tokens):
    plan = settings.plan()
    sweep = Sweep(plan, make_groups(plan, 16), 16)
    state = sweep.init(median=np.zeros(16, np.float32))
    rng = np.random.default_rng(0)
    results = []
    for _ in range(3):
        x = rng.normal(size=(n_tokens, 16)).astype(np.float32)
        state, _ = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(1), n_tokens=n_tokens)
        state, metrics = sweep.take_metrics(state)
        results.append(read_metrics(metrics))
    return results


@pytest.mark.slow
def test_eight_devices_select_the_same_features(mixed):
    """45 tokens do not divide evenly over them."""
    # Adam turns rounding errors of gradients near 0 into steps of up to lr.
    settings = replace(mixed, lr=(1e-3,))
    eight = losses(replace(settings, mesh="1x8"), n_tokens=45)
    one = losses(replace(settings, mesh="1x1"), n_tokens=45)
    assert len(jax.devices()) == 8
    for a, b in zip(eight, one, strict=True):
        for ours, theirs in zip(a, b, strict=True):
            np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
            np.testing.assert_array_equal(ours.active, theirs.active)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_threshold_has_settled_when_the_first_step_weighs_less_than_a_hundredth(name):
    kind = KIND_OF_NAME[name]
    params = {"W_dec": jnp.ones((1, 1)), "threshold": jnp.zeros(())}
    context = BatchContext(is_dead=jnp.zeros(1, bool), n_dead=jnp.int32(0))
    # 1 in the first step, 0 in all others: the average is the weight of the first step.
    weights = []
    for step in range(kind.settling_steps):
        of_step = context._replace(threshold=jnp.float32(step == 0))
        params = kind.finish_update(params, of_step)
        weights.append(float(params["threshold"]))
    assert weights[-1] < 0.01 < weights[-2]


@pytest.mark.slow
def test_too_few_steps_for_the_threshold_are_a_warning(mixed):
    """The second call finds the run finished, and says the same."""
    settings = replace(
        mixed, eval_every=0, kind=("topk", "batchtopk"), lambda_sparsity=(), target_l0=()
    )
    for _ in range(2):
        run = train(settings)
        table, warning = run.summary().split("\nwarning: ")
        assert "topk,k=2" in table
        text = " ".join(warning.split())
        assert text.startswith("the threshold of batchtopk,k=2, batchtopk,k=4 is an average")
        assert text.endswith("it takes 460 steps, and the run has 40")
    # L0 on held-out tokens decides where it was measured.
    for l0, is_warned in ((4.3, False), (3.5, True)):
        members = [replace(m, held_out={"l0": l0, "fvu": 0.1}) for m in run.members]
        of_k_4 = replace(run, members=tuple(m for m in members if m.hyper["k"] == 4))
        assert ("warning: " in of_k_4.summary()) == is_warned
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("num_steps: 40", "num_steps: 460"))
    assert "warning: " not in load_run(run.folder).summary()


@pytest.mark.parametrize(
    ("given", "setting", "values"),
    [
        ({}, "target_l0", (16.0, 32.0, 64.0)),
        ({"lambda_sparsity": (0.1,)}, "lambda_sparsity", (0.1,)),
        ({"jumprelu_penalty": "step"}, "lambda_sparsity", (5.0,)),
        ({"lambda_sparsity": (0.1,), "target_l0": (8.0,)}, "target_l0", (8.0,)),
    ],
)
def test_jumprelu_has_a_target_l0_unless_it_has_a_penalty(given, setting, values):
    config = TrainConfig(kind=("relu", "jumprelu"), **given).resolved()
    assert config.sparsity_setting("jumprelu") == setting
    assert getattr(config, setting) == values
    # That of relu is independent of it.
    assert config.lambda_sparsity == given.get("lambda_sparsity", (5.0,))


def test_jumprelu_with_a_target_l0(mixed):
    """In bfloat16 its threshold moves too, and members far from their target are named."""
    settings = replace(mixed, kind=("jumprelu",), k=(), lambda_sparsity=(), precision="bfloat16")
    settings = replace(settings, jumprelu_penalty="step")
    with pytest.warns(UserWarning, match="--jumprelu_penalty step has no effect with --target_l0"):
        run = train(settings)
    (trained,) = run.members
    threshold = np.asarray(trained.load().params["threshold"])
    assert np.ptp(threshold) > 1e-3  # at first all are equal
    assert trained.held_out["l1"] == trained.held_out["l0"] > 0  # the penalty is on their number
    for l0, is_named in ((3.2, False), (3.4, True), (2.6, True)):
        member = replace(trained, metrics=trained.metrics | {"l0": l0})
        summary = " ".join(replace(run, members=(member,)).summary().split())
        name = f"L0 is far from the target of {trained.name} ({l0})"
        assert (name in summary) == is_named


@pytest.mark.slow
def test_diverged_members_of_any_kind_leave_the_others_unchanged(mixed, tmp_path):
    settings = replace(mixed, k=(2.0,), eval_every=0, num_steps=20)
    with pytest.warns(UserWarning, match="diverged"):
        sick = train(replace(settings, lr=(3e-3, 1e30)))
    healthy = train(replace(settings, lr=(3e-3, 1e-3), run_dir=str(tmp_path / "healthy")))
    assert len(sick.members) == 2 * len(KINDS)
    for member in sick.members:
        if member.hyper["lr"] == 3e-3:
            assert member.status == "finished"
            assert member_files(member.folder) == member_files(
                healthy.folder / "members" / member.name
            )
        else:
            assert member.status == "diverged"
            assert all(np.isfinite(p).all() for p in member.load().params.values())


def test_geometric_median_is_where_mean_distance_is_least():
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    x[:20] += 50
    median = geometric_median(x)

    def mean_distance(point):
        return np.linalg.norm(x - point, axis=1).mean()

    assert np.abs(median).max() < 1
    for direction in np.random.default_rng(1).normal(size=(20, 5)):
        assert mean_distance(median + 0.05 * direction) > mean_distance(median)


@pytest.mark.parametrize(("kind", "warns"), [("topk", True), ("relu", False)])
def test_init_with_decoder_rows_of_several_norms_is_a_warning(mixed, tmp_path, kind, warns):
    """Kinds that select features by their size then select others; those of ReLU stay."""
    rng = np.random.default_rng(0)
    store = open_store(mixed.store, -1)
    w_dec = rng.normal(size=(4, store.d_model))
    params = {"W_enc": w_dec.T, "b_enc": np.zeros(4), "W_dec": w_dec, "k": np.array(2.0)}
    params["b_dec"] = np.zeros(store.d_model)
    save_member(tmp_path / "init", params, {"kind": kind})
    config = replace(
        mixed,
        kind=(kind,),
        lambda_sparsity=(1.0,) if kind == "relu" else (),
        k=(2.0,) if kind == "topk" else (),
        target_l0=(),
        feature_dim_factor=(4 / store.d_model,),
        init=str(tmp_path / "init"),
    )

    def open_inputs():
        return open_train_data(config.plan(), store, None, is_new=True)

    if not warns:
        open_inputs()  # warnings are errors
        return
    with pytest.warns(UserWarning, match="x̂ is not the same at the start"):
        open_inputs()


@pytest.mark.slow
def test_training_starts_from_a_member_of_the_same_kind(mixed, tmp_path):
    topk = replace(mixed, kind=("topk",), lambda_sparsity=(), target_l0=(), k=(2.0,), num_steps=8)
    first = train(topk).members[0]
    again = replace(topk, init=str(first.folder), run_dir=str(tmp_path / "again"))
    (member,) = train(replace(again, k=(4.0,), lr=(0.0,))).members
    before = first.load()
    after = member.load()
    assert float(after.params["k"]) == 4
    np.testing.assert_allclose(after.params["W_enc"], before.params["W_enc"], rtol=1e-5)
    with pytest.raises(UserError, match="is of kind topk, but --kind is batchtopk"):
        train(replace(again, kind=("batchtopk",), run_dir=str(tmp_path / "other")))


def test_run_from_before_there_were_kinds_resumes(mixed, tmp_path):
    relu = replace(mixed, kind=(), k=(), target_l0=(), aux_dead_after=None, num_steps=12)
    train_until(relu, 11)
    path = tmp_path / "run/config.yaml"
    content = yaml.safe_load(path.read_text())
    for name in ("kind", "k", "target_l0", "jumprelu_penalty", "aux_dead_after"):
        del content["train"][name]
    del content["train"]["matryoshka_shares"]
    path.write_text(yaml.safe_dump(content))
    (member,) = train(relu).members
    assert member.status == "finished"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": (8.0,)}, "--k requires --kind topk or batchtopk or matryoshka"),
        ({"target_l0": (8.0,)}, "--target_l0 requires --kind jumprelu"),
        (
            {"kind": ("topk",), "lambda_sparsity": (1.0,)},
            "--lambda_sparsity requires --kind relu or jumprelu without --target_l0",
        ),
        ({"recipe": "minsae", "kind": ("topk",)}, "--recipe minsae trains --kind relu only"),
        ({"matryoshka_shares": (0.5, 0.25, 1.0)}, "--matryoshka_shares must increase to 1"),
        ({"matryoshka_shares": (0.5,)}, "--matryoshka_shares must increase to 1"),
        ({"kind": ("topk", "topk")}, "--kind contains duplicate values"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("k", ["64", "1000000"])
def test_more_features_than_there_are_is_refused(k):
    plan = TrainConfig(kind=("topk",), k=(float(k),), feature_dim_factor=(2.0,)).plan()
    with pytest.raises(UserError, match=f"--k {k} is more than d_sae 32"):
        make_groups(plan, 16)


def test_topk_refuses_a_fraction_of_a_feature_and_batchtopk_takes_it():
    plan = TrainConfig(kind=("batchtopk",), k=(8.5,)).plan()
    (group,) = make_groups(plan, 16)
    assert group[0].sparsity == 8.5
    with pytest.raises(UserError, match=r"--kind topk requires whole numbers of --k, got 8.5"):
        make_groups(replace(plan, config=replace(plan.config, kind=("batchtopk", "topk"))), 16)


def test_modern_recipe_has_its_own_learning_rate_and_k():
    plan = TrainConfig(recipe="modern", feature_dim_factor=(8.0,)).plan()
    (group,) = make_groups(plan, 128)
    assert [member.name for member in group] == [f"batchtopk,k={k}" for k in (16, 32, 64)]
    assert {member.lr for member in group} == {8e-4}


def test_jumprelu_has_the_bandwidth_of_its_penalty():
    """Gemma Scope's 0.001 is for activations of norm 1; here they have norm √d_model."""
    settings = TrainConfig(kind=("jumprelu",), lambda_sparsity=(1.0,))
    widths = {}
    for penalty in ("tanh", "step"):
        plan = replace(settings, jumprelu_penalty=penalty).plan()
        ((member,),) = make_groups(plan, 144)
        widths[penalty] = (member.kind.bandwidth, member.kind.initial_threshold)
    assert widths == {"tanh": (2, 0.1), "step": pytest.approx((0.012, 0.012))}


@pytest.mark.parametrize("recipe", ["april2024", "minsae", "modern"])
def test_every_size_has_its_automatic_learning_rate(recipe):
    """2e-4 √(2¹⁴ / d_sae), and the number is in the names."""
    lr = ("auto", 1e-3)
    plan = TrainConfig(recipe=recipe, lr=lr, feature_dim_factor=(8.0, 32.0, 128.0)).plan()
    groups = make_groups(plan, 128)
    rates = {(member.d_sae, member.lr) for group in groups for member in group}
    automatic = {(1024, 8e-4), (4096, 4e-4), (16384, 2e-4)}
    assert rates == automatic | {(1024, 1e-3), (4096, 1e-3), (16384, 1e-3)}
    names = [member.name for member in groups[1]]
    assert [name.partition(",lr=")[2] for name in names[:2]] == [
        "0.0004,d_sae=4096",
        "0.001,d_sae=4096",
    ]


def test_learning_rate_that_is_also_the_automatic_one_is_refused():
    plan = TrainConfig(lr=(8e-4, "auto"), feature_dim_factor=(8.0,)).plan()
    message = "duplicate values: 0.0008 auto, where auto is 0.0008 at d_sae 1024"
    with pytest.raises(UserError, match=message):
        make_groups(plan, 128)


def test_automatic_learning_rate_is_logged_as_a_number(settings):
    run = train(replace(settings, lr=("auto",), num_steps=8)).folder
    expected = {32: 2e-4 * 2 ** ((14 - 5) / 2), 48: 2e-4 * (2**14 / 48) ** 0.5}
    with (run / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        assert float(row["lr"]) == pytest.approx(expected[int(row["d_sae"])], rel=1e-5)
