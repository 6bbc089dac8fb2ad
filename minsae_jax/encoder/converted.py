"""The folder of a converted encoder: parameters (Orbax) and `config.json`.

`config.json` contains format_version, fingerprint, family, architecture and the fields of
`EncoderSource`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from minsae_jax.checksums import SUMS, files_below, write_checksums
from minsae_jax.encoder.cbramod.encoder import CBraModEncoder
from minsae_jax.encoder.native import NativeEncoder
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.errors import UserError, brief, system_reason
from minsae_jax.files import foreign_entries, regular_file, replaced_folder
from minsae_jax.settings import from_dict

# The first family's folders do not name it.
DEFAULT_FAMILY = "patchtst"
FAMILIES: dict[str, type[NativeEncoder]] = {
    DEFAULT_FAMILY: PatchTSTEncoder,
    "cbramod": CBraModEncoder,
}
FORMAT_VERSION = 1
CONFIG = "config.json"
PARAMS = "params"
OWNED_FILES = (CONFIG, SUMS, PARAMS, f"{PARAMS}.orbax-checkpoint-tmp*")


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """Origin of a converted encoder, and the details needed to write the source file again."""

    sources: Mapping[str, str] = field(default_factory=dict)  # setting -> where it came from
    source_program: str = "gpatchtst"
    source_file: str = ""
    source_sha256: str = ""
    source_form: str = "checkpoint"  # or "state dict"
    source_dtypes: Mapping[str, str] = field(default_factory=dict)  # keys in half precision
    batches_tracked: Mapping[str, int] = field(default_factory=dict)  # BatchNorm's counters


def save_encoder(
    folder: str | Path, encoder: NativeEncoder, source: EncoderSource | None = None
) -> None:
    """Write a converted encoder; a partly written one never looks complete.

    Replaces a converted encoder. Raises UserError if the folder contains anything else.
    """
    folder = Path(folder).absolute()
    if not _can_be_replaced(folder):
        raise UserError(f"{folder} exists and is not a converted encoder; choose another --out")
    config = {
        "format_version": FORMAT_VERSION,
        "fingerprint": encoder.fingerprint,
        "architecture": dataclasses.asdict(encoder.architecture),
    }
    family = next(name for name, cls in FAMILIES.items() if type(encoder) is cls)
    if family != DEFAULT_FAMILY:
        config["family"] = family
    if source is not None:
        config |= dataclasses.asdict(source)
    try:
        with replaced_folder(folder) as temporary:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(temporary / PARAMS, encoder.params)
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            write_checksums(temporary, files_below(temporary))
    # Orbax raises all three when a write fails.
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"the encoder could not be written to {folder} ({system_reason(e)})") from e


def is_encoder(folder: Path) -> bool:
    """Return whether a folder looks like a converted encoder."""
    return (folder / CONFIG).is_file() and (folder / PARAMS).is_dir()


def _can_be_replaced(folder: Path) -> bool:
    """Return whether nothing is lost: the folder is missing, empty or a converted encoder."""
    if not folder.exists():
        return True
    if not folder.is_dir() or foreign_entries(folder, OWNED_FILES):
        return False
    config = folder / CONFIG
    # Parameters without config.json are the rest of an interrupted conversion.
    if not config.exists():
        return True
    try:
        return "fingerprint" in json.loads(regular_file(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def load_source(folder: str | Path) -> EncoderSource:
    """Return the origin of a converted encoder; entries of a wrong type are left out.

    Raises UserError if the values within an entry have a wrong type: the file can be edited.
    """
    config = json.loads(regular_file(Path(folder) / CONFIG).read_text(encoding="utf-8"))
    default = EncoderSource()
    entries = {}
    for setting in dataclasses.fields(EncoderSource):
        entry = config.get(setting.name)
        if not isinstance(entry, type(getattr(default, setting.name))):
            continue
        value_type = int if setting.name == "batches_tracked" else str
        if isinstance(entry, dict) and not all(type(v) is value_type for v in entry.values()):
            raise UserError(
                f"the encoder's {CONFIG} is damaged ({setting.name}); convert the encoder again"
            )
        entries[setting.name] = entry
    return EncoderSource(**entries)


def load_encoder(folder: str | Path) -> NativeEncoder:
    """Load an encoder that `python -m convert encoder` wrote. Raises UserError if there is none."""
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise UserError(
            f"there is no encoder at {folder}; convert one with `python -m convert encoder`"
        )
    try:
        return _load(folder)
    except UserError:
        raise
    # A damaged folder can make Orbax, JSON and numpy raise anything.
    except Exception as e:
        raise UserError(
            f"{folder} is not a converted encoder, or it is damaged ({brief(e)}); convert it again"
        ) from e


def _load(folder: Path) -> NativeEncoder:
    config = json.loads(regular_file(folder / CONFIG).read_text(encoding="utf-8"))
    version = config["format_version"]
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} was written by a newer minsae_jax (format {version}); update minsae_jax"
        )
    family = FAMILIES[config.get("family", DEFAULT_FAMILY)]
    architecture: Any = from_dict(family.architecture_type, config["architecture"])
    abstract_params = family.abstract_params(architecture)
    # Orbax would wait for a named pipe.
    for path in (folder / PARAMS).rglob("*"):
        regular_file(path)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((folder / PARAMS).absolute(), abstract_params)
    encoder = family(architecture, params)
    if encoder.fingerprint != config["fingerprint"]:
        raise ValueError("fingerprint mismatch")
    return encoder
