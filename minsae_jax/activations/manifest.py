"""manifest.json of a store as typed values, parsed and validated once."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minsae_jax.errors import UserError
from minsae_jax.files import regular_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"b([0-9]{1,9})\.npy")
SHA256 = re.compile("[0-9a-f]{64}")
# dtype of the activations -> dtype of the .npy file, which has no bfloat16.
ON_DISK = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    file: str
    shape: tuple[int, int, int]  # sequences, n_tokens, d_model
    n_bytes: int
    sha256: str

    @property
    def number(self) -> int:
        return shard_number(self.file)

    @property
    def total_tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    def to_json(self) -> Mapping[str, Any]:
        return {
            "file": self.file,
            "shape": list(self.shape),
            # The file format calls tokens rows.
            "rows": self.total_tokens,
            "bytes": self.n_bytes,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, kw_only=True)
class StoreIdentity:
    """Everything that determines a store's contents: equal identities have equal shards."""

    layer: int  # as requested, negative counts from the end
    layer_index: int  # from 0
    dtype: str  # a key of ON_DISK
    n_tokens: int  # per sequence
    d_model: int
    encoder: str  # fingerprint
    data: Mapping[str, Any]  # settings of recordings and windows; keys vary with the version

    def to_json(self) -> Mapping[str, Any]:
        # Not the fields of self: a Manifest has more, which its to_json adds.
        names = [f.name for f in dataclasses.fields(StoreIdentity)]
        return {name: getattr(self, name) for name in names}

    @property
    def digest(self) -> str:
        return sha256_of_json(self.to_json())


@dataclass(frozen=True, kw_only=True)
class Manifest(StoreIdentity):
    """A store's identity and its shards."""

    format_version: int = FORMAT_VERSION
    complete: bool = False
    # Counted from the end, -1 is the last; None if unknown, as in imported stores.
    layer_from_end: int | None = None
    shards: tuple[ShardEntry, ...] = ()
    unknown: Mapping[str, Any] = field(default_factory=dict)  # keys of other versions, preserved

    @classmethod
    def of(cls, identity: StoreIdentity, layer_from_end: int | None) -> "Manifest":
        """Return the manifest of a new store."""
        return cls(**identity.to_json(), layer_from_end=layer_from_end)

    def is_layer(self, layer: int) -> bool:
        """Return whether the layer is known by this number, such as 2 and -1 for the last of 3."""
        return layer in (self.layer, self.layer_index, self.layer_from_end)

    def to_json(self) -> Mapping[str, Any]:
        known = {} if self.layer_from_end is None else {"layer_from_end": self.layer_from_end}
        return {
            "format_version": self.format_version,
            "complete": self.complete,
            **super().to_json(),
            **known,
            "shards": [entry.to_json() for entry in self.shards],
            **self.unknown,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole manifest."""
        return sha256_of_json(self.to_json())

    @property
    def n_sequences(self) -> int:
        return sum(entry.shape[0] for entry in self.shards)


def shard_number(name: str) -> int:
    """Return the number in a shard's file name.

    >>> shard_number("b0012.npy")
    12
    """
    return int(name.removeprefix("b").removesuffix(".npy"))


def read_manifest(folder: Path) -> Manifest | None:
    """Return a store's manifest, or None if there is none. Raises UserError if it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
        # The version comes first, since a newer format may have other keys.
        version = content["format_version"]
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        if not is_newer:
            return _parse_manifest(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is damaged; rerun `extract` with --overwrite to write the store again"
        ) from None
    raise UserError(f"{folder} was written by a newer minsae_jax; update minsae_jax")


_TYPES: dict[str, type] = {
    "format_version": int,
    "complete": bool,
    "layer": int,
    "layer_index": int,
    "dtype": str,
    "n_tokens": int,
    "d_model": int,
    "encoder": str,
    "data": dict,
    "shards": list,
}


# Entries of `data` that others read; not all versions and programs write all of them.
_DATA_TYPES: dict[str, type | tuple[type, ...]] = {
    "split": str,
    "seq_len": int,
    "revin": bool,
    "sampling_rate": (int, float),
    "channels": list,
}


def _check_data(data: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError on invalid entries that others read."""
    for name, value in data.items():
        if name in _DATA_TYPES and not isinstance(value, _DATA_TYPES[name]):
            raise TypeError(name)
    if not all(isinstance(name, str) for name in data.get("channels", [])):
        raise TypeError("channels")
    for name in ("seq_len", "sampling_rate"):
        if not 0 < data.get(name, 1) < 2**53:
            raise ValueError(name)


def _parse_manifest(content: Mapping[str, Any]) -> Manifest:
    """Raises ValueError, KeyError or TypeError on invalid content."""
    known = {name: content[name] for name in _TYPES}
    for name, value in known.items():
        if type(value) is not _TYPES[name]:  # bool is a subclass of int
            raise TypeError(name)
    _check_data(known["data"])
    if known["dtype"] not in ON_DISK:
        raise ValueError("dtype")
    layer_from_end = content.get("layer_from_end")
    if layer_from_end is not None and (type(layer_from_end) is not int or layer_from_end >= 0):
        raise ValueError("layer_from_end")
    # A split without windows is an error of `extract`, so no complete store is empty.
    if known["complete"] and not known["shards"]:
        raise ValueError("shards")
    sequence_shape = [known["n_tokens"], known["d_model"]]
    shards = tuple(parse_shard_entry(entry, sequence_shape) for entry in known.pop("shards"))
    if len({entry.file for entry in shards}) < len(shards):
        raise ValueError("shards")
    unknown = {n: value for n, value in content.items() if n not in {*_TYPES, "layer_from_end"}}
    return Manifest(**known, layer_from_end=layer_from_end, shards=shards, unknown=unknown)


def parse_shard_entry(content: Mapping[str, Any], sequence_shape: list[int]) -> ShardEntry:
    """Return a shard's entry. Raises ValueError, KeyError or TypeError if it is invalid."""
    is_valid = (
        SHARD_NAME.fullmatch(content["file"])
        and SHA256.fullmatch(content["sha256"])
        and type(content["bytes"]) is int
        and content["shape"][1:] == sequence_shape
        and type(content["shape"][0]) is int
        and content["rows"] == content["shape"][0] * content["shape"][1] > 0
    )
    if not is_valid:
        raise ValueError("shards")
    return ShardEntry(content["file"], tuple(content["shape"]), content["bytes"], content["sha256"])


def sha256_of_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
