"""The recurrence of an LSTM for the CPU.

Each step waits for the one before, so what counts is the cost of a small step: in MLX a dozen
kernels, and a matrix product that first packs all weights to multiply them by one vector. numpy
multiplies by the vector directly and is eight times faster (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import numpy as np

from funasr_batch.records import FloatArray


def lstm(inputs: FloatArray, recurrent: FloatArray) -> FloatArray:
    """Hidden states float32 [T, D], from zero states on.

    `inputs` [T, 4 D] is what each step's gates receive from outside, biases included; `recurrent`
    [4 D, D] is `weight_hh`. Both in PyTorch's order of gates: input, forget, cell, output.
    """
    width = recurrent.shape[1]
    # sigmoid(x) = tanh(x / 2) / 2 + 1/2, so that one tanh serves all four gates.
    scale = np.full(4 * width, 0.5, np.float32)
    offset = np.full(4 * width, 0.5, np.float32)
    scale[2 * width : 3 * width] = 1
    offset[2 * width : 3 * width] = 0

    gates = np.empty(4 * width, np.float32)
    taken, kept, new, shown = np.split(gates, 4)
    cell = np.zeros(width, np.float32)
    hidden = np.zeros(width, np.float32)
    states = np.empty((len(inputs), width), np.float32)
    for state, received in zip(states, inputs, strict=True):
        np.matmul(recurrent, hidden, out=gates)
        gates += received
        gates *= scale
        np.tanh(gates, out=gates)
        gates *= scale
        gates += offset
        cell *= kept
        new *= taken
        cell += new
        np.tanh(cell, out=state)
        state *= shown
        hidden = state
    return states
