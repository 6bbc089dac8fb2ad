"""Sparse autoencoders in and out: `python -m convert sae PATH --to member|minsae --out PATH`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.checkpoint import load_torch, to_numpy
from minsae_jax.config import UserError
from minsae_jax.files import written_aside
from minsae_jax.sae.model import check_params, load_sae, save_member

# minSAE's key, ours, whether it is transposed
MINSAE = (
    ("encoder.weight", "W_enc", True),
    ("encoder.bias", "b_enc", False),
    ("decoder.weight", "W_dec", True),
    ("decoder.bias", "b_dec", False),
)


def read_minsae(path: Path) -> dict[str, np.ndarray]:
    """Our parameters from a state dict of minSAE; strict on names, shapes and dtype, exact to the bit."""
    state = load_torch(path)
    if not isinstance(state, dict) or set(state) != {theirs for theirs, _, _ in MINSAE}:
        held = ", ".join(map(str, list(state)[:6])) if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"{path} is no autoencoder of minSAE: it must hold {', '.join(k for k, _, _ in MINSAE)}, not {held}"
        )
    tensors = to_numpy(state, str(path))
    params = {ours: tensors[theirs].T if t else tensors[theirs] for theirs, ours, t in MINSAE}
    if any(str(v.dtype) != "torch.float32" for v in state.values()):
        raise UserError(f"{path} must be float32 throughout")
    check_params(params, str(path))
    return {name: np.ascontiguousarray(value) for name, value in params.items()}


def write_minsae(path: Path, params: dict[str, np.ndarray]) -> None:
    """The state dict that minSAE saves, written aside and renamed."""
    import torch

    state = {
        theirs: torch.from_numpy(np.array(params[ours].T if t else params[ours], order="C"))
        for theirs, ours, t in MINSAE
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        torch.save(state, aside)


def _refuse_other(out: Path, wanted: str, read: Callable[[Path], object]) -> None:
    """What is there is replaced only if it is an autoencoder of the same kind."""
    if out.exists() and not (out.is_dir() and wanted == "a folder" and not any(out.iterdir())):
        try:
            read(out)
        except UserError:
            raise UserError(f"{out} exists and is no such autoencoder: this writes {wanted}, name another") from None


def convert_sae(path: str | Path, to: str, out: str | Path) -> str:
    """Read a member's folder or a minSAE file and write either; returns what to tell."""
    path, out = Path(path), Path(out).absolute()
    if not path.exists():
        raise UserError(f"there is no autoencoder {path}")
    if path.is_dir():
        sae = load_sae(path)
        params, config = {k: np.asarray(v) for k, v in sae.params.items()}, sae.config
    else:
        params, config = read_minsae(path), {"format_version": 1, "kind": "relu", "source_file": path.name}
    d_model, d_sae = params["W_enc"].shape
    if to == "minsae":
        _refuse_other(out, "a file such as sparse_autoencoder_final.pt", read_minsae)
        write_minsae(out, params)
    else:
        _refuse_other(out, "a folder", load_sae)
        save_member(out, params, config | {"d_model": d_model, "d_sae": d_sae})
    return f"autoencoder of d_model {d_model}, d_sae {d_sae} written to {out}"
