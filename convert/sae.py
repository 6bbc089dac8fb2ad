"""Sparse autoencoders in and out: `python -m convert sae PATH --to FORMAT --out PATH`.

Parameters here are for raw activations, and encoders take x. dictionary_learning and SAELens
subtract the decoder's bias first, relu((x - b_dec) W_enc + b), which equals relu(x W_enc + b_enc)
with b = b_enc + b_dec W_enc.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from convert import dictionary_learning, saelens
from convert.autoencoder import Autoencoder
from convert.dictionary_learning import (
    read_dictionary_learning,
    read_minsae,
    write_dictionary_learning,
    write_minsae,
)
from convert.saelens import read_saelens, write_saelens
from convert.torch_files import load_torch
from minsae_jax.errors import UserError
from minsae_jax.files import foreign_entries, make_folder
from minsae_jax.locks import lock_folder
from minsae_jax.sae.member import CONFIG, WEIGHTS, load_sae, save_member
from minsae_jax.settings import read_json

Format = Literal["member", "minsae", "saelens", "dictionary_learning"]
FOLDER_FORMATS = ("member", "saelens")


@dataclass(frozen=True)
class ConvertedSae:
    """Result of a conversion."""

    kind: str
    source_format: Format
    format: Format
    d_model: int
    d_sae: int


def convert_sae(path: str | Path, to: Format, out: str | Path) -> ConvertedSae:
    """Convert an autoencoder of any format into any format.

    Raises UserError if the source is not an autoencoder, cannot be represented, or if `out` exists
    and is not an autoencoder of the requested format, or is a member of a run.
    """
    path = Path(path)
    out = Path(out).absolute()
    source_format = format_of(path)
    sae = READERS[source_format](path)
    _check_replaceable(out, to)
    with _locked(out, to):
        WRITERS[to](out, sae)
    d_model, d_sae = sae.params["W_enc"].shape
    return ConvertedSae(
        kind=sae.kind,
        source_format=source_format,
        format=to,
        d_model=d_model,
        d_sae=d_sae,
    )


@contextmanager
def _locked(out: Path, to: Format) -> Iterator[None]:
    """Lock the folder in which several files are written; a single one has a temporary name."""
    if to == "minsae":
        yield
        return
    folder = out if to in FOLDER_FORMATS else out.parent
    is_new = not folder.exists()
    make_folder(folder)
    try:
        with lock_folder(folder):
            yield
    except BaseException:
        # Nothing stays of an SAE that the format cannot represent.
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def format_of(path: Path) -> Format:
    """Return the format of an autoencoder, from its content. Raises UserError if it is unknown."""
    if not path.exists():
        raise UserError(f"there is no autoencoder {path}")
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return "member"
        if (path / saelens.CONFIG).is_file():
            return "saelens"
        if not (path / dictionary_learning.STATE_FILE).is_file():
            raise UserError(
                f"there is no {WEIGHTS}, {saelens.CONFIG} or {dictionary_learning.STATE_FILE} in "
                f"{path}, so it is not an autoencoder"
            )
        path = path / dictionary_learning.STATE_FILE
    state = load_torch(path)
    if isinstance(state, dict) and dictionary_learning.KEYS & set(state):
        return "dictionary_learning"
    return "minsae"


def _check_replaceable(out: Path, to: Format) -> None:
    """Raise UserError unless `out` is missing, an SAE of this format, or part of one."""
    if not out.exists():
        return
    if (out / "metrics.csv").exists():
        raise UserError(f"{out} is a member of a run, which would be lost; choose another --out")
    is_folder_format = to in FOLDER_FORMATS
    if out.is_dir() and is_folder_format and _is_interrupted(out, to):
        return
    try:
        if out.is_dir() == is_folder_format:
            READERS[to](out)
            return
    except UserError:
        pass
    expected = "a folder" if is_folder_format else "a file"
    raise UserError(
        f"{out} exists and is not an autoencoder of format {to}; choose another --out, {expected}"
    )


def _is_interrupted(out: Path, to: Format) -> bool:
    """Return whether a folder is empty or contains only the beginnings of this format."""
    first = {"member": CONFIG, "saelens": saelens.WEIGHTS}[to]
    unknown = set(foreign_entries(out, ["*.tmp"])) - {first}
    if unknown:
        return False
    # Any program may have a config.json.
    path = out / CONFIG
    return not path.exists() or "d_sae" in read_json(path)


def read_member(path: Path) -> Autoencoder:
    """Read a folder that `minsae train` wrote."""
    sae = load_sae(path)
    params = {name: np.asarray(array) for name, array in sae.params.items()}
    return Autoencoder(params, sae.config)


def write_member(path: Path, sae: Autoencoder) -> None:
    """Write a folder as `minsae train` does."""
    d_model, d_sae = sae.params["W_enc"].shape
    save_member(path, sae.params, sae.config | {"d_model": d_model, "d_sae": d_sae})


READERS: dict[Format, Callable[[Path], Autoencoder]] = {
    "member": read_member,
    "minsae": read_minsae,
    "saelens": read_saelens,
    "dictionary_learning": read_dictionary_learning,
}
WRITERS: dict[Format, Callable[[Path, Autoencoder], None]] = {
    "member": write_member,
    "minsae": write_minsae,
    "saelens": write_saelens,
    "dictionary_learning": write_dictionary_learning,
}
