"""Batches: every token once per epoch, in an order given by seed and position alone."""

import json

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.activations import stream
from minsae_jax.activations.store import open_store
from minsae_jax.parallel.processes import WHOLE, Share
from tests.chunks import read_chunks


@pytest.fixture
def numbered(tmp_path):
    """Four shards of different lengths whose 2,000 tokens are numbered."""
    start = 0
    for i, rows in enumerate((700, 650, 600, 50)):
        x = np.arange(start, start + rows, dtype=np.float32)[:, None].repeat(2, 1)
        np.save(tmp_path / f"b{i:04d}.npy", x.reshape(-1, 10, 2))
        start += rows
    return open_store(tmp_path, -1)


def take(it, count):
    return np.concatenate([next(it)[:, 0] for _ in range(count)]).astype(int)


def test_chunks_cover_the_store(numbered):
    chunks = [read_chunks(numbered, [i])[:, 0] for i in range(numbered.n_chunks)]
    assert [len(c) for c in chunks] == [256, 256, 188, 256, 256, 138, 256, 256, 88, 50]
    assert np.concatenate(chunks).tolist() == list(range(2000))
    some = [9, 0, 3, 2]
    np.testing.assert_array_equal(
        read_chunks(numbered, some)[:, 0], np.concatenate([chunks[i] for i in some])
    )


@pytest.mark.parametrize("chunks", [256, 5, 3])
def test_every_token_appears_once_per_epoch(numbered, monkeypatch, chunks):
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER_TOKENS", 256 * chunks)
    epochs = take(stream.shuffled_tokens(numbered, 80, 0), 25 * 4).reshape(4, 2000)
    for i, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(2000))
        for other in epochs[:i]:
            assert (epoch != other).mean() > 0.9


def test_seed_alone_determines_a_random_order(numbered):
    one, same, other = (stream.shuffled_tokens(numbered, 100, seed) for seed in (0, 0, 1))
    a, b, c = take(one, 40), take(same, 40), take(other, 40)
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.9
    assert (np.diff(a) == 1).mean() < 0.05  # neighbours are separated
    assert np.abs(np.diff(a)).mean() > 400  # and far apart: 667 where the order is random


def test_store_smaller_than_a_batch_is_repeated(numbered):
    batch = next(stream.shuffled_tokens(numbered, 5000, 0))
    assert batch.shape == (5000, 2)
    assert batch.dtype == np.float32
    assert len(np.unique(batch)) == 2000


@pytest.mark.parametrize(
    "make", [lambda s: stream.shuffled_tokens(s, 300, 0), lambda s: stream.files_in_order(s, 1)]
)
@pytest.mark.parametrize("cut", [0, 1, 7, 23])
def test_restored_position_continues_with_the_same_batches(numbered, monkeypatch, make, cut):
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER_TOKENS", 256 * 4)
    it = make(numbered)
    for _ in range(cut):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    expected = [next(it) for _ in range(30)]
    fresh = make(numbered)
    fresh.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(fresh), batch)


@pytest.mark.parametrize("count", [1, 2, 3, 16])  # 16: more processes than chunks
@pytest.mark.parametrize(
    "make",
    [
        lambda s, share: stream.shuffled_tokens(s, 300, 0, share),
        lambda s, share: stream.files_in_order(s, 2, share),
    ],
)
def test_shares_add_up_to_the_batches(numbered, monkeypatch, make, count):
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER_TOKENS", 256 * 4)
    whole = make(numbered, WHOLE)
    shares = [make(numbered, Share(i, count)) for i in range(count)]
    for _ in range(25):
        expected = next(whole)
        parts = np.stack([next(share) for share in shares])
        # Token 0 is 0 itself; every other one is in a single share.
        is_read = (parts != 0).any(2)
        assert is_read.sum(0).tolist() == expected.any(1).astype(int).tolist()
        np.testing.assert_array_equal(parts.sum(0), expected)


def test_position_is_the_same_for_any_number_of_processes(numbered, monkeypatch):
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER_TOKENS", 256 * 4)
    it = stream.shuffled_tokens(numbered, 300, 0, Share(1, 2))
    for _ in range(7):
        next(it)
    whole = stream.shuffled_tokens(numbered, 300, 0)
    for _ in range(7):
        next(whole)
    assert it.get_state() == whole.get_state()
    resumed = [stream.shuffled_tokens(numbered, 300, 0, Share(i, 3)) for i in range(3)]
    for share in resumed:
        share.set_state(it.get_state())
    for _ in range(10):
        np.testing.assert_array_equal(sum(map(next, resumed)), next(whole))


def test_files_in_order_yields_whole_shards(numbered):
    it = stream.files_in_order(numbered, 3)
    for _ in range(3):  # the fourth shard does not fill a group
        assert next(it)[:, 0].tolist() == list(range(1950))
    lengths = [len(b) for b, _ in zip(stream.files_in_order(numbered, 1), range(5), strict=False)]
    assert lengths == [700, 650, 600, 50, 700]
    with pytest.raises(UserError, match="--number_of_arrays 5 is more than the 4 files"):
        stream.files_in_order(numbered, 5)
