"""Conversion tables: which tensor of a state dict is which parameter of a Flax model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from convert.torch_files import Tensors
from minsae_jax.encoder.base import Params, parameter_path
from minsae_jax.errors import UserError, join_some

MAX_COMPLAINTS = 6  # in one error message


@dataclass(frozen=True)
class Rule:
    """One parameter (or one per layer or channel) in PyTorch and in Flax; `#` is a number."""

    key: str  # in the state dict
    path: str  # in the Flax model
    to_flax: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray

    def path_of(self, key: str) -> str | None:
        """Return the path for a key, or None if the rule is about other keys."""
        return _translate(key, self.key, self.path)

    def key_of(self, path: str) -> str | None:
        """Return the key for a path, or None if the rule is about other paths."""
        return _translate(path, self.path, self.key)


def _translate(name: str, pattern: str, template: str) -> str | None:
    match = re.fullmatch(re.escape(pattern).replace(r"\#", r"(\d+)"), name)
    if match is None:
        return None
    return template.replace("#", match[1]) if match.groups() else template


def linear_rules(key: str, path: str) -> list[Rule]:
    """Return the rules of a linear map with a bias."""
    # torch.nn.Linear stores [outputs, inputs], nnx.Linear [inputs, outputs].
    weight = Rule(f"{key}.weight", f"{path}/kernel", np.transpose, np.transpose)
    return [weight, Rule(f"{key}.bias", f"{path}/bias")]


def norm_rules(key: str, path: str) -> list[Rule]:
    """Return the rules of a layer norm or group norm."""
    return [Rule(f"{key}.weight", f"{path}/scale"), Rule(f"{key}.bias", f"{path}/bias")]


def fill(
    abstract: Params, table: Sequence[Rule], tensors: Tensors, complaints: Sequence[str] = ()
) -> Params:
    """Return parameters of the structure of `abstract`, filled from a state dict.

    complaints: problems that the caller has found. Raises one UserError with these, every unknown
    key, every wrong shape, every parameter without a tensor, and every value that is not finite.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    expected = {parameter_path(keys): leaf for keys, leaf in leaves}
    filled: dict[str, np.ndarray] = {}
    complaints = list(complaints)
    for key, tensor in tensors.items():
        # The first rule that knows the key; in a valid table there is only one.
        rule = next((rule for rule in table if rule.path_of(key) is not None), None)
        path = rule.path_of(key) if rule else None
        if rule is None or path not in expected:
            complaints.append(f"unknown key {key[:200]}")
            continue
        value = rule.to_flax(tensor)
        complaint = _complaint(value, path, expected[path].shape)
        if complaint:
            complaints.append(f"{key} {complaint}")
        filled[path] = value
    complaints += [f"nothing fills {path}" for path in expected if path not in filled]
    if complaints:
        listed = join_some(complaints, "; ", limit=MAX_COMPLAINTS)
        raise UserError(f"the state dict does not fit: {listed}")
    # Copies in C order, so that fingerprints do not depend on transposed views.
    arrays = [np.array(filled[path], order="C") for path in expected]
    return jax.tree_util.tree_unflatten(structure, arrays)


def _complaint(value: np.ndarray, path: str, shape: tuple[int, ...]) -> str | None:
    if value.shape != shape or value.dtype != np.float32:
        return f"is {value.dtype}{list(value.shape)} for {path}, expected float32{list(shape)}"
    if not np.isfinite(value).all():
        return "contains NaN or infinity"
    if path.endswith("/var") and value.min() < 0:
        return "contains a variance below 0"
    return None
