"""The token grid: channel, first and last sample in the window of each token of a sequence.

A store has its grid in `tokens.npz` with the arrays `channel`, `first` and `last`. Older stores
without this file are all from PatchTST, whose encoder defines the grid.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from minsae_jax.checksums import read_npz, write_npz
from minsae_jax.errors import UserError, reading

TOKENS = "tokens.npz"


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Place of every token of a sequence; -1 where a token has none.

    channel: column of the recording. A token without a channel (-1) has that of its sequence
    (an encoder that makes one sequence of each channel), or covers all channels.
    first, last: first and last sample in the window. A CLS token has neither. A patch that was
    padded can end after the window.

    Raises UserError if the arrays do not belong together.
    """

    channel: Int[np.ndarray, " n_tokens"]
    first: Int[np.ndarray, " n_tokens"]
    last: Int[np.ndarray, " n_tokens"]

    def __post_init__(self) -> None:
        shapes = {self.channel.shape, self.first.shape, self.last.shape}
        if len(shapes) > 1 or self.channel.ndim != 1 or not len(self.channel):
            raise UserError(
                f"channel, first and last of tokens must be arrays of one length, got {shapes}"
            )
        has_time = self.first >= 0
        is_valid = np.where(has_time, self.first <= self.last, self.last == -1)
        is_valid &= (self.channel >= -1) & (self.first >= -1)
        if not is_valid.all():
            i = int(np.argmin(is_valid))
            raise UserError(
                f"token {i} has channel {self.channel[i]} and samples {self.first[i]} to "
                f"{self.last[i]}; expected first <= last, and -1 for no channel or no samples"
            )
        if not has_time.any():
            raise UserError("no token has samples; a token of a whole window has all of them")

    @classmethod
    def patches(
        cls,
        n_patches: int,
        patch_len: int,
        stride: int | None = None,
        first_sample: int = 0,
        n_channels: int | None = None,
        n_cls: int = 0,
    ) -> "TokenGrid":
        """Return the grid of equal patches; patch p begins at `first_sample` + p * `stride`.

        stride: patch_len by default. n_channels: the tokens are the patches of channel 0, then
        those of channel 1, and so on; without it tokens have no channel. n_cls: tokens without
        channel and samples, before all others.

        >>> grid = TokenGrid.patches(2, patch_len=100, n_channels=2, n_cls=1)
        >>> grid.channel.tolist(), grid.first.tolist(), grid.last.tolist()
        ([-1, 0, 0, 1, 1], [-1, 0, 100, 0, 100], [-1, 99, 199, 99, 199])
        """
        begin = first_sample + np.arange(n_patches) * (stride or patch_len)
        channels = np.array([-1]) if n_channels is None else np.arange(n_channels)
        nowhere = np.full(n_cls, -1)
        first = np.concatenate([nowhere, np.tile(begin, len(channels))])
        return cls(
            channel=np.concatenate([nowhere, np.repeat(channels, n_patches)]),
            first=first,
            last=np.where(first < 0, -1, first + patch_len - 1),
        )

    @property
    def n_tokens(self) -> int:
        """Tokens per sequence."""
        return len(self.channel)

    @cached_property
    def located(self) -> Int[np.ndarray, " n"]:
        """Positions in a sequence of the tokens that have samples."""
        return np.flatnonzero(self.first >= 0)

    @cached_property
    def starts(self) -> Int[np.ndarray, " n_starts"]:
        """The distinct first samples, in order."""
        return np.unique(self.first[self.located])

    @cached_property
    def slot(self) -> Int[np.ndarray, " n_tokens"]:
        """Index into `starts` of every token, -1 for tokens without samples."""
        return np.where(self.first >= 0, np.searchsorted(self.starts, self.first), -1)

    @cached_property
    def step(self) -> int | None:
        """Samples from each start to the next; None if it varies.

        With a single start it is the length of the longest token.
        """
        if len(self.starts) == 1:
            return self.longest
        steps = np.unique(np.diff(self.starts))
        return int(steps[0]) if len(steps) == 1 else None

    @property
    def mean_step(self) -> int:
        """Samples from each start to the next, on average."""
        if self.step is not None:
            return self.step
        return int(np.diff(self.starts).mean())

    @property
    def longest(self) -> int:
        """Samples of the longest token."""
        return int((self.last - self.first)[self.located].max()) + 1

    def write(self, folder: Path) -> None:
        """Write tokens.npz."""
        arrays = {"channel": self.channel, "first": self.first, "last": self.last}
        write_npz(folder / TOKENS, {name: a.astype(np.int32) for name, a in arrays.items()})


def read_tokens(folder: Path) -> TokenGrid | None:
    """Return the grid of a store, or None if it has no tokens.npz.

    Raises UserError if the file is damaged.
    """
    path = folder / TOKENS
    if not path.exists():
        return None
    with reading(f"{path} is damaged", remedy="; remove the store and write it again"):
        arrays = read_npz(path)
        return TokenGrid(*(arrays[name].astype(int) for name in ("channel", "first", "last")))
