"""Settings of extraction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minsae_jax.eeg.recordings import OnBadRecording, Split
from minsae_jax.settings import require, require_positive


@dataclass(frozen=True)
class ExtractConfig:
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
        require_positive(self, "batch_size", "max_batches")
        require(self.out != "", "--out must name a folder")
        require(len(self.cache_layer) > 0, "--cache_layer needs at least one layer")
        require(
            self.cache_layer == ("all",) or "all" not in self.cache_layer,
            "--cache_layer all stands for every layer",
        )
        require(len(self.split) > 0, "--split needs at least one of train, val, test, all")
        require(
            len(set(self.split)) == len(self.split),
            f"--split names a split twice: {' '.join(self.split)}",
        )
        require(self.split_seed >= 0, f"--split_seed must be 0 or more, but is {self.split_seed}")

    def store(self, split: Split, layer: int) -> Path:
        """The folder that holds the shards of a split and layer."""
        out = "embeddings/store" if self.out is None else self.out.rstrip("/") or "/"
        is_named = self.out is not None and len(self.split) == 1
        return Path(out if is_named or split == "train" else f"{out}_{split}") / f"l{layer}"
