"""The members of a sweep: every combination of its values, grouped by kind and size."""

from dataclasses import dataclass, replace
from itertools import product

from minsae_jax.errors import UserError
from minsae_jax.sae.config import TrainConfig, TrainPlan
from minsae_jax.sae.hyper import Hyper, member_hyper
from minsae_jax.sae.kinds import KINDS, SAEKind

MAX_D_SAE = 2**24
# Hyper-parameters in members' names.
_SHORT_NAMES = {"lambda_sparsity": "lambda"}


@dataclass(frozen=True)
class MemberSpec:
    """One autoencoder of a sweep, before it is trained."""

    name: str
    kind: SAEKind
    sparsity: float  # λ, k or target L0, see kind.sparsity_name
    lr: float
    seed: int
    d_sae: int

    @property
    def hyper(self) -> Hyper:
        """Hyper-parameters by name, in the order of SYMBOLS."""
        values: Hyper = {
            "kind": self.kind.name,
            self.kind.sparsity_name: self.sparsity,
            "lr": self.lr,
            "seed": self.seed,
            "d_sae": self.d_sae,
        }
        return member_hyper(values)


Group = tuple[MemberSpec, ...]


def make_groups(plan: TrainPlan, d_model: int) -> tuple[Group, ...]:
    """Return the members of a sweep; see `groups_of_sizes`.

    Raises UserError if d_sae is out of range or not unique, k is more than d_sae, or a learning
    rate is also the automatic one.
    """
    config = plan.config
    sizes = [int(factor * d_model) for factor in config.feature_dim_factor]
    has_duplicates = len(set(sizes)) < len(sizes)
    if has_duplicates or min(sizes) < 1 or max(sizes) > MAX_D_SAE:
        raise UserError(
            f"--feature_dim_factor gives d_sae {', '.join(map(str, sizes))} at d_model {d_model}; "
            f"each must be from 1 to {MAX_D_SAE:,}, without duplicates"
        )
    return groups_of_sizes(config, sizes, d_model)


def groups_of_sizes(config: TrainConfig, sizes: list[int], d_model: int) -> tuple[Group, ...]:
    """Return the members of a sweep, one group for each kind and d_sae.

    A group has all combinations of its sparsity setting (λ, k or target L0), lr and seed. config:
    resolved. sizes: d_sae. Neither names nor hyper-parameters depend on d_model.
    """
    named = [name for name in ("lr", "seed") if len(getattr(config, name)) > 1]
    if len(sizes) > 1:
        named.append("d_sae")
    groups = []
    for kind_name in config.kind:
        kind = KINDS[kind_name].for_run(config, d_model)
        sparsity = getattr(config, kind.sparsity_name)
        if kind.sparsity_name != "lambda_sparsity" and max(sparsity) > min(sizes):
            raise UserError(
                f"--{kind.sparsity_name} {max(sparsity):.15g} is more than d_sae {min(sizes)}"
            )
        for d_sae in sizes:
            lrs = _learning_rates(config, d_sae)
            group = []
            for value, lr, seed in product(sparsity, lrs, config.seed):
                member = MemberSpec("", kind, value, lr, seed, d_sae)
                group.append(replace(member, name=_member_name(member, named)))
            groups.append(tuple(group))
    return tuple(groups)


def _learning_rates(config: TrainConfig, d_sae: int) -> list[float]:
    """Return the learning rates of a sweep at one size, with `auto` resolved."""
    rates = [automatic_lr(d_sae) if lr == "auto" else lr for lr in config.lr]
    if len(set(rates)) < len(rates):
        text = " ".join(map(str, config.lr))
        auto = short_number(automatic_lr(d_sae))
        raise UserError(
            f"--lr contains duplicate values: {text}, where auto is {auto} at d_sae {d_sae}"
        )
    return rates


def automatic_lr(d_sae: int) -> float:
    """Return 2e-4 √(2¹⁴ / d_sae), the rule of Gao et al. (2024), from six digits.

    >>> automatic_lr(2**14), automatic_lr(1024)
    (0.0002, 0.0008)
    """
    return float(f"{2e-4 * (2**14 / d_sae) ** 0.5:.6g}")


def _member_name(member: MemberSpec, named: list[str]) -> str:
    """Return for example `lambda=5,lr=0.001`, or `topk,k=16`: ReLU is not named."""
    parts = [] if member.kind.name == "relu" else [member.kind.name]
    values = {member.kind.sparsity_name: member.sparsity}
    values |= {name: getattr(member, name) for name in named}
    for name, value in values.items():
        parts.append(f"{_SHORT_NAMES.get(name, name)}={short_number(value)}")
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
