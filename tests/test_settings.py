"""Settings: strict YAML, ranges, contradictions, recipes."""

from dataclasses import fields

import pytest

from minsae_jax.__main__ import load_settings
from minsae_jax.eeg.synthetic import DemoConfig
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.errors import UserError
from minsae_jax.sae.config import PlotConfig, TrainConfig
from minsae_jax.settings import from_dict, to_dict

REQUIRED = {ExtractConfig: {"root_path": "eeg", "checkpoint_path": "encoder"}}


@pytest.fixture
def load(tmp_path):
    def run(text, cls=TrainConfig):
        (tmp_path / "x.yaml").write_text(text)
        return load_settings(cls, tmp_path / "x.yaml")

    return run


def test_a_section_a_verb(load):
    text = "extract: {root_path: a, checkpoint_path: b, split: [train, val]}\ntrain: {lr: 1e-5, lambda_sparsity: [1, 2.5]}"
    settings = load(text)
    assert settings.lr == (1e-5,)  # PyYAML alone reads text
    assert settings.lambda_sparsity == (1.0, 2.5)
    assert load(text, ExtractConfig).split == ("train", "val")
    assert load(text, DemoConfig) == DemoConfig()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trian: {}", "unknown section 'trian', did you mean 'train'?"),
        (
            "train: {lamda_sparsity: 5}",
            "unknown key 'lamda_sparsity', did you mean 'lambda_sparsity'?, in section train",
        ),
        ("train: {num_steps: 1.5}", "num_steps must be a whole number, but is 1.5"),
        ("train: {num_steps: true}", "num_steps must be a whole number, but is True"),
        ("train: {lr: fast}", "lr must be a number, but is 'fast'"),
        ("train: {lr: '1e-3'}", "lr must be a number, but is '1e-3'"),
        ("train: {overwrite: 1}", "overwrite must be true or false, but is 1"),
        ("train: {store: 5}", "store must be text, but is 5"),
        (
            "train: {recipe: april2023}",
            "recipe must be one of april2024, minsae, but is 'april2023'",
        ),
        ("train: {lr: 1, lr: 2}", "x.yaml cannot be read as YAML: key 'lr' stands twice"),
        ("train: {store: 2024-13-45}", "cannot be read as YAML"),
        ("[" * 3000, "cannot be read as YAML"),
        ("train: [1]", "section train must hold settings"),
        ("[1]", "holds no YAML mapping"),
        ("train: {", "cannot be read as YAML"),
        (
            "train: {recipe: minsae, batch_size: 5}",
            "--batch_size has no meaning under --recipe minsae",
        ),
        (
            "extract: {cache_layer: x}",
            "in section extract",
        ),  # another verb's section is checked too
    ],
)
def test_slips_are_named(load, text, told):
    with pytest.raises(UserError) as e:
        load(text)
    assert told in str(e.value)


def test_anchors_and_merges(load):
    assert load("demo: &x {seed: 3}\ntrain: {<<: *x, lr: 1}").seed == (3,)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_settings(TrainConfig, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (TrainConfig, {"seed": [2**32]}), (TrainConfig, {"adam_eps": float("inf")}),
        (TrainConfig, {"recipe": "minsae", "shuffle_seed": 1}),
        (DemoConfig, {"minutes": float("inf")}), (TrainConfig, {"num_steps": 0}), (TrainConfig, {"batch_size": -1}),
        (TrainConfig, {"lr": [-1e-3]}),
        (TrainConfig, {"lr": [float("nan")]}),
        (TrainConfig, {"lambda_sparsity": [1, 1]}), (TrainConfig, {"feature_dim_factor": [0]}), (TrainConfig, {"seed": [-1]}),
        (TrainConfig, {"lambda_warmup": 1.5}), (TrainConfig, {"beta2": 1.0}), (TrainConfig, {"eval_window": 0}), (TrainConfig, {"seed": []}),
        (TrainConfig, {"number_of_arrays": 2}), (TrainConfig, {"recon_weight": 2}), (TrainConfig, {"recipe": "minsae", "lr_decay": 0.2}),
        (TrainConfig, {"dead_after": 2**31}), (TrainConfig, {"shuffle_seed": -1}), (TrainConfig, {"checkpoint_every": 0}),
        (ExtractConfig, {"batch_size": 0}), (ExtractConfig, {"max_batches": 0}), (ExtractConfig, {"split": []}),
        (ExtractConfig, {"split": ["val", "val"]}),
        (DemoConfig, {"patients": 3}), (DemoConfig, {"minutes": 0}), (DemoConfig, {"seed": -1}),
    ],
)  # fmt: skip
def test_out_of_range(cls, values):
    with pytest.raises(UserError) as e:
        from_dict(cls, REQUIRED.get(cls, {}) | values)
    name = next(name for name in values if name != "recipe")
    assert f"--{name}" in str(e.value)


def test_recipes_fill_in_their_numbers():
    april, minsae = TrainConfig().resolved(), TrainConfig(recipe="minsae").resolved()
    assert (april.lambda_sparsity, april.lr, april.batch_size) == ((5.0,), (5e-5,), 4096)
    assert (april.lambda_warmup, april.lr_decay, april.max_grad_norm, april.decoder_norm) == (
        0.05,
        0.2,
        1.0,
        0.1,
    )
    assert april.scale_tokens == 1_000_000
    assert (minsae.lambda_sparsity, minsae.lr, minsae.num_steps, minsae.number_of_arrays) == (
        (0.01,),
        (1e-3,),
        10_720,
        1,
    )
    assert (minsae.feature_dim_factor, minsae.recon_weight, minsae.eval_window) == ((8.0,), 1.0, 50)
    assert minsae.max_grad_norm is None
    assert TrainConfig(lr=(1e-4,)).resolved().lr == (1e-4,)


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig().resolved(),
        TrainConfig(recipe="minsae").resolved(),
        ExtractConfig(root_path="eeg", checkpoint_path="encoder"),
        DemoConfig(),
        PlotConfig(),
    ],
)
def test_settings_survive_yaml(settings):
    assert from_dict(type(settings), to_dict(settings)) == settings


@pytest.mark.parametrize("cls", [TrainConfig, ExtractConfig, DemoConfig, PlotConfig])
def test_every_setting_is_explained(cls):
    import inspect

    source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
    for field in fields(cls):
        line = source.index(f"    {field.name}: ")
        assert '"""' in source[line:].splitlines()[1], field.name


def test_errors_are_one_harmless_line():
    assert str(UserError("key a\n\x1b[31mb\x85c is λ – no")) == "key a??[31mb?c is λ – no"
