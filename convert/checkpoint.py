"""Opening a PyTorch file without running code from it, as plain numpy arrays."""

import hashlib
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minsae_jax.config import UserError

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """What an encoder's checkpoint says. RevIN's own state is among the tensors, under `revin.`."""

    path: Path
    sha256: str
    tensors: Tensors
    config: dict[str, Any]  # the settings that the checkpoint carries, {} where it has none


def load_torch(path: str | Path) -> Any:
    """The content of a .pth or .pt file, tensors on the CPU. Raises UserError on anything but plain data."""
    try:
        import torch
    except ImportError:
        raise UserError("reading a PyTorch file needs torch: install minsae_jax[torch]") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    scalar = np.float64(0).__reduce__()[0]
    numpy_scalars: list[Any] = [
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 names it
        np.dtype,
        *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")),
    ]
    try:
        with torch.serialization.safe_globals(numpy_scalars), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on how it would rather be called
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        unsafe = _unsafe_globals(path)
        if unsafe:
            raise UserError(f"{path} holds code or objects ({unsafe}), not only weights: it was not opened") from e
        raise UserError(f"{path} is no PyTorch checkpoint, or a damaged one") from e
    except Exception as e:
        raise UserError(f"{path} is no PyTorch checkpoint, or a damaged one ({type(e).__name__})") from e


def _unsafe_globals(path: Path) -> str:
    import torch

    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)[:3])
    except Exception:  # not even a pickle inside a zip
        return ""


def to_numpy(state: Any, where: str) -> Tensors:
    """A state dict's tensors; floating-point ones as float32. Raises UserError where a value is no tensor."""
    import torch

    if not isinstance(state, dict) or not state:
        raise UserError(f"{where} holds no state dict")
    wrong = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if wrong:
        raise UserError(f"{where} is no state dict: {', '.join(wrong[:3])} is no tensor")
    try:
        return {k: (v.float() if v.is_floating_point() else v).detach().numpy() for k, v in state.items()}
    except Exception as e:
        raise UserError(f"{where} holds tensors that are not plain numbers (sparse, quantized or without data)") from e


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A gPatchTST checkpoint: the dict that its training saves, or a bare state dict."""
    content = load_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    whole = "model_state_dict" in content
    tensors = _without_prefixes(to_numpy(content["model_state_dict"] if whole else content, str(path)))
    if whole and content.get("revin_state_dict"):
        revin = _without_prefixes(to_numpy(content["revin_state_dict"], f"{path} (revin_state_dict)"))
        tensors |= {f"revin.{k}": v for k, v in revin.items()}
    config = content.get("config") if whole else None
    with Path(path).open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return Checkpoint(Path(path), sha256, tensors, config if isinstance(config, dict) else {})


def _without_prefixes(tensors: Tensors) -> Tensors:
    """Without what DataParallel, torch.compile and a wrapping module put before every key."""
    for prefix in ("module.", "_orig_mod.", "model.") * 2:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors
