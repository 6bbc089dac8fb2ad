"""Hyper-parameters that distinguish the members of a sweep: their order, labels and symbols.

They are read from settings or from a member's config.json, never from the name of its folder.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Hyper-parameter -> value of one member, in the order of SYMBOLS.
Hyper = Mapping[str, int | float | str]

# In the order by which members are sorted. A new kind of SAE adds its sparsity setting here.
SYMBOLS = {
    "kind": "kind",
    "lambda_sparsity": "λ",
    "k": "k",
    "target_l0": "target L0",
    "lr": "lr",
    "seed": "seed",
    "d_sae": "d_sae",
}
# Hyper-parameters that are integers.
INTEGERS = ("seed", "d_sae")
# Settings that control sparsity; a member has one of them.
SPARSITY = ("lambda_sparsity", "k", "target_l0")


def member_hyper(config: Mapping[str, Any]) -> Hyper:
    """Return the hyper-parameters in a member's config.json, or in any mapping with their names.

    >>> member_hyper({"kind": "relu", "d_sae": 1024, "lambda_sparsity": 5.0})
    {'kind': 'relu', 'lambda_sparsity': 5.0, 'd_sae': 1024}
    """
    return {name: config[name] for name in SYMBOLS if config.get(name) is not None}


def sort_key(hyper: Hyper) -> tuple[tuple[bool, int | float | str], ...]:
    """Return a key by which members are sorted; a missing value comes before any other."""
    return tuple((name in hyper, hyper.get(name, 0)) for name in SYMBOLS)


def sparsity(hyper: Hyper) -> tuple[str, int | float | str] | None:
    """Return the name and value of the sparsity setting, or None if there is none.

    >>> sparsity({"lambda_sparsity": 5.0, "d_sae": 1024})
    ('lambda_sparsity', 5.0)
    """
    for name in SPARSITY:
        if name in hyper:
            return name, hyper[name]
    return None


def varied_names(members: Iterable[Hyper]) -> list[str]:
    """Return the names of the hyper-parameters that differ between members.

    >>> varied_names([{"lambda_sparsity": 5.0, "seed": 0}, {"lambda_sparsity": 2.0, "seed": 0}])
    ['lambda_sparsity']
    """
    members = list(members)
    return [name for name in SYMBOLS if len({hyper.get(name) for hyper in members}) > 1]


def hyper_label(hyper: Hyper, names: Iterable[str]) -> str:
    """Return a label of the named hyper-parameters, without those that the member does not have.

    >>> hyper_label({"lambda_sparsity": 5.0, "seed": 0}, ["lambda_sparsity", "k", "seed"])
    'λ 5, seed 0'
    """
    present = [name for name in names if name in hyper]
    return ", ".join(f"{SYMBOLS[name]} {value_text(hyper[name])}" for name in present)


def value_text(value: int | float | str) -> str:
    """Return a short text of a value for labels: integers in full, other numbers to 6 digits.

    >>> value_text(131072), value_text(5.0), value_text(5e-5)
    ('131072', '5', '5e-05')
    """
    return f"{value:g}" if isinstance(value, float) else str(value)
