"""Files of runs that tests train."""

from dataclasses import replace

import numpy as np


def table(path):
    return np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))


def files(folder, *names):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for name in names
        for p in sorted(folder.rglob(name))
    }


def minsae(settings):
    """The same under the other recipe."""
    return replace(settings, recipe="minsae", batch_size=None, num_steps=40)
