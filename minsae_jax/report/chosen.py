"""Selection of the tokens of a feature that are shown as examples."""

from minsae_jax.report.context import Context
from minsae_jax.report.excerpts import ChosenToken

RANDOM_EXAMPLES = 6


def choose_tokens(context: Context, feature: int) -> list[ChosenToken]:
    """Return the tokens of a feature to show as examples."""
    activity = context.activity
    quantiles = context.quantiles
    n_top = activity.top.token.shape[1]
    n_quantiles = quantiles.token.shape[1]
    n_random = min(RANDOM_EXAMPLES, activity.random.token.shape[1])
    ranked = [("top", activity.top, rank) for rank in range(n_top)]
    ranked += [(f"q{rank + 1}", quantiles, rank) for rank in range(n_quantiles)]
    ranked += [("random", activity.random, rank) for rank in range(n_random)]
    chosen = []
    for group, tokens, rank in ranked:
        token = int(tokens.token[feature, rank])
        if token < 0:
            continue
        one = ChosenToken(
            group=group,
            sequence=int(tokens.sequence[feature, rank]),
            token=token,
            activation=float(tokens.activation[feature, rank]),
            has_montage=group == "top" and rank < context.montage_examples,
        )
        chosen.append(one)
    return chosen
