"""The members of a sweep: every combination of its values, grouped by kind and size."""

from dataclasses import dataclass
from itertools import product

from minsae_jax.errors import UserError
from minsae_jax.sae.config import TrainPlan
from minsae_jax.sae.hyper import SYMBOLS
from minsae_jax.sae.kinds import KINDS, SAEKind

MAX_D_SAE = 2**24
# Hyper-parameters that differ between members, in the order of the columns of sweep.csv.
HYPER_NAMES = tuple(SYMBOLS)
# How hyper-parameters are called in members' names.
_SHORT_NAMES = {"lambda_sparsity": "lambda"}


@dataclass(frozen=True)
class MemberSpec:
    """One autoencoder of a sweep, before it is trained."""

    name: str
    kind: SAEKind
    lambda_sparsity: float
    lr: float
    seed: int
    d_sae: int

    @property
    def hyper(self) -> dict[str, int | float]:
        """Hyper-parameters by name, in the order of HYPER_NAMES."""
        return {name: getattr(self, name) for name in HYPER_NAMES}


Group = tuple[MemberSpec, ...]


def make_groups(plan: TrainPlan, d_model: int) -> tuple[Group, ...]:
    """Return the members of a sweep, one group for each d_sae.

    A group has all combinations of λ, lr and seed. A member's name has its λ, and the other values
    if the sweep varies them. Raises UserError if d_sae is out of range or not unique.
    """
    config = plan.config
    sizes = [int(factor * d_model) for factor in config.feature_dim_factor]
    has_duplicates = len(set(sizes)) < len(sizes)
    if has_duplicates or min(sizes) < 1 or max(sizes) > MAX_D_SAE:
        raise UserError(
            f"--feature_dim_factor gives d_sae {', '.join(map(str, sizes))} at d_model {d_model}; "
            f"each must be from 1 to {MAX_D_SAE:,}, without duplicates"
        )
    values = {
        "lambda_sparsity": config.lambda_sparsity,
        "lr": config.lr,
        "seed": config.seed,
        "d_sae": tuple(sizes),
    }
    named = [name for name in HYPER_NAMES if name == "lambda_sparsity" or len(values[name]) > 1]
    kind = KINDS["relu"]
    groups = []
    for d_sae in sizes:
        group = []
        for lambda_sparsity, lr, seed in product(config.lambda_sparsity, config.lr, config.seed):
            unnamed = MemberSpec("", kind, lambda_sparsity, lr, seed, d_sae)
            name = _member_name(unnamed, named)
            group.append(MemberSpec(name, kind, lambda_sparsity, lr, seed, d_sae))
        groups.append(tuple(group))
    return tuple(groups)


def _member_name(member: MemberSpec, named: list[str]) -> str:
    """Return for example `lambda=5,lr=0.001`."""
    parts = [f"{_SHORT_NAMES.get(n, n)}={short_number(member.hyper[n])}" for n in named]
    return ",".join(parts)


def short_number(value: int | float) -> str:
    """Return the shortest text from six digits on that is exactly this number.

    >>> short_number(5.0), short_number(5e-5), short_number(1024), short_number(0.1234567)
    ('5', '5e-05', '1024', '0.1234567')
    """
    if isinstance(value, int):
        return str(value)
    # 17 significant digits identify every float64.
    for digits in range(6, 18):
        text = f"{value:.{digits}g}"
        if float(text) == value:
            return text
    return repr(value)
