"""Sparse autoencoders on the activations of EEG transformers: `python -m minsae_jax --help`.

Public names are imported when they are first used, so that a command line's --help does not wait
for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minsae_jax.activations.imported import write_store
    from minsae_jax.activations.store import Store, open_store
    from minsae_jax.activations.tokens import TokenGrid
    from minsae_jax.api import (
        evaluate,
        extract,
        load_braindecode,
        load_encoder,
        plot,
        prepare,
        steer,
        train,
        verify,
        view,
        write_demo,
    )
    from minsae_jax.eeg.prepare.config import PrepareConfig
    from minsae_jax.eeg.synthetic import DemoConfig
    from minsae_jax.encoder.base import BaseEncoder
    from minsae_jax.encoder.config import ExtractConfig
    from minsae_jax.encoder.function import from_function
    from minsae_jax.encoder.patchtst.encoder import Encoder, PatchTSTEncoder
    from minsae_jax.errors import UserError
    from minsae_jax.evaluation.config import EvaluateConfig
    from minsae_jax.evaluation.results import Evaluation
    from minsae_jax.evaluation.steering.config import SteerConfig
    from minsae_jax.evaluation.steering.results import Steering
    from minsae_jax.integrity.config import VerifyConfig
    from minsae_jax.report.features import load_features
    from minsae_jax.report.recording import EncodedRecording, encode_recording
    from minsae_jax.report.view import ViewPage
    from minsae_jax.report.view_config import ViewConfig
    from minsae_jax.sae.config import PlotConfig, TrainConfig
    from minsae_jax.sae.member import SparseAutoencoder, load_sae
    from minsae_jax.sae.run import Run, load_run

    __version__: str

__all__ = [
    "BaseEncoder",
    "DemoConfig",
    "EncodedRecording",
    "Encoder",
    "EvaluateConfig",
    "Evaluation",
    "ExtractConfig",
    "PatchTSTEncoder",
    "PlotConfig",
    "PrepareConfig",
    "Run",
    "SparseAutoencoder",
    "SteerConfig",
    "Steering",
    "Store",
    "TokenGrid",
    "TrainConfig",
    "UserError",
    "VerifyConfig",
    "ViewConfig",
    "ViewPage",
    "encode_recording",
    "evaluate",
    "extract",
    "from_function",
    "load_braindecode",
    "load_encoder",
    "load_features",
    "load_run",
    "load_sae",
    "open_store",
    "plot",
    "prepare",
    "steer",
    "train",
    "verify",
    "view",
    "write_demo",
    "write_store",
]

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
