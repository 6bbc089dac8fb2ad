"""Batches of a run on the devices, from the stream or from a store in the devices' memory."""

import numpy as np
from jaxtyping import Array, Float, Shaped

from minsae_jax.parallel.mesh import DATA, on_cpu
from minsae_jax.sae.config import TrainPlan
from minsae_jax.sae.data import TrainData, open_stream
from minsae_jax.sae.resident import open_resident
from minsae_jax.sae.sweep import Sweep
from minsae_jax.settings import JsonObject

# Steps that an accelerator makes in one call. A call and its batches take the host of an H200
# 2.5 ms. In this time the H200 makes nine steps of 8 members of 1,024 features.
STEPS_PER_CALL = 10
# The same if steps are short and nothing else is ever to be done between those of a call.
LONG_CALL = 50
# Features of the largest group on a device, times tokens of a batch, of a short step: 1 ms for ReLU
# in bfloat16 on an H200.
SHORT_STEP = 2**27
# Batches of one call are this large at most, in bytes.
CALL_BYTES = 2**28


class DeviceBatches:
    """The batches of a run from its first, or from the position of a checkpoint."""

    def __init__(self, plan: TrainPlan, data: TrainData, sweep: Sweep):
        self._sweep = sweep
        self._num_steps = plan.optimizer.num_steps
        # Steps at whose multiples something else is to be done.
        self._intervals = [plan.config.eval_window, plan.config.checkpoint_every]
        if data.held_out:
            self._intervals.append(plan.config.eval_every)
        self._steps_per_call = 1
        # minSAE's batches are whole files, which may differ in size.
        if not on_cpu() and plan.number_of_arrays == 0:
            batch_bytes = plan.batch_size * data.store.d_model * 4
            self._steps_per_call = self._choose_steps_per_call(plan, CALL_BYTES // batch_bytes)
        # With the store on the devices, the stream yields the numbers of its tokens.
        self._resident = open_resident(plan.config.resident, sweep.mesh, data.store)
        self._stream = data.stream
        if self._resident is not None:
            self._stream = open_stream(plan, self._resident.row_numbers)

    def _choose_steps_per_call(self, plan: TrainPlan, largest: int) -> int:
        """Return how many steps a call of several makes, at most `largest`."""
        is_short = self._sweep.program.n_features * plan.batch_size <= SHORT_STEP
        is_interrupted = any(interval % LONG_CALL for interval in self._intervals)
        if is_short and not is_interrupted and min(largest, self._num_steps) >= LONG_CALL:
            return LONG_CALL
        return STEPS_PER_CALL if largest >= STEPS_PER_CALL else 1

    def steps_in_call(self, step: int) -> int:
        """Return how many steps the call after `step` steps is to make: 1 or the number per call.

        It depends on `step`, settings and devices only: a resumed run makes the same calls.
        Calls of several steps start at multiples of their number, and end where something else is
        to be done.
        """
        n_steps = self._steps_per_call
        last = step + n_steps - 1
        is_interrupted = any(last // n > step // n for n in self._intervals)
        if step % n_steps or last >= self._num_steps or is_interrupted:
            return 1
        return n_steps

    def read(self, n_steps: int) -> Shaped[np.ndarray, "*steps tokens width"]:
        """Return the stream's next batch, or several, stacked, for `put`."""
        if n_steps == 1:
            return next(self._stream)
        return np.stack([next(self._stream) for _ in range(n_steps)])

    def put(
        self, x: Shaped[np.ndarray, "*steps tokens width"]
    ) -> Float[Array, "*steps rows d_model"]:
        """Return the batches on the devices."""
        if self._resident is None:
            return self._sweep.put(x)
        rows = x[..., 0]
        n_rows = self._sweep.mesh.shape[DATA] * self._sweep.rows_per_device(rows.shape[-1])
        return self._resident.gather(rows, n_rows)

    def position(self) -> JsonObject:
        """Return the position in the stream, for a checkpoint."""
        return self._stream.get_state()

    def go_to(self, position: JsonObject) -> None:
        self._stream.set_state(position)
