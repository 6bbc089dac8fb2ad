"""Settings: strict YAML, ranges, contradictions, recipes."""

from dataclasses import fields

import pytest

from minsae_jax.config import Demo, Extract, Plot, Train, UserError, from_dict, load_settings, to_dict


@pytest.fixture
def load(tmp_path):
    def run(text, cls=Train):
        (tmp_path / "x.yaml").write_text(text)
        return load_settings(cls, tmp_path / "x.yaml")

    return run


def test_a_section_a_verb(load):
    text = "extract: {cache_layer: 1, split: [train, val]}\ntrain: {lr: 1e-5, lambda_sparsity: [1, 2.5]}"
    settings = load(text)
    assert settings.lr == (1e-5,)  # PyYAML alone reads text
    assert settings.lambda_sparsity == (1.0, 2.5)
    assert load(text, Extract).split == ("train", "val")
    assert load(text, Demo) == Demo()


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
        ("train: {recipe: april2023}", "recipe must be one of april2024, minsae, but is 'april2023'"),
        ("train: {lr: 1, lr: 2}", "x.yaml cannot be read as YAML: key 'lr' stands twice"),
        ("train: {store: 2024-13-45}", "cannot be read as YAML"),
        ("[" * 3000, "cannot be read as YAML"),
        ("train: [1]", "section train must hold settings"),
        ("[1]", "holds no YAML mapping"),
        ("train: {", "cannot be read as YAML"),
        ("train: {recipe: minsae, batch_size: 5}", "--batch_size has no meaning under --recipe minsae"),
        ("extract: {cache_layer: x}", "in section extract"),  # another verb's section is checked too
    ],
)
def test_slips_are_named(load, text, told):
    with pytest.raises(UserError) as e:
        load(text)
    assert told in str(e.value)


def test_anchors_and_merges(load):
    assert load("extract: &x {batch_size: 5}\ntrain: {<<: *x, lr: 1}").batch_size == 5


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_settings(Train, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (Train, {"seed": [2**32]}), (Train, {"adam_eps": float("inf")}),
        (Train, {"recipe": "minsae", "shuffle_seed": 1}),
        (Demo, {"minutes": float("inf")}), (Train, {"num_steps": 0}), (Train, {"batch_size": -1}),
        (Train, {"lr": [-1e-3]}),
        (Train, {"lr": [float("nan")]}),
        (Train, {"lambda_sparsity": [1, 1]}), (Train, {"feature_dim_factor": [0]}), (Train, {"seed": [-1]}),
        (Train, {"lambda_warmup": 1.5}), (Train, {"beta2": 1.0}), (Train, {"eval_window": 0}), (Train, {"seed": []}),
        (Train, {"number_of_arrays": 2}), (Train, {"recon_weight": 2}), (Train, {"recipe": "minsae", "lr_decay": 0.2}),
        (Train, {"dead_after": 2**31}), (Train, {"shuffle_seed": -1}), (Train, {"checkpoint_every": 0}),
        (Extract, {"batch_size": 0}), (Extract, {"max_batches": 0}), (Extract, {"split": []}),
        (Extract, {"split": ["val", "val"]}),
        (Demo, {"patients": 3}), (Demo, {"minutes": 0}), (Demo, {"seed": -1}),
    ],
)  # fmt: skip
def test_out_of_range(cls, values):
    with pytest.raises(UserError) as e:
        from_dict(cls, values)
    name = next(name for name in values if name != "recipe")
    assert f"--{name}" in str(e.value)


def test_recipes_fill_in_their_numbers():
    april, minsae = Train().resolved(), Train(recipe="minsae").resolved()
    assert (april.lambda_sparsity, april.lr, april.batch_size) == ((5.0,), (5e-5,), 4096)
    assert (april.lambda_warmup, april.lr_decay, april.max_grad_norm, april.decoder_norm) == (0.05, 0.2, 1.0, 0.1)
    assert april.scale_tokens == 1_000_000
    assert (minsae.lambda_sparsity, minsae.lr, minsae.num_steps, minsae.number_of_arrays) == (
        (0.01,),
        (1e-3,),
        10_720,
        1,
    )
    assert (minsae.feature_dim_factor, minsae.recon_weight, minsae.eval_window) == ((8.0,), 1.0, 50)
    assert minsae.max_grad_norm is None
    assert Train(lr=(1e-4,)).resolved().lr == (1e-4,)


@pytest.mark.parametrize("settings", [Train().resolved(), Train(recipe="minsae").resolved(), Extract(), Demo(), Plot()])
def test_settings_survive_yaml(settings):
    assert from_dict(type(settings), to_dict(settings)) == settings


@pytest.mark.parametrize("cls", [Train, Extract, Demo, Plot])
def test_every_setting_is_explained(cls):
    import inspect

    source = inspect.getsource(cls)
    for field in fields(cls):
        line = source.index(f"    {field.name}: ")
        assert '"""' in source[line:].splitlines()[1], field.name


def test_errors_are_one_harmless_line():
    assert str(UserError("key a\n\x1b[31mb\x85c is λ – no")) == "key a??[31mb?c is λ – no"
