"""Sparse autoencoders on the activations of EEG transformers: `python -m minsae_jax --help`.

Public names are imported when they are first used, so that a command line's --help does not wait
for JAX; type checkers read the imports below.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minsae_jax.activations.imported import write_store as write_store
    from minsae_jax.activations.store import Store as Store
    from minsae_jax.activations.store import open_store as open_store
    from minsae_jax.activations.tokens import TokenGrid as TokenGrid
    from minsae_jax.api import evaluate as evaluate
    from minsae_jax.api import extract as extract
    from minsae_jax.api import load_braindecode as load_braindecode
    from minsae_jax.api import load_encoder as load_encoder
    from minsae_jax.api import plot as plot
    from minsae_jax.api import prepare as prepare
    from minsae_jax.api import steer as steer
    from minsae_jax.api import train as train
    from minsae_jax.api import verify as verify
    from minsae_jax.api import view as view
    from minsae_jax.api import write_demo as write_demo
    from minsae_jax.eeg.prepare.config import PrepareConfig as PrepareConfig
    from minsae_jax.eeg.synthetic import DemoConfig as DemoConfig
    from minsae_jax.encoder.base import BaseEncoder as BaseEncoder
    from minsae_jax.encoder.config import ExtractConfig as ExtractConfig
    from minsae_jax.encoder.function import from_function as from_function
    from minsae_jax.encoder.patchtst.encoder import Encoder as Encoder
    from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder as PatchTSTEncoder
    from minsae_jax.errors import UserError as UserError
    from minsae_jax.evaluation.config import EvaluateConfig as EvaluateConfig
    from minsae_jax.evaluation.results import Evaluation as Evaluation
    from minsae_jax.evaluation.steering.config import SteerConfig as SteerConfig
    from minsae_jax.evaluation.steering.results import Steering as Steering
    from minsae_jax.integrity.config import VerifyConfig as VerifyConfig
    from minsae_jax.report.features import load_features as load_features
    from minsae_jax.report.recording import EncodedRecording as EncodedRecording
    from minsae_jax.report.recording import encode_recording as encode_recording
    from minsae_jax.report.view import ViewPage as ViewPage
    from minsae_jax.report.view_config import ViewConfig as ViewConfig
    from minsae_jax.sae.config import PlotConfig as PlotConfig
    from minsae_jax.sae.config import TrainConfig as TrainConfig
    from minsae_jax.sae.member import SparseAutoencoder as SparseAutoencoder
    from minsae_jax.sae.member import load_sae as load_sae
    from minsae_jax.sae.run import Run as Run
    from minsae_jax.sae.run import load_run as load_run

    __version__: str

_NAMES_OF_MODULES = {
    "activations.imported": ("write_store",),
    "activations.store": ("Store", "open_store"),
    "activations.tokens": ("TokenGrid",),
    "api": (
        "evaluate",
        "extract",
        "load_braindecode",
        "load_encoder",
        "plot",
        "prepare",
        "steer",
        "train",
        "verify",
        "view",
        "write_demo",
    ),
    "eeg.prepare.config": ("PrepareConfig",),
    "eeg.synthetic": ("DemoConfig",),
    "encoder.base": ("BaseEncoder",),
    "encoder.config": ("ExtractConfig",),
    "encoder.function": ("from_function",),
    "encoder.patchtst.encoder": ("Encoder", "PatchTSTEncoder"),
    "errors": ("UserError",),
    "evaluation.config": ("EvaluateConfig",),
    "evaluation.results": ("Evaluation",),
    "evaluation.steering.config": ("SteerConfig",),
    "evaluation.steering.results": ("Steering",),
    "integrity.config": ("VerifyConfig",),
    "report.features": ("load_features",),
    "report.recording": ("EncodedRecording", "encode_recording"),
    "report.view": ("ViewPage",),
    "report.view_config": ("ViewConfig",),
    "sae.config": ("PlotConfig", "TrainConfig"),
    "sae.member": ("SparseAutoencoder", "load_sae"),
    "sae.run": ("Run", "load_run"),
}
__all__ = [name for names in _NAMES_OF_MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("minsae_jax")
    for module, names in _NAMES_OF_MODULES.items():
        if name in names:
            value = getattr(import_module(f"minsae_jax.{module}"), name)
            # From now on Python finds the name without this function.
            globals()[name] = value
            return value
    raise AttributeError(f"module 'minsae_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
