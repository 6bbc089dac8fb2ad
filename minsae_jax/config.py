"""Every setting of every verb, and the strict YAML that they can be read from.

A file given by `--config` has one section a verb, named like it, whose keys are the flags:

    extract:
      root_path: tuhab_preprocessed
    train:
      lambda_sparsity: [2, 5, 10]
"""

import dataclasses
import difflib
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Split = Literal["train", "val", "test", "all"]
OnBadRecording = Literal["error", "skip"]
Settings = TypeVar("Settings")


class UserError(Exception):
    """Something that the user can put right, in one sentence: what is wrong, where, and what to do. It is one line, and
    harmless to a terminal, whatever names from a file it holds."""

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in sentence))


class Stopped(KeyboardInterrupt):
    """Asked to stop by a signal, which was done in good order; the sentence says how to go on."""

    def __init__(self, signal_number: int, sentence: str):
        super().__init__(sentence)
        self.exit_code = 128 + signal_number


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


LARGEST = 1e38  # float32 ends a little above


def _require_positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value is None or 0 < value < LARGEST, f"--{name} must be above 0 and finite, but is {value}")


@dataclass(frozen=True)
class Demo:
    """Write synthetic EEG with planted, labelled events in the layout of the TUH corpus."""

    root_path: str = "data/demo/tuhab_preprocessed"
    """Folder to write: recordings, file_lengths_map.csv and events.csv."""
    patients: int = 16
    """Number of patients, with one or two recordings each."""
    minutes: float = 6.0
    """Mean length of a recording, in minutes at 100 Hz; lengths vary by a quarter."""
    seed: int = 0
    """Seed of everything random in the recordings."""
    overwrite: bool = False
    """Replace a folder written before with other settings."""

    def __post_init__(self) -> None:
        _require(
            self.patients >= 10, f"--patients must be 10 or more, so that no split is empty, but is {self.patients}"
        )
        _require(0.5 <= self.minutes <= 10_000, f"--minutes must be from 0.5 to 10,000, but is {self.minutes}")
        _require(self.seed >= 0, f"--seed must be 0 or more, but is {self.seed}")


@dataclass(frozen=True)
class Extract:
    """Run recordings through the encoder and store the activations of its layers."""

    root_path: str | None = None
    """Folder of the recordings and of file_lengths_map.csv."""
    checkpoint_path: str | None = None
    """A converted encoder (a folder), or a PyTorch .pth, which is then converted in memory."""
    config_path: str | None = None
    """The encoder's YAML: needed by most .pth files, and only checked against a converted encoder."""
    cache_layer: tuple[int | Literal["all"], ...] = (-1,)
    """Layers whose outputs are stored, from 0; negative numbers count from the last, and all are all of them."""
    split: tuple[Split, ...] = ("train",)
    """Patients to take; several splits make several stores."""
    split_seed: int = 42
    """Seed of the patient split, as in tuh_patient_splits_seed_{seed}.pkl."""
    batch_size: int = 128
    """Windows a batch, and so a shard."""
    max_batches: int | None = None
    """Stop after so many batches of each split."""
    out: str | None = None
    """Folder that holds l{layer}/ (default: embeddings/store for train, embeddings/store_{split} for the others; with
    several splits the same is made of the name given)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format on disk; readers give float32."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the layers' products are computed in; sums and norms stay float32. bfloat16 is for GPUs."""
    on_bad_recording: OnBadRecording = "error"
    """What to do about recordings that cannot be used: list them all and stop, or leave them out (the manifest says
    which and why)."""
    distributed: bool = False
    """Share the work with the other processes of a cluster, each started with the same command."""
    force_revin: bool = False
    """Normalise with RevIN also where the encoder's settings say no, as the reference's embed.py does."""
    overwrite: bool = False
    """Discard a store written before with other settings."""

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size", "max_batches")
        _require(self.out != "", "--out must name a folder")
        _require(len(self.cache_layer) > 0, "--cache_layer needs at least one layer")
        _require(
            self.cache_layer == ("all",) or "all" not in self.cache_layer, "--cache_layer all stands for every layer"
        )
        _require(len(self.split) > 0, "--split needs at least one of train, val, test, all")
        _require(len(set(self.split)) == len(self.split), f"--split names a split twice: {' '.join(self.split)}")
        _require(self.split_seed >= 0, f"--split_seed must be 0 or more, but is {self.split_seed}")

    def store(self, split: Split, layer: int) -> Path:
        """The folder that holds the shards of a split and layer."""
        out = "embeddings/store" if self.out is None else self.out.rstrip("/") or "/"
        is_named = self.out is not None and len(self.split) == 1
        return Path(out if is_named or split == "train" else f"{out}_{split}") / f"l{layer}"


@dataclass(frozen=True)
class Train:
    """Train a sweep of sparse autoencoders, one member for each combination of λ, lr, seed and size."""

    recipe: Literal["april2024", "minsae"] = "april2024"
    """april2024: Anthropic's April 2024 update, as in Scaling Monosemanticity; minsae: the PyTorch minSAE's loop."""
    store: str = "embeddings/store"
    """Folder of shards, or the folder that holds l{cache_layer}/."""
    cache_layer: int = -1
    """Layer of the store to train on."""
    checkpoint_path: str | None = None
    """The encoder that the store must come from, where that is to be checked."""
    config_path: str | None = None
    """That encoder's YAML, where it is a .pth file that needs one."""
    live: bool = False
    """Take activations straight from the recordings in --root_path through the encoder: no store is needed."""
    root_path: str | None = None
    """Folder of the recordings (with --live, as are the next five)."""
    split: Split = "train"
    """Patients to take."""
    split_seed: int = 42
    """Seed of the patient split."""
    live_batch_size: int = 128
    """Windows that stand for a shard file; under minsae they are a step's batch."""
    force_revin: bool = False
    """Normalise with RevIN also where the encoder's settings say no."""
    on_bad_recording: OnBadRecording = "error"
    """What to do about recordings that cannot be used: list them all and stop, or leave them out."""
    run_dir: str | None = None
    """Folder of the run (default: runs/{recipe})."""
    init: str | None = None
    """A member's folder whose weights every member starts from."""

    lambda_sparsity: tuple[float, ...] = ()
    """λ, weight of the L1 penalty (default: 5; minsae 0.01)."""
    lr: tuple[float, ...] = ()
    """Adam's learning rate (default: 5e-5; minsae 1e-3)."""
    seed: tuple[int, ...] = (0,)
    """Seed of the initial weights."""
    feature_dim_factor: tuple[float, ...] = (8.0,)
    """d_sae / d_model."""

    num_steps: int | None = None
    """Steps of all members (default: 50,000; minsae 10,720)."""
    batch_size: int | None = None
    """Tokens a step, seen by all members; april2024 only (default: 4,096)."""
    number_of_arrays: int | None = None
    """Whole shard files a step, in order; minsae only (default: 1)."""
    recon_weight: float | None = None
    """Weight of the reconstruction error; minsae only (default: 1)."""
    shuffle_seed: int | None = None
    """Seed of the token order; april2024 only, since minsae does not shuffle (default: 0)."""

    lambda_warmup: float | None = None
    """Share of the steps over which λ rises linearly from 0 (default: 0.05; minsae 0)."""
    lr_decay: float | None = None
    """Share of the steps, at the end, over which lr falls linearly to 0 (default: 0.2; minsae 0)."""
    max_grad_norm: float | None = None
    """A member's gradient is clipped to this L2 norm (default: 1; minsae never clips)."""
    decoder_norm: float | None = None
    """Initial L2 norm of every decoder row; april2024 only (default: 0.1)."""
    scale_tokens: int | None = None
    """Tokens on which the input scale is measured, E‖x‖ = √d_model; april2024 only (default: 1,000,000)."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's ε, outside the root."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """What the products' factors are rounded to; sums, weights and Adam's state stay float32."""
    mesh: str | None = None
    """Devices for members x devices for tokens, as in 4x2 (default: all, as many for members as divide them)."""
    distributed: bool = False
    """Share the work with the other processes of a cluster, each started with the same command."""

    eval_window: int = 50
    """Steps a row of metrics.csv and act_freqs.csv."""
    val_store: str | None = None
    """Store of held-out activations (default: the train store's sibling, store_val for store, where it exists)."""
    eval_every: int = 1000
    """Steps from one measurement on held-out tokens to the next; the last step has one too. 0: none at all."""
    eval_tokens: int = 100_000
    """Held-out tokens that are measured, the same ones each time: all, where the store has fewer."""
    dead_after: int = 10_000_000
    """A feature is dead once it was silent for so many tokens (or since the start)."""
    checkpoint_every: int = 1000
    """Steps from one checkpoint to the next."""
    checkpoint_minutes: float = 10.0
    """Minutes after which one is due in any case."""
    max_to_keep: int = 2
    """Checkpoints kept."""
    wandb: bool = False
    """Send every member's metrics to W&B, project minSAE (needs pip install wandb)."""
    deterministic: bool = False
    """On GPU, use deterministic kernels only, so that an interrupted run ends with the very same weights."""
    overwrite: bool = False
    """Discard a run that is in the folder already."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "num_steps", "batch_size", "number_of_arrays", "recon_weight", "max_grad_norm", "decoder_norm",
            "scale_tokens", "adam_eps", "live_batch_size", "eval_window", "dead_after", "checkpoint_every",
            "checkpoint_minutes", "max_to_keep", "eval_tokens",
        )  # fmt: skip
        _require(self.eval_tokens > 1, f"--eval_tokens must be 2 or more, but is {self.eval_tokens}")
        _require(self.eval_every >= 0, f"--eval_every must be 0 or more, but is {self.eval_every}")
        mesh_is_whole = self.mesh is None or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.mesh)
        _require(bool(mesh_is_whole), f"--mesh must be two numbers of devices like 4x2, but is {self.mesh}")
        _require(self.dead_after < 2**30, f"--dead_after must be below {2**30:,}, but is {self.dead_after:,}")
        shuffle_seed = self.shuffle_seed or 0
        _require(0 <= shuffle_seed < 2**32, f"--shuffle_seed must be from 0 to {2**32 - 1:,}, but is {shuffle_seed}")
        for name in ("lambda_warmup", "lr_decay"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, f"--{name} is a share from 0 to 1, but is {value}")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"--{name} must be from 0 to below 1, but is {getattr(self, name)}")
        for name in ("lambda_sparsity", "lr", "seed", "feature_dim_factor"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), f"--{name} names a value twice: {' '.join(map(str, values))}")
            wrong = [v for v in values if not 0 <= v < (2**32 if name == "seed" else LARGEST)]
            limit = f"below {2**32:,}" if name == "seed" else "finite"
            _require(not wrong, f"--{name} must be {limit} and not below 0, but is {' '.join(map(str, wrong))}")
        _require(0 not in self.feature_dim_factor, "--feature_dim_factor must be above 0")
        _require(bool(self.seed) and bool(self.feature_dim_factor), "--seed and --feature_dim_factor need a value each")
        for name in ("root_path", "checkpoint_path"):
            _require(not self.live or bool(getattr(self, name)), f"--live needs --{name}")
        for name in ("root_path", "split", "split_seed", "live_batch_size", "force_revin", "on_bad_recording"):
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            _require(self.live or is_default, f"--{name} has no meaning without --live: leave it out")
        for name in _OTHER_RECIPE_ONLY[self.recipe]:
            _require(getattr(self, name) is None, f"--{name} has no meaning under --recipe {self.recipe}: leave it out")

    def resolved(self) -> "Train":
        """The same settings with the recipe's own numbers where none were given."""
        recipe = _RECIPES[self.recipe] | {"run_dir": f"runs/{self.recipe}"}
        return dataclasses.replace(self, **{k: v for k, v in recipe.items() if getattr(self, k) in (None, ())})


@dataclass(frozen=True)
class Plot:
    """Draw a run's course, finished or not: MSE and L1 over steps, and an animation of its features' densities."""

    run: str | None = None
    """Folder of the run."""
    out: str | None = None
    """Folder of the pictures (default: plots in that of the run)."""


_OTHER_RECIPE_ONLY = {
    "april2024": ("number_of_arrays", "recon_weight"),
    "minsae": (
        "batch_size",
        "lambda_warmup",
        "lr_decay",
        "max_grad_norm",
        "decoder_norm",
        "scale_tokens",
        "shuffle_seed",
    ),
}
_RECIPES: dict[str, dict[str, Any]] = {
    "april2024": {
        "lambda_sparsity": (5.0,), "lr": (5e-5,), "num_steps": 50_000, "batch_size": 4096, "lambda_warmup": 0.05,
        "lr_decay": 0.2, "max_grad_norm": 1.0, "decoder_norm": 0.1, "scale_tokens": 1_000_000,
        "shuffle_seed": 0,
    },
    "minsae": {
        "lambda_sparsity": (0.01,), "lr": (1e-3,), "num_steps": 10_720, "number_of_arrays": 1, "recon_weight": 1.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Evaluate:
    """Measure the members of a run on held-out recordings, recommend one, and show its features."""

    run: str | None = None
    """Folder of the finished run."""
    store: str | None = None
    """Store of the test patients (default: the train store's sibling, store_test for store)."""
    val_store: str | None = None
    """Store of the val patients, on which features are chosen for events (default: the sibling store_val)."""
    root_path: str | None = None
    """Folder of the recordings; labelled events are looked for in its events.csv."""
    checkpoint_path: str | None = None
    """The encoder that the members were trained on (default: what the run was trained with)."""
    config_path: str | None = None
    """That encoder's YAML, where it is a .pth file that needs one."""
    member: str | None = None
    """Evaluate this member alone, and show its features (default: all, and the recommended one's)."""
    substitution_windows: int = 64
    """Windows on which x̂ is put in the place of the layer's activations."""
    mask_ratio: float = 0.3
    """Share of the patches that is hidden there, as in gPatchTST's pretraining."""
    report: bool = True
    """Write the report of the member's features: report/index.html in the run."""
    w: int = 10
    """Patches shown to either side of an example."""
    top: int = 16
    """Strongest examples of a feature."""
    per_recording: int = 3
    """Of these, the most from one recording."""
    bands: tuple[str, ...] = ("delta 1-4", "theta 4-8", "alpha 8-13", "beta 13-25", "gamma 25-35")
    """Frequency bands, each a name and its limits in Hz."""
    seed: int = 0
    """Seed of masks, spans without an event, and random examples."""

    def __post_init__(self) -> None:
        _require_positive(self, "substitution_windows", "top", "per_recording")
        _require(0 < self.mask_ratio < 1, f"--mask_ratio must be between 0 and 1, but is {self.mask_ratio}")
        _require(self.w >= 0, f"--w must be 0 or more, but is {self.w}")
        _require(self.seed >= 0, f"--seed must be 0 or more, but is {self.seed}")
        for band in self.bands:
            match = _BAND.fullmatch(band)
            fits = match is not None and float(match[2]) < float(match[3])
            _require(fits, f'--bands must be a name and two limits in Hz like "alpha 8-13", but is {band!r}')

    def band_limits(self) -> tuple[tuple[str, float, float], ...]:
        """Name, lower and upper limit in Hz."""
        matches = [match for band in self.bands if (match := _BAND.fullmatch(band))]
        return tuple((m[1], float(m[2]), float(m[3])) for m in matches)


_BAND = re.compile(r"(\w+) (\d+\.?\d*)-(\d+\.?\d*)")
SECTIONS: dict[str, type] = {"demo": Demo, "extract": Extract, "train": Train, "evaluate": Evaluate, "plot": Plot}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.2), and refuses a key given twice, and mappings without end, as a
    few lines of merge keys can make."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 10_000:
            raise yaml.constructor.ConstructorError(problem="too large a mapping", problem_mark=node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key in keys if isinstance(key, str) and keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"key {twice[0]!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where there is none."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as e:  # PyYAML's constructors raise all kinds on values that are none
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no YAML mapping")
    return content


def load_settings(cls: type[Settings], path: str | Path) -> Settings:
    """The settings of one verb from the section of that name. All sections are checked, so that no slip hides."""
    content = read_yaml(path)
    _refuse_unknown(content, list(SECTIONS), f"{path}: unknown section")
    settings: dict[str, Any] = {}
    for name, section in content.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: section {name} must hold settings, but is {section!r}")
        try:
            settings[name] = from_dict(SECTIONS[name], section)
        except UserError as e:
            raise UserError(f"{path}: {e}, in section {name}") from None
    name = next(name for name, section_cls in SECTIONS.items() if section_cls is cls)
    return settings.get(name, cls())


def from_dict(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """A settings dataclass from plain values of exactly the right types (a whole number passes as a float)."""
    hints = get_type_hints(cls)
    _refuse_unknown(values, list(hints), "unknown key")
    return cls(**{name: _coerce(value, hints[name], name) for name, value in values.items()})


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values that `from_dict` and YAML take."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def _refuse_unknown(given: dict[str, Any], known: list[str], what: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise UserError(f"{what} {key!r}, did you mean {close[0]!r}?")


def _coerce(value: Any, hint: Any, name: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fits = next((a for a in kinds if type(value) is a or value in get_args(a)), kinds[0])
        return _coerce(value, fits, name)
    if origin is tuple:
        return tuple(_coerce(v, args[0], name) for v in (value if isinstance(value, list) else [value]))
    if origin is Literal:
        if value in args and type(value) is type(args[0]):
            return value
        raise UserError(f"{name} must be one of {', '.join(map(str, args))}, but is {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{name} must be {words[hint]}, but is {value!r}")
    return value
