"""Settings of training and plotting, and the recipes.

`TrainConfig` has the flags, where None means "the recipe's value"; `TrainConfig.resolved()` fills
these in, and `TrainConfig.plan()` returns the resolved values for training, without None.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from minsae_jax.cli import Flag
from minsae_jax.eeg.recordings import OnBadRecording, Split
from minsae_jax.errors import UserError
from minsae_jax.sae.hyper import SPARSITY
from minsae_jax.settings import (
    AtLeastOne,
    NonNegative,
    Positive,
    Range,
    Seed,
    UnitInterval,
    Values,
    check_no_duplicates,
    check_settings,
    did_you_mean,
    from_dict,
    load_values,
    require,
    shown,
)

MAX_LISTED_RUNS = 5  # in an error
Recipe = Literal["april2024", "minsae", "modern"]
# The kinds that can be trained, each with the settings that can control its sparsity: the last one
# that is given does. A new kind adds a line here and in `sae/kinds/__init__.py`; that is not
# imported here since it needs JAX, which `--help` does not.
SPARSITY_SETTINGS: dict[str, tuple[str, ...]] = {
    "relu": ("lambda_sparsity",),
    "topk": ("k",),
    "batchtopk": ("k",),
    "jumprelu": ("lambda_sparsity", "target_l0"),
    "matryoshka": ("k",),
}


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """The store to train on, and its encoder."""

    heading: ClassVar[str] = "Activations"

    store: str = "embeddings/store"
    """Store to train on: the folder with the shards, or its parent with l{cache_layer}/."""
    cache_layer: Annotated[int, Flag(alias="layer")] = -1
    """Layer of the store to train on."""
    checkpoint_path: str | None = None
    """Encoder for --live, or to check that the store is from it."""
    config_path: str | None = None
    """That encoder's YAML, for .pth files that need one."""


@dataclass(frozen=True, kw_only=True)
class LiveFlags:
    """Recordings and encoder of activations that are computed during training.

    These are the settings of `ExtractConfig` that make sense without a store; `api.train` makes one
    of them.
    """

    heading: ClassVar[str] = "Live activations, without a store"

    live: bool = False
    """Compute activations from the recordings in --root_path while training."""
    root_path: str | None = None
    """Folder of the recordings."""
    model: str | None = None
    """A model that Braindecode runs, such as braindecode:LaBraM; --checkpoint_path is then a folder
    of its `save_pretrained` or a model of the Hugging Face Hub (default: the published weights)."""
    split: Split = "train"
    """Patients to use."""
    split_seed: Annotated[int, NonNegative] = 42
    """Seed of the patient split."""
    live_batch_size: Annotated[int, AtLeastOne] = 128
    """Windows that count as one shard file, of which a step of --recipe minsae takes
    --number_of_arrays."""
    force_revin: bool = False
    """Apply RevIN even if the encoder's settings disable it."""
    on_bad_recording: OnBadRecording = "error"
    """For unusable recordings: list them all and stop, or skip them."""
    allow_mismatch: bool = False
    """Accept recordings with another sampling rate, unit or channel names than the encoder's."""


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Values that a sweep combines."""

    heading: ClassVar[str] = "Sweep: every combination of these values is one member"

    kind: tuple[str, ...] = ()
    """Kinds of autoencoder: relu, topk, batchtopk, jumprelu, matryoshka, see docs/kinds.md
    (april2024 and minsae: relu; modern: batchtopk)."""
    lambda_sparsity: Annotated[tuple[float, ...], NonNegative] = ()
    """Weight λ of the penalty of relu and jumprelu (relu in april2024 and modern: 5, in minsae:
    0.01)."""
    k: Annotated[tuple[float, ...], Positive] = ()
    """Active features per token: of topk a whole number, of batchtopk and matryoshka on average
    (april2024, modern: 16, 32 and 64)."""
    target_l0: Annotated[tuple[float, ...], Positive] = ()
    """Active features per token that jumprelu is to reach, unless it has a λ (april2024, modern:
    16, 32 and 64)."""
    lr: Annotated[tuple[float | Literal["auto"], ...], NonNegative] = ()
    """Adam's learning rate; auto is 2e-4 √(16,384 / d_sae), for each size its value (april2024:
    5e-5; minsae: 1e-3; modern: auto)."""
    seed: Annotated[tuple[int, ...], Seed] = (0,)
    """Seed of the initial weights."""
    feature_dim_factor: Annotated[tuple[float, ...], Positive] = (8.0,)
    """Number of features, as a multiple of the encoder's d_model: d_sae / d_model."""
    init: str | None = None
    """Folder of a member whose weights every member starts from."""


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """The training procedure; None means the value of the recipe."""

    heading: ClassVar[str] = "Recipe"

    recipe: Recipe = "april2024"
    """april2024: Anthropic's April 2024 update (Scaling Monosemanticity); minsae: minSAE's loop;
    modern: BatchTopK with AuxK."""
    num_steps: Annotated[int | None, AtLeastOne] = None
    """Training steps (april2024, modern: 50,000; minsae: 10,720)."""
    batch_size: Annotated[int | None, AtLeastOne] = None
    """Tokens per step (april2024, modern: 4,096)."""
    shuffle_seed: Annotated[int | None, Seed] = None
    """Seed of the token order (april2024, modern: 0)."""
    number_of_arrays: Annotated[int | None, AtLeastOne] = None
    """Whole shard files per step, in order (minsae only: 1)."""
    recon_weight: Annotated[float | None, Positive] = None
    """Weight of the reconstruction error (minsae only: 1)."""
    scale_tokens: Annotated[int | None, AtLeastOne] = None
    """Tokens for measuring the input scale, E‖x‖ = √d_model (april2024, modern: 1,000,000)."""
    decoder_norm: Annotated[float | None, Positive] = None
    """Initial L2 norm of the decoder rows of relu and jumprelu (april2024, modern: 0.1)."""
    lambda_warmup: Annotated[float | None, UnitInterval] = None
    """Share of the steps over which λ rises linearly from 0 (april2024, modern: 0.05)."""
    lr_decay: Annotated[float | None, UnitInterval] = None
    """Share of the steps at the end in which lr falls linearly to 0 (april2024, modern: 0.2)."""
    max_grad_norm: Annotated[float | None, Positive] = None
    """L2 norm to which each member's gradient is clipped (april2024, modern: 1)."""
    jumprelu_penalty: Literal["tanh", "step"] = "tanh"
    """Penalty of jumprelu: tanh (Anthropic, January 2025) or step, the number of features."""
    matryoshka_shares: Annotated[tuple[float, ...], Range(above=0, max=1)] = (
        0.0625,
        0.125,
        0.25,
        0.5,
        1.0,
    )
    """Shares of d_sae in the prefixes of matryoshka, increasing to 1."""
    aux_dead_after: Annotated[int | None, Range(min=1, below=2**30)] = None
    """AuxK trains features, of all kinds but relu, that have not been active for this many tokens
    (default: 10 million, but at most --dead_after and a sixteenth of the run)."""
    beta1: Annotated[float, Range(min=0, below=1)] = 0.9
    """Adam's decay rate of the first moment."""
    beta2: Annotated[float, Range(min=0, below=1)] = 0.999
    """Adam's decay rate of the second moment."""
    adam_eps: Annotated[float, Positive] = 1e-8
    """Adam's ε, outside the square root."""


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Devices and precision."""

    heading: ClassVar[str] = "Devices"

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Number format of the factors of matrix products; sums and weights are float32. tf32 is for
    GPUs."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Load the whole store into the memory of the devices and gather batches there; auto: if it
    fits into a GPU's free memory."""
    mesh: str | None = None
    """Devices for members x devices for tokens, e.g. 4x2 (default: all devices)."""
    distributed: bool = False
    """Share the work with the other processes of a cluster; start each with the same command."""
    deterministic: bool = False
    """On GPU, use deterministic kernels only, so that a resumed run gives the same weights."""


@dataclass(frozen=True, kw_only=True)
class LogFlags:
    """Metrics, held-out measures and where they are logged."""

    heading: ClassVar[str] = "Metrics"

    eval_window: Annotated[int, AtLeastOne] = 50
    """Log metrics every N steps (metrics.csv, act_freqs.csv or .npy, TensorBoard)."""
    val_store: str | None = None
    """Store of held-out activations (default: store_val next to the train store, if it exists)."""
    eval_every: Annotated[int, Range(min=0)] = 1000
    """Measure on held-out tokens every N steps and at the end; 0 for never."""
    eval_tokens: Annotated[int, Range(min=2)] = 100_000
    """Number of held-out tokens, the same ones each time."""
    events_path: str | None = None
    """Folder of recordings with events.csv, to score features on the held-out patients' events and
    show them in TensorBoard whenever they are measured."""
    # Counts of tokens are int32: at most dead_after, plus at most dead_after in one step.
    dead_after: Annotated[int, Range(min=1, below=2**30)] = 10_000_000
    """A feature is dead if it has not been active for this many tokens (or since the start)."""
    wandb: bool = False
    """Log every member to W&B, project minSAE (requires pip install wandb)."""


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The folder of a run, and its checkpoints."""

    heading: ClassVar[str] = "Run folder"

    run_dir: str | None = None
    """Folder of the run (default: runs/{recipe})."""
    checkpoint_every: Annotated[int, AtLeastOne] = 1000
    """Write a checkpoint every N steps."""
    checkpoint_minutes: Annotated[float, Positive] = 10.0
    """Write a checkpoint also after this many minutes."""
    max_to_keep: Annotated[int, AtLeastOne] = 2
    """Number of checkpoints to keep."""
    overwrite: bool = False
    """Discard a run that is already in the folder."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunFlags, LogFlags, DeviceFlags, RecipeFlags, SweepFlags, LiveFlags, SourceFlags):
    """Train a sweep of sparse autoencoders, one for each combination of λ, lr, seed and size.

    `minsae train --help` explains all settings.
    """

    def __post_init__(self) -> None:
        check_settings(self)
        check_no_duplicates(
            self, "kind", "lambda_sparsity", "k", "target_l0", "lr", "seed", "feature_dim_factor"
        )
        for name in ("seed", "feature_dim_factor"):
            require(bool(getattr(self, name)), f"--{name} requires at least one value")
        mesh_is_valid = self.mesh is None or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.mesh)
        require(bool(mesh_is_valid), f"--mesh must be two device counts like 4x2, got {self.mesh}")
        if self.live:
            require(bool(self.root_path), "--live requires --root_path")
            require(self.resident != "on", "--resident on requires a store, not --live")
            is_combined = self.model is not None and self.config_path is not None
            require(not is_combined, "--config_path cannot be combined with --model")
        else:
            for field in dataclasses.fields(LiveFlags):
                is_default = getattr(self, field.name) == field.default
                require(is_default, f"--{field.name} requires --live")
        names = {name for defaults in _RECIPE_DEFAULTS.values() for name in defaults}
        for name in sorted(names - _RECIPE_DEFAULTS[self.recipe].keys()):
            is_given = getattr(self, name) not in (None, ())
            recipes = [recipe for recipe, defaults in _RECIPE_DEFAULTS.items() if name in defaults]
            require(not is_given, f"--{name} requires --recipe {' or '.join(recipes)}")
        self._check_kinds()

    @property
    def encoder_path(self) -> str | None:
        """The encoder that commands after training load; None if it is unknown, or of --model."""
        # With --model, the checkpoint is the weights of that model.
        return self.checkpoint_path if self.model is None else None

    def sparsity_setting(self, kind: str) -> str:
        """Return the name of the setting that controls the sparsity of a kind in this run."""
        names = SPARSITY_SETTINGS[kind]
        given = [name for name in names if getattr(self, name)]
        if given:
            return given[-1]
        # By default a target, since no λ suits every d_model and data; the penalty `step` has a λ.
        return names[0] if self.jumprelu_penalty == "step" else names[-1]

    def _check_kinds(self) -> None:
        kinds = self.kind or _RECIPE_DEFAULTS[self.recipe]["kind"]
        if self.recipe == "minsae":
            require(kinds == ("relu",), "--recipe minsae trains --kind relu only")
        known = ", ".join(SPARSITY_SETTINGS)
        for kind in kinds:
            hint = did_you_mean(kind, SPARSITY_SETTINGS)
            is_known = kind in SPARSITY_SETTINGS
            require(is_known, f"--kind must be one of {known}, got {shown(kind)}{hint}")
        used = {self.sparsity_setting(kind) for kind in kinds}
        for name in SPARSITY:
            is_given = bool(getattr(self, name))
            require(name in used or not is_given, f"--{name} requires --kind {_kinds_with(name)}")
        shares = self.matryoshka_shares
        increases = all(a < b for a, b in itertools.pairwise(shares))
        require(
            bool(shares) and increases and shares[-1] == 1,
            f"--matryoshka_shares must increase to 1, got {' '.join(map(str, shares))}",
        )

    def resolved(self) -> "TrainConfig":
        """Return these settings with the recipe's values where none were given."""
        defaults = _RECIPE_DEFAULTS[self.recipe] | {"run_dir": f"runs/{self.recipe}"}
        kinds = self.kind or defaults["kind"]
        unused = set(SPARSITY) - {self.sparsity_setting(kind) for kind in kinds}
        # Settings with several values are () if they are not given.
        missing = {
            name: value
            for name, value in defaults.items()
            if name not in unused and getattr(self, name) in (None, ())
        }
        return dataclasses.replace(self, **missing)

    def plan(self) -> "TrainPlan":
        """Return the resolved settings in the form that the training code uses."""
        r = self.resolved()
        is_minsae = r.recipe == "minsae"
        # Settings of the other recipe are off: 0, or 1 for a weight.
        num_steps = r.num_steps or 0
        batch_size = r.batch_size or 0
        # 10 million tokens as in Gao et al. (2024) are more than a short run has.
        share_of_run = num_steps * batch_size // 16
        aux_dead_after = r.aux_dead_after or min(10_000_000, max(share_of_run, 1))
        optimizer = OptimizerPlan(
            num_steps=num_steps,
            lambda_warmup_steps=num_steps * (r.lambda_warmup or 0.0),
            lr_decay_steps=num_steps * (r.lr_decay or 0.0),
            max_grad_norm=r.max_grad_norm,
            beta1=r.beta1,
            beta2=r.beta2,
            eps=r.adam_eps,
        )
        return TrainPlan(
            config=r,
            run_dir=Path(r.run_dir or ""),
            batch_size=batch_size,
            shuffle_seed=r.shuffle_seed or 0,
            number_of_arrays=r.number_of_arrays or 0,
            scale_tokens=r.scale_tokens or 0,
            mean_over_d_model=is_minsae,
            recon_weight=r.recon_weight or 1.0,
            tied_init=not is_minsae,
            decoder_norm=r.decoder_norm or 0.0,
            logs_weighted_l1=is_minsae,
            aux_dead_after=min(aux_dead_after, r.dead_after),
            optimizer=optimizer,
        )


@dataclass(frozen=True)
class OptimizerPlan:
    """Adam and the schedules of λ and lr."""

    num_steps: int
    lambda_warmup_steps: float  # λ rises linearly from 0; 0 for a constant λ
    lr_decay_steps: float  # at the end lr falls linearly to 0; 0 for a constant lr
    max_grad_norm: float | None  # None: no clipping
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class TrainPlan:
    """Resolved settings of a run. Recipes differ in these values only, never in code."""

    config: TrainConfig  # as written to config.yaml
    run_dir: Path
    batch_size: int  # tokens
    shuffle_seed: int
    number_of_arrays: int  # whole shard files per batch, as minSAE reads them; 0 to shuffle tokens
    scale_tokens: int  # tokens for measuring the input scale; 0 for no scaling
    mean_over_d_model: bool  # in the mse
    recon_weight: float
    tied_init: bool  # else torch's defaults
    decoder_norm: float  # of the tied initialisation
    aux_dead_after: int  # tokens without activity after which AuxK trains a feature
    logs_weighted_l1: bool  # metrics.csv has λ * l1, as minSAE logs it
    optimizer: OptimizerPlan


_APRIL2024: Values = {
    "kind": ("relu",),
    "lambda_sparsity": (5.0,),
    "k": (16.0, 32.0, 64.0),
    "target_l0": (16.0, 32.0, 64.0),
    "lr": (5e-5,),
    "num_steps": 50_000,
    "batch_size": 4096,
    "lambda_warmup": 0.05,
    "lr_decay": 0.2,
    "max_grad_norm": 1.0,
    "decoder_norm": 0.1,
    "scale_tokens": 1_000_000,
    "shuffle_seed": 0,
}
_RECIPE_DEFAULTS: dict[str, Values] = {
    "april2024": _APRIL2024,
    "modern": _APRIL2024 | {"kind": ("batchtopk",), "lr": ("auto",)},
    "minsae": {
        "kind": ("relu",),
        "lambda_sparsity": (0.01,),
        "lr": (1e-3,),
        "num_steps": 10_720,
        "number_of_arrays": 1,
        "recon_weight": 1.0,
    },
}


def _kinds_with(setting: str) -> str:
    """Return the kinds that have a sparsity setting, as an error lists them."""
    kinds = []
    for kind, names in SPARSITY_SETTINGS.items():
        if setting in names:
            preferred = [f"--{name}" for name in names[names.index(setting) + 1 :]]
            kinds.append(" without ".join([kind, *preferred]))
    return " or ".join(kinds)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Plot the metrics of a run over its steps, and animate the densities of its features.

    `minsae plot --help` explains all settings.
    """

    run: str
    """Folder of the run, finished or not."""
    out: str | None = None
    """Folder for the plots (default: plots/ in the run)."""

    def __post_init__(self) -> None:
        check_settings(self)


def hint_at_runs(folder: Path) -> str:
    """Return a hint at the runs in a folder, or "" if there are none."""
    names = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    return f"; runs in it: {', '.join(names[:MAX_LISTED_RUNS])}" if names else ""


def run_of(member: str | Path) -> Path | None:
    """Return the finished run that a member's folder is in; None for an SAE of no such run."""
    run = Path(member).resolve().parent.parent
    # Imported SAEs can be in ./members, beside ./checkpoints and the config.yaml of an encoder.
    is_run = (run / "sweep.csv").is_file() and (run / "config.yaml").is_file()
    return run if is_run else None


def load_run_config(run: Path) -> TrainConfig:
    """Read the settings that a run was started with from its config.yaml."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} does not contain a run: config.yaml is missing{hint_at_runs(run)}")
    return from_dict(TrainConfig, load_values(path, {"train": TrainConfig}).get("train", {}))
