"""The Python API: one function for each verb of the command line, and loading of encoders.

JAX and the other heavy libraries are imported by the functions that need them, since the command
line imports this module to print a --help. `encoder` and `sae` do not import each other; the
functions here join them.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minsae_jax.checksums import SUMS
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.synthetic import Demo, DemoConfig
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import EvaluateConfig, EvaluationInputConfig
from minsae_jax.evaluation.steering.config import SteerConfig
from minsae_jax.files import foreign_entries, make_folder
from minsae_jax.integrity.config import VerifyConfig
from minsae_jax.locks import lock_folder
from minsae_jax.report.view_config import ViewConfig
from minsae_jax.sae.config import PlotConfig, TrainConfig, load_run_config, run_of
from minsae_jax.settings import require

if TYPE_CHECKING:
    from minsae_jax.eeg.prepare.prepare import Prepared
    from minsae_jax.encoder.base import BaseEncoder
    from minsae_jax.encoder.extract import ExtractedStore
    from minsae_jax.encoder.native import NativeEncoder
    from minsae_jax.evaluation.feature_monitor import FeatureMonitor
    from minsae_jax.evaluation.results import Evaluation
    from minsae_jax.evaluation.steering.results import Steering
    from minsae_jax.integrity.verify import Verification
    from minsae_jax.report.view import ViewPage
    from minsae_jax.sae.plots import PlotFiles
    from minsae_jax.sae.run import Run


def _check_config(config: object, expected: type) -> None:
    """Raise UserError unless the settings of a verb are of its class."""
    name = expected.__name__
    require(
        isinstance(config, expected),
        f"expected minsae_jax.{name}(...), got settings of type {type(config).__name__}",
    )


def start(deterministic: bool = False, distributed: bool = False) -> None:
    """Set up JAX's devices; must come before anything else uses them.

    The functions below call this themselves. A program that loads an encoder first calls it before
    that if it runs on a cluster (`distributed`) or needs one CPU device for each core.
    """
    from minsae_jax.parallel.processes import start_jax

    start_jax(deterministic, distributed)


def load_encoder(path: str | Path, config_path: str | Path | None = None) -> "NativeEncoder":
    """Return the encoder in a converted folder, a PyTorch file or a folder of transformers.

    PyTorch weights are converted in memory, which requires torch. config_path: the encoder's YAML,
    which most .pth files need; a converted encoder is checked against it. Raises UserError if
    there is no encoder or it does not fit the YAML.
    """
    from minsae_jax.encoder import converted

    path = Path(path)
    # Both a converted encoder and a folder of transformers contain config.json; a path with none
    # is left to load_encoder, which says how to convert one.
    is_pytorch = path.suffix in (".pth", ".pt") or path.is_file()
    has_config = (path / "config.json").is_file()
    if (is_pytorch or has_config) and not converted.is_encoder(path):
        # Imports torch, which is not installed with the package.
        from convert.encoder import convert_encoder

        converted_encoder, _ = convert_encoder(path, config_path)
        return converted_encoder
    encoder = converted.load_encoder(path)
    if config_path:
        from convert.patchtst.architecture import check_yaml
        from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder

        if not isinstance(encoder, PatchTSTEncoder):
            raise UserError(f"--config_path is for PatchTST; {path} is another encoder")
        check_yaml(encoder.architecture, config_path)
    return encoder


def load_braindecode(
    name: str, weights: str | None = None, channels: Sequence[str] | None = None
) -> "BaseEncoder":
    """Return a foundation model of Braindecode as an encoder, for `extract` and `train`.

    name: LaBraM, CBraMod, BIOT, EEGPT or REVE. weights: a folder of its `save_pretrained`, or a
    model of the Hugging Face Hub; by default the published weights. channels: names of the
    recordings' channels, which LaBraM and REVE need. Raises UserError if Braindecode, the model or
    its weights are missing, or if it does not know a channel.
    """
    # Imports torch and Braindecode, which are not installed with the package.
    from convert import braindecode

    names = None if channels is None else tuple(channels)
    return braindecode.load_braindecode(name, weights, names)


def load_model(model: str, root_path: str, weights: str | None = None) -> "BaseEncoder":
    """Return the encoder of --model for the recordings in `root_path`.

    model: braindecode:NAME. weights: see `load_braindecode`. Raises UserError as it does, or if
    there are no recordings.
    """
    from minsae_jax.eeg.description import read_description
    from minsae_jax.eeg.recordings import recordings_folder

    library, _, name = model.partition(":")
    if library != "braindecode":
        raise UserError("--model must be braindecode:NAME, such as braindecode:LaBraM")
    description = read_description(recordings_folder(Path(root_path)))
    return load_braindecode(name, weights, description.channels)


def load_named_encoder(config: ExtractConfig | TrainConfig) -> "BaseEncoder | None":
    """Load the encoder that the settings name; None if they name none."""
    if config.model:
        return load_model(config.model, str(config.root_path), config.checkpoint_path)
    if config.checkpoint_path:
        return load_encoder(config.checkpoint_path, config.config_path)
    return None


def write_demo(config: DemoConfig) -> Demo:
    """Write synthetic recordings with labelled events."""
    _check_config(config, DemoConfig)
    from minsae_jax.eeg import synthetic

    return synthetic.write_demo(config)


def prepare(config: PrepareConfig) -> "Prepared":
    """Convert EEG files of any format that MNE reads into recordings with a description.

    Requires MNE (pip install "minsae_jax[eeg]"). Recordings that are up to date are kept. With
    several jobs, a script must call this below `if __name__ == "__main__":`, since the processes
    import it. Raises UserError if there are no EEG files, or, unless bad recordings are skipped, if
    one is bad.
    """
    _check_config(config, PrepareConfig)
    if find_spec("mne") is None or find_spec("threadpoolctl") is None:
        raise UserError('prepare requires MNE: pip install "minsae_jax[eeg]"')
    from minsae_jax.eeg.prepare import workers

    if config.jobs > 1:
        workers.start_imports()
    # After the line above, since this imports MNE too.
    from minsae_jax.eeg.prepare import prepare as preparation

    return preparation.prepare(config)


def extract(encoder: "BaseEncoder", config: ExtractConfig) -> list["ExtractedStore"]:
    """Write the activations of recordings into stores on disk, one for each split and layer.

    Raises UserError, before anything is written, if recordings do not fit the encoder, a folder
    contains another store, or the disk has too little room.
    """
    _check_config(config, ExtractConfig)
    from minsae_jax.encoder import extract as extraction

    start(distributed=config.distributed)
    return extraction.extract(encoder, config)


def train(config: TrainConfig, encoder: "BaseEncoder | None" = None) -> "Run":
    """Train a sweep of sparse autoencoders, or resume it, and return its results.

    encoder: by default that of `config.model` or `config.checkpoint_path`. With `config.live` it
    computes the activations; otherwise the store must come from it, if there is one. Raises
    UserError, before anything is written, if settings, store and run folder do not fit each other.

    With `config.distributed`, JAX aborts this process, with its own stack trace, when another one
    of the cluster is lost. Call `minsae_jax.cli.watch_cluster()` before to end in one line with
    exit code 2 instead, as the command does.
    """
    _check_config(config, TrainConfig)
    from minsae_jax.encoder.live import open_live
    from minsae_jax.sae import trainer

    start(config.deterministic, config.distributed)
    encoder = encoder or load_named_encoder(config)
    open_monitor = None
    if config.events_path or len(config.seed) > 1:
        open_monitor = partial(_open_feature_monitor, config, encoder)
    fingerprint = None if encoder is None else encoder.fingerprint
    open_source = None
    if config.live:
        if encoder is None:
            raise UserError("--live requires --checkpoint_path or --model")
        extract_config = ExtractConfig(
            root_path=str(config.root_path),
            split=(config.split,),
            split_seed=config.split_seed,
            cache_layer=(config.cache_layer,),
            batch_size=config.live_batch_size,
            force_revin=config.force_revin,
            on_bad_recording=config.on_bad_recording,
            allow_mismatch=config.allow_mismatch,
        )
        open_source = partial(open_live, encoder, extract_config)
    return trainer.train(config, fingerprint, open_source, open_monitor=open_monitor)


def _open_feature_monitor(
    config: TrainConfig, encoder: "BaseEncoder | None", held_out: Path
) -> "FeatureMonitor":
    """Return the monitor of features during training: stability, and events with --events_path.

    Raises UserError if --events_path has no events, or does not belong to the held-out store.
    """
    from minsae_jax.evaluation.dataset import open_dataset
    from minsae_jax.evaluation.feature_monitor import FeatureMonitor

    if config.events_path is None:
        return FeatureMonitor(None)
    return FeatureMonitor(open_dataset(held_out, config.cache_layer, encoder, config.events_path))


def evaluate(config: EvaluateConfig, encoder: "BaseEncoder | None" = None) -> "Evaluation":
    """Measure a finished run on held-out recordings; with `config.report`, also write its report.

    With `config.out`, SAEs that belong to other runs, or to none, can be measured too.
    encoder: by default the one at `config.checkpoint_path`, or else the run's. Without any, loss
    recovered is not measured, with a warning. A model of --model has no head to measure it by, so
    it is not loaded. Raises UserError if there is no such run, encoder or store, or they do not
    belong together.
    """
    _check_config(config, EvaluateConfig)
    from minsae_jax.evaluation import evaluate as evaluation
    from minsae_jax.evaluation.members import is_sae, training_of
    from minsae_jax.report.report import write_report

    run = Path(config.run)
    trained = training_of(run)
    if is_sae(run):
        require(config.out is not None, f"{run} is an SAE and not a run; set --out")
    for other in config.compare_with:
        require(Path(other).is_dir(), f"--compare_with {other} is not a folder")
    if config.control is not None:
        control = Path(config.control)
        require(control.is_dir(), f"--control {control} is not a folder")
        is_other = control.resolve() != Path(config.out or run).resolve()
        require(is_other, "--control must be another folder than that of this evaluation")
    start()
    encoder = encoder or _encoder_of(config, trained)
    # A model of --model has no reconstruction head.
    has_head = trained is None or trained.model is None
    if encoder is None and has_head:
        warnings.warn(
            "no encoder is given, so loss recovered is not measured; for PatchTST and CBraMod, set "
            "--checkpoint_path",
            stacklevel=2,
        )
    out = run
    if config.out is not None:
        out = Path(config.out)
        _check_evaluation_folder(out)
        make_folder(out)
    with ExitStack() as locks:
        # Two evaluations of one run would write the same files; one elsewhere only reads the run.
        is_elsewhere = out != run
        locks.enter_context(lock_folder(run, shared=is_elsewhere))
        others = [Path(other) for other in config.compare_with]
        if config.control is not None:
            others.append(Path(config.control))
        # `train --overwrite` locks the run and replaces its members.
        runs = [run_of(folder) for folder in (run, *others) if is_sae(folder)]
        for folder in [*others, *filter(None, runs)]:
            locks.enter_context(lock_folder(folder, shared=True))
        if is_elsewhere:
            locks.enter_context(lock_folder(out))
        result = evaluation.evaluate(config, encoder, trained)
        if config.report:
            with result.inputs.locked():
                result = replace(result, associations=write_report(config, result))
    return result


def _check_evaluation_folder(out: Path) -> None:
    """Raise UserError if a folder contains anything else than an evaluation."""
    # A killed evaluation can leave SHA256SUMS.tmp and .report.tmp or .report.old.
    owned = ("evaluation", "evaluation.*", "report", ".report.*", SUMS, f"{SUMS}.tmp")
    foreign = foreign_entries(out, owned)
    if foreign:
        raise UserError(
            f"{out} contains {foreign[0]}, which is not part of an evaluation; choose another --out"
        )


def steer(config: SteerConfig, encoder: "BaseEncoder | None" = None) -> "Steering":
    """Scale features of an SAE at its layer, and measure what changes in the rest of the encoder.

    encoder: by default the one at `config.checkpoint_path`, or else the run's. The files are in
    steering/MEMBER/ of the run. Raises UserError if there is no such run, member, feature,
    recording or encoder, they do not belong together, or the encoder cannot run from a layer on.
    """
    _check_config(config, SteerConfig)
    from minsae_jax.evaluation.steering import steer as steering

    run = Path(config.run)
    trained = load_run_config(run)
    start()
    encoder = encoder or _encoder_of(config, trained)
    if encoder is None:
        raise UserError("steering requires the encoder, PatchTST or CBraMod; set --checkpoint_path")
    # Two calls for the same features would write the same files.
    with lock_folder(run):
        return steering.steer(config, encoder, trained)


def view(config: ViewConfig, encoder: "BaseEncoder | None" = None) -> "list[ViewPage]":
    """Write a page for each recording that shows features of an SAE over the whole recording.

    encoder: by default the one at `config.checkpoint_path`, or else the run's. Raises UserError,
    before anything is written, if encoder, member and recordings do not fit each other, there is no
    such feature, or a page would replace another file.
    """
    _check_config(config, ViewConfig)
    from minsae_jax.report import view as views
    from minsae_jax.sae.member import load_sae

    start()
    sae = load_sae(config.member)
    run = run_of(config.member)
    encoder = encoder or _encoder_of(config, load_run_config(run) if run is not None else None)
    if encoder is None:
        raise UserError(
            "view requires the encoder; set --checkpoint_path, or in Python give it to "
            "minsae_jax.view"
        )
    return views.view(config, encoder, sae, run)


def _encoder_of(
    config: EvaluationInputConfig | ViewConfig, trained: TrainConfig | None
) -> "BaseEncoder | None":
    """Load the encoder that the settings name, or else that of the run; None if there is none."""
    if config.checkpoint_path is not None:
        return load_encoder(config.checkpoint_path, config.config_path)
    if trained is None or trained.encoder_path is None:
        return None
    checkpoint = trained.encoder_path
    require(
        Path(checkpoint).exists(),
        f"the run's encoder {checkpoint} does not exist; if it was moved, set --checkpoint_path",
    )
    return load_encoder(checkpoint, config.config_path or trained.config_path)


def plot(config: PlotConfig) -> "PlotFiles":
    """Plot the metrics of a run over its steps, finished or not."""
    _check_config(config, PlotConfig)
    from minsae_jax.sae import plots

    return plots.plot(config)


def verify(config: VerifyConfig) -> "Verification":
    """Read all files of stores, encoders, runs, members, evaluations and recordings; find damage.

    Raises UserError if a folder contains none of these. Damage is not an error: it is listed in
    `problems` of the result.
    """
    _check_config(config, VerifyConfig)
    from minsae_jax.integrity import verify as verification

    return verification.verify(config)
