"""Settings of training and plotting, and the two recipes."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minsae_jax.eeg.recordings import OnBadRecording, Split
from minsae_jax.settings import LARGEST, load_sections, require, require_positive


@dataclass(frozen=True)
class TrainConfig:
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
        require_positive(
            self, "num_steps", "batch_size", "number_of_arrays", "recon_weight", "max_grad_norm", "decoder_norm",
            "scale_tokens", "adam_eps", "live_batch_size", "eval_window", "dead_after", "checkpoint_every",
            "checkpoint_minutes", "max_to_keep", "eval_tokens",
        )  # fmt: skip
        require(self.eval_tokens > 1, f"--eval_tokens must be 2 or more, but is {self.eval_tokens}")
        require(self.eval_every >= 0, f"--eval_every must be 0 or more, but is {self.eval_every}")
        mesh_is_whole = self.mesh is None or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.mesh)
        require(
            bool(mesh_is_whole),
            f"--mesh must be two numbers of devices like 4x2, but is {self.mesh}",
        )
        require(
            self.dead_after < 2**30,
            f"--dead_after must be below {2**30:,}, but is {self.dead_after:,}",
        )
        shuffle_seed = self.shuffle_seed or 0
        require(
            0 <= shuffle_seed < 2**32,
            f"--shuffle_seed must be from 0 to {2**32 - 1:,}, but is {shuffle_seed}",
        )
        for name in ("lambda_warmup", "lr_decay"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value <= 1, f"--{name} is a share from 0 to 1, but is {value}"
            )
        for name in ("beta1", "beta2"):
            require(
                0 <= getattr(self, name) < 1,
                f"--{name} must be from 0 to below 1, but is {getattr(self, name)}",
            )
        for name in ("lambda_sparsity", "lr", "seed", "feature_dim_factor"):
            values = getattr(self, name)
            require(
                len(set(values)) == len(values),
                f"--{name} names a value twice: {' '.join(map(str, values))}",
            )
            wrong = [v for v in values if not 0 <= v < (2**32 if name == "seed" else LARGEST)]
            limit = f"below {2**32:,}" if name == "seed" else "finite"
            require(
                not wrong,
                f"--{name} must be {limit} and not below 0, but is {' '.join(map(str, wrong))}",
            )
        require(0 not in self.feature_dim_factor, "--feature_dim_factor must be above 0")
        require(
            bool(self.seed) and bool(self.feature_dim_factor),
            "--seed and --feature_dim_factor need a value each",
        )
        for name in ("root_path", "checkpoint_path"):
            require(not self.live or bool(getattr(self, name)), f"--live needs --{name}")
        for name in (
            "root_path",
            "split",
            "split_seed",
            "live_batch_size",
            "force_revin",
            "on_bad_recording",
        ):
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            require(
                self.live or is_default, f"--{name} has no meaning without --live: leave it out"
            )
        for name in _OTHER_RECIPE_ONLY[self.recipe]:
            require(
                getattr(self, name) is None,
                f"--{name} has no meaning under --recipe {self.recipe}: leave it out",
            )

    def resolved(self) -> "TrainConfig":
        """The same settings with the recipe's own numbers where none were given."""
        recipe = _RECIPES[self.recipe] | {"run_dir": f"runs/{self.recipe}"}
        return dataclasses.replace(
            self, **{k: v for k, v in recipe.items() if getattr(self, k) in (None, ())}
        )


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


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Plot the metrics of a run over its steps, and animate the densities of its features."""

    run: str
    """Folder of the run, finished or not."""
    out: str | None = None
    """Folder for the plots (default: plots/ in the run)."""


def load_run_config(run: Path) -> TrainConfig:
    """Read the settings that a run was started with from its config.yaml."""
    return load_sections(run / "config.yaml", {"train": TrainConfig}).get("train", TrainConfig())
