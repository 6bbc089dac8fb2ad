"""Settings of extraction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from minsae_jax.cli import Flag
from minsae_jax.eeg.recordings import OnBadRecording
from minsae_jax.eeg.splits import Split
from minsae_jax.settings import (
    AtLeastOne,
    NonNegative,
    check_no_duplicates,
    check_settings,
    require,
)

DEFAULT_OUT = "embeddings/store"


@dataclass(frozen=True, kw_only=True)
class RecordingsChoice:
    """Recordings to extract activations from."""

    heading: ClassVar[str] = "Recordings"

    root_path: str
    """Folder of the recordings and of file_lengths_map.csv."""
    split: tuple[Split, ...] = ("train",)
    """Patients to read; several splits make several stores."""
    split_seed: Annotated[int, NonNegative] = 42
    """Seed of the patient split, as in tuh_patient_splits_seed_{seed}.pkl."""
    max_batches: Annotated[int | None, AtLeastOne] = None
    """Stop after this many batches of each split."""
    on_bad_recording: OnBadRecording = "error"
    """Recordings that cannot be used: list them all and stop (error), or leave them out (skip)."""


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """The encoder and its layers."""

    heading: ClassVar[str] = "Encoder"

    checkpoint_path: str | None = None
    """A converted encoder (a folder), or a PyTorch .pth, which is converted in memory; required
    unless --model is given."""
    model: str | None = None
    """A model that Braindecode runs, such as braindecode:LaBraM. --checkpoint_path is then a folder
    of its `save_pretrained` or a model of the Hugging Face Hub (default: the published weights)."""
    config_path: str | None = None
    """The encoder's YAML: most .pth files need it; a converted encoder is checked against it."""
    allow_mismatch: bool = False
    """Accept recordings with another sampling rate, unit or channel names than the encoder's."""
    force_revin: bool = False
    """Apply RevIN even if the encoder's settings disable it, as the reference's embed.py does."""
    cache_layer: Annotated[tuple[int | Literal["all"], ...], Flag(alias="layer")] = (-1,)
    """Layers to store, from 0; negative numbers count from the end; `all` for every layer."""


@dataclass(frozen=True, kw_only=True)
class StoreOutput:
    """The stores to write."""

    heading: ClassVar[str] = "Output"

    out: str | None = None
    """Folder of the stores, in which each layer has a folder l{layer} (default: embeddings/store).
    Splits other than train add _{split} to it, unless --out is given for a single split."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format on disk; readers convert to float32."""
    overwrite: bool = False
    """Discard a store that was written with other settings."""


@dataclass(frozen=True, kw_only=True)
class ExtractCompute:
    """Processes, batches and precision of extraction."""

    heading: ClassVar[str] = "Compute"

    distributed: bool = False
    """Share the work with the other processes of a cluster, each started with the same command."""
    batch_size: Annotated[int, AtLeastOne] = 128
    """Windows per batch; every batch becomes one shard."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of the layers' products; sums and norms stay float32. tf32, bfloat16: for GPUs."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ExtractCompute, StoreOutput, EncoderChoice, RecordingsChoice):
    """Run recordings through the encoder and store the activations of its layers.

    `minsae extract --help` explains all settings.
    """

    def __post_init__(self) -> None:
        check_settings(self)
        check_no_duplicates(self, "split")
        require(self.out != "", "--out must be the name of a folder")
        is_combined = self.model is not None and self.config_path is not None
        require(not is_combined, "--config_path cannot be combined with --model")
        require(len(self.split) > 0, "--split requires at least one of train, val, test, all")
        require(len(self.cache_layer) > 0, "--cache_layer requires at least one layer")
        is_all = self.cache_layer == ("all",)
        require(
            is_all or "all" not in self.cache_layer,
            "--cache_layer all cannot be combined with other layers",
        )

    def store(self, split: Split, layer: int) -> Path:
        """Return the folder for the shards of a split and layer."""
        # Imports JAX, for which --help does not wait.
        from minsae_jax.activations.store import store_folder

        if self.out is None:
            return store_folder(DEFAULT_OUT, split, layer)
        # Of a single split, --out is the folder itself.
        return store_folder(self.out, split if len(self.split) > 1 else "train", layer)
