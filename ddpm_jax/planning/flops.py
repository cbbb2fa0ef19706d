"""The arithmetic of a traced program."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: ClosedJaxpr) -> float:
    """Multiplications and additions in the matrix products and convolutions of a traced program, of all devices.

    Everything else is negligible. A scan's body counts as often as it runs. Only the most expensive of several branches
    counts; if a backend has a cheaper formulation, that is the default one.
    """
    return _flops(jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, params["dimension_numbers"]
            taps = kernel.size / kernel.shape[numbers.rhs_spec[0]]  # per output feature, over all input channels
            dilation = math.prod(params["lhs_dilation"])  # the inserted zeros are not multiplied
            total += 2.0 * taps * equation.outvars[0].aval.size / dilation
        elif name == "cond":
            total += max(_flops(branch) for branch in params["branches"])
        else:
            inner = [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
            total += params.get("length", 1) * sum(map(_flops, inner))
    return total
