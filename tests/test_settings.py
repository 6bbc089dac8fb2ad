"""Settings: strict YAML, ranges, contradictions, recipes."""

import json
import time
import tracemalloc
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
import pytest
import yaml

from minsae_jax.__main__ import VERBS
from minsae_jax.eeg.synthetic import DemoConfig
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.errors import UserError
from minsae_jax.integrity.config import VerifyConfig
from minsae_jax.sae.config import TrainConfig
from minsae_jax.settings import (
    NAMES_ELSEWHERE,
    AtLeastOne,
    NonNegative,
    Positive,
    Range,
    Seed,
    UnitInterval,
    check_settings,
    did_you_mean,
    from_dict,
    load_values,
    missing_settings,
    read_yaml,
    to_dict,
)

SECTIONS = {name: verb.settings for name, verb in VERBS.items()}


@pytest.fixture
def load(tmp_path):
    """Return the settings of one section of a YAML text; other sections are checked too."""

    def run(text, cls=TrainConfig):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        name = next(name for name, section in SECTIONS.items() if section is cls)
        return from_dict(cls, load_values(path, SECTIONS).get(name, {}))

    return run


def test_each_verb_has_a_section(load):
    text = "extract: {split: [train, val]}\ntrain: {lr: 1e-5, lambda_sparsity: [1, 2.5]}"
    settings = load(text)
    assert settings.lr == (1e-5,)  # PyYAML alone reads text
    assert settings.lambda_sparsity == (1.0, 2.5)
    assert load(text, DemoConfig) == DemoConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {}", "x.yaml: unknown section 'trian'; did you mean 'train'?"),
        (
            "train: {lamda_sparsity: 5}",
            "x.yaml, section train: unknown key 'lamda_sparsity'; did you mean 'lambda_sparsity'?",
        ),
        ("train: {num_steps: 1.5}", "num_steps must be a whole number, got 1.5"),
        ("train: {seed: '0,1'}", "values of seed must be separated by spaces (0 1) or, in YAML"),
        ("train: {num_steps: true}", "num_steps must be a whole number, got True"),
        ("train: {lr: fast}", "lr must be a number or auto, got 'fast'"),
        ("train: {lr: '1e-3'}", "lr must be a number or auto, got '1e-3'"),
        ("train: {overwrite: 1}", "overwrite must be true or false, got 1"),
        ("train: {store: 5}", "store must be text, got 5"),
        (
            "train: {recipe: april2023}",
            "recipe must be one of april2024, minsae, modern, got 'april2023'; "
            "did you mean 'april2024'?",
        ),
        ("train: {lr: 1, lr: 2}", "x.yaml is not valid YAML: duplicate key 'lr'"),
        ("train: {store: 2024-13-45}", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
        ("train: [1]", "section train must contain settings, got [1]"),
        ("[1]", "does not contain a YAML mapping"),
        ("train: {", "is not valid YAML"),
        (
            "train: {recipe: minsae, batch_size: 5}",
            "--batch_size",
        ),
        (
            "extract: {cache_layer: x}",
            "section extract: cache_layer must be a whole number or all, got 'x'",
        ),  # another verb's section is checked too
    ],
)
def test_invalid_yaml_names_the_mistake(load, text, message):
    with pytest.raises(UserError) as e:
        load(text)
    assert message in str(e.value)


def test_anchors_and_merges(load):
    assert load("extract: &x {batch_size: 5}\ntrain: {<<: *x, lr: 1}").batch_size == 5


def test_too_large_yaml_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("#" * 1_000_000)
    with pytest.raises(UserError, match=r"x\.yaml is too large .*: 1,000,000 bytes"):
        read_yaml(path)


@pytest.mark.parametrize("text", [r"a\0b", r"\ud800"])
def test_text_that_no_path_can_have_is_refused(load, text):
    with pytest.raises(UserError, match="store contains characters that no path can have"):
        load(f'train: {{store: "{text}"}}')


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_values(tmp_path / "nowhere.yaml", SECTIONS)


def test_number_without_sign_or_point_is_read(load):
    settings = load("train: {num_steps: 1e4, lr: [1e-5, 2E3, 5], adam_eps: 1}")
    assert settings.num_steps == 10_000
    assert type(settings.num_steps) is int
    assert settings.lr == (1e-5, 2000.0, 5.0)
    assert type(settings.adam_eps) is float


def test_automatic_learning_rate_is_read(load):
    assert load("train: {lr: auto}").lr == ("auto",)
    assert load("train: {lr: [auto, 1e-3]}").lr == ("auto", 1e-3)


def merges(levels: int, each: int = 9) -> str:
    """Return YAML in which each mapping merges the one before `each` times."""
    aliases = [", ".join([f"*a{i - 1}"] * each) for i in range(1, levels)]
    return "\n".join(
        ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{a}]}}" for i, a in enumerate(aliases, start=1))]
    )


def aliases(levels: int) -> str:
    """Return YAML of lists that each contain the one before nine times: 9^levels numbers."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 [1]", *lines])


@pytest.mark.parametrize(
    "text",
    [
        merges(6),
        merges(12),
        merges(200),
        merges(20, each=2),
        "a: &a {<<: *a}",
        "a: &a {b: {<<: *a}}",
        "train: {lr: 0x" + "f" * 5000 + "}",
        f"{aliases(12)}\ntrain: {{lr: *a11}}",
        f"{aliases(12)}\ntrain: *a11",
    ],
    ids=["6", "12", "200", "two", "itself", "outer", "digits", "list", "section"],
)
def test_yaml_bomb_is_refused_in_little_time_and_memory(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    sections = SECTIONS | {f"a{i}": TrainConfig for i in range(12)}
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as e:
            load_values(path, sections)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 5
    assert peak < 2**24
    assert len(str(e.value)) < 500


def test_moderate_merges_are_read(tmp_path):
    """Neither a chain of merges nor 9^3 merged keys is a bomb."""
    path = tmp_path / "x.yaml"
    path.write_text(f"{merges(4)}\nb: {{<<: *a3, y: 2}}")
    assert read_yaml(path)["b"] == {"x": 1, "y": 2}
    path.write_text(merges(100, each=1))
    assert read_yaml(path)["a99"] == {"x": 1}


def test_required_settings_are_named(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Reading:
        root_path: str
        layer: int = -1

    assert missing_settings(Reading, {"layer": 0}) == ["root_path"]
    assert from_dict(Reading, {"root_path": "x"}) == Reading(root_path="x")
    with pytest.raises(UserError, match="missing settings: root_path"):
        from_dict(Reading, {})
    path = tmp_path / "x.yaml"
    path.write_text("reading: {layer: 1}")
    assert load_values(path, {"reading": Reading}) == {"reading": {"layer": 1}}


@dataclass(frozen=True, kw_only=True)
class Ranges:
    count: Annotated[int, AtLeastOne] = 1
    factor: Annotated[tuple[float, ...], Positive] = (1.0,)
    limit: Annotated[int, AtLeastOne] | None = None
    share: Annotated[float, UnitInterval] = 0.5
    decay: Annotated[float, Range(min=0, below=1)] = 0.9
    penalty: Annotated[float, NonNegative] = 0.0
    seed: Annotated[int, Seed] = 0
    layers: tuple[Annotated[int, AtLeastOne] | Literal["all"], ...] = ("all",)

    def __post_init__(self):
        check_settings(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"count": 10**60}, "--count must be finite, got 1000"),
        ({"factor": [1, 0]}, "--factor must be above 0, got 0.0"),
        ({"factor": [1, float("inf")]}, "--factor must be finite, got inf"),
        ({"factor": [float("nan")]}, "--factor must be finite, got nan"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"share": 1.5}, "--share must be at least 0 and at most 1, got 1.5"),
        ({"decay": 1}, "--decay must be at least 0 and below 1, got 1.0"),
        ({"penalty": -1e-9}, "--penalty must be at least 0, got -1e-09"),
        ({"seed": 2**32}, "--seed must be at least 0 and at most 4,294,967,295, got 4294967296"),
        ({"layers": ["all", 0]}, "--layers must be at least 1, got 0"),
    ],
)
def test_range_message_says_limit_and_value(values, message):
    with pytest.raises(UserError) as e:
        from_dict(Ranges, values)
    assert str(e.value).startswith(message)


def test_single_value_is_refused_where_there_can_be_several():
    """From Python, where annotations are not checked as they are in these tests."""
    config = ExtractConfig(root_path="x")
    object.__setattr__(config, "split", "train")
    with pytest.raises(UserError, match=r"split must be a tuple such as \('train',\), got 'train'"):
        check_settings(config)


def test_values_of_python_become_those_of_yaml():
    from_python = Ranges(
        count=np.int64(3),
        factor=np.geomspace(1, 100, 3),
        share=np.float32(0.25),
        seed=np.array(7),
        layers=range(1, 3),
    )
    values = {"count": 3, "factor": [1.0, 10.0, 100.0], "share": 0.25, "seed": 7, "layers": [1, 2]}
    assert to_dict(from_python) == to_dict(Ranges()) | values
    assert yaml.safe_load(yaml.safe_dump(to_dict(from_python))) == to_dict(from_python)
    hash(from_python)
    assert VerifyConfig(path=("runs", "stores")).path == ("runs", "stores")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "3"}, "count must be a whole number, got '3'"),
        ({"count": 1.5}, "count must be a whole number, got 1.5"),
        ({"factor": [1, -1]}, "--factor must be above 0, got -1.0"),
        ({"factor": None}, "factor must be a number, got None"),
        ({"layers": ["al"]}, "layers must be a whole number or all, got 'al'"),
    ],
)
def test_wrong_types_from_python_are_user_errors(values, message):
    with pytest.raises(UserError) as e:
        Ranges(**values)
    assert str(e.value).startswith(message)


def test_values_of_numpy_and_paths_become_plain(tmp_path):
    """Settings made in a notebook; JSON and YAML have none of these types."""
    given = {
        "store": tmp_path / "store",
        "lambda_sparsity": np.array([0.5, 2.0]),
        "lr": (np.float64(0.5), "auto"),
        "seed": tuple(np.arange(2)),
        "kind": ["relu"],
        "num_steps": np.int64(3),
        "deterministic": np.bool_(True),
    }
    settings = TrainConfig()
    for name, value in given.items():
        # Annotations are checked in tests when settings are made, and otherwise not.
        object.__setattr__(settings, name, value)
    check_settings(settings)
    plain = TrainConfig(
        store=str(tmp_path / "store"),
        lambda_sparsity=(0.5, 2.0),
        lr=(0.5, "auto"),
        seed=(0, 1),
        kind=("relu",),
        num_steps=3,
        deterministic=True,
    )
    assert repr(settings) == repr(plain)
    assert json.loads(json.dumps(to_dict(settings))) == to_dict(plain)


def test_ranges_include_their_limits():
    largest = {"share": 1, "seed": 2**32 - 1, "limit": 1, "layers": [1, "all"]}
    assert from_dict(Ranges, largest).share == 1.0
    assert from_dict(Ranges, {"share": 0, "limit": None}).limit is None


def test_hint_only_at_similar_words():
    assert did_you_mean("split", ["split_seed", "store"]) == "; did you mean 'split_seed'?"
    assert did_you_mean("fly", ["train", "extract"]) == ""
    assert did_you_mean("x" * 10**6, ["train"]) == ""
    assert did_you_mean("learning_rate", ["lr", "lr_decay"]) == "; did you mean 'lr'?"


def test_names_elsewhere_are_those_of_settings_here():
    flags = {field.name for cls in (TrainConfig, ExtractConfig) for field in fields(cls)}
    assert set(NAMES_ELSEWHERE.values()) <= flags


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (TrainConfig, "seed", [2**32]),
        (TrainConfig, "seed", [-1]),
        (TrainConfig, "seed", []),
        (TrainConfig, "shuffle_seed", -1),
        (TrainConfig, "adam_eps", float("inf")),
        (TrainConfig, "beta2", 1.0),
        (TrainConfig, "lr", [-1e-3]),
        (TrainConfig, "lr", [float("nan")]),
        (TrainConfig, "lambda_sparsity", [1, 1]),
        (TrainConfig, "lambda_warmup", 1.5),
        (TrainConfig, "feature_dim_factor", [0]),
        (TrainConfig, "num_steps", 0),
        (TrainConfig, "batch_size", -1),
        (TrainConfig, "eval_window", 0),
        (TrainConfig, "dead_after", 2**31),
        (TrainConfig, "checkpoint_every", 0),
        (TrainConfig, "number_of_arrays", 2),  # of the other recipe
        (TrainConfig, "recon_weight", 2),
        (ExtractConfig, "batch_size", 0),
        (ExtractConfig, "max_batches", 0),
        (ExtractConfig, "split", []),
        (ExtractConfig, "split", ["val", "val"]),
        (DemoConfig, "minutes", float("inf")),
        (DemoConfig, "minutes", 0),
        (DemoConfig, "patients", 3),
        (DemoConfig, "seed", -1),
    ],
)
def test_value_out_of_range_is_named(cls, name, value):
    required = dict.fromkeys(missing_settings(cls, {}), "x")
    with pytest.raises(UserError, match=f"--{name}"):
        from_dict(cls, required | {name: value})


@pytest.mark.parametrize(("name", "value"), [("shuffle_seed", 1), ("lr_decay", 0.2)])
def test_setting_of_the_other_recipe_is_refused(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        from_dict(TrainConfig, {"recipe": "minsae", name: value})


def test_recipes_fill_in_their_numbers():
    april = TrainConfig().resolved()
    assert april.lambda_sparsity == (5.0,)
    assert april.lr == (5e-5,)
    assert april.batch_size == 4096
    assert april.lambda_warmup == 0.05
    assert april.lr_decay == 0.2
    assert april.max_grad_norm == 1.0
    assert april.decoder_norm == 0.1
    assert april.scale_tokens == 1_000_000
    minsae = TrainConfig(recipe="minsae").resolved()
    assert minsae.lambda_sparsity == (0.01,)
    assert minsae.lr == (1e-3,)
    assert minsae.num_steps == 10_720
    assert minsae.number_of_arrays == 1
    assert minsae.feature_dim_factor == (8.0,)
    assert minsae.recon_weight == 1.0
    assert minsae.eval_window == 50
    assert minsae.max_grad_norm is None
    assert TrainConfig(lr=(1e-4,)).resolved().lr == (1e-4,)


REQUIRED = {"feature": (0,)}  # settings without a default that are not texts


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig().resolved(),
        TrainConfig(recipe="minsae").resolved(),
        *(
            from_dict(cls, {name: REQUIRED.get(name, "x") for name in missing_settings(cls, {})})
            for cls in SECTIONS.values()
        ),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_settings_survive_yaml(settings):
    assert from_dict(type(settings), to_dict(settings)) == settings


def test_errors_are_one_printable_line():
    assert str(UserError("key a\n\x1b[31mb\x85c is λ – no")) == "key a??[31mb?c is λ – no"
