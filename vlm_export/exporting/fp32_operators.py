"""Operators that no precision but float32 may compute: the manifest lists them for other tools."""

from __future__ import annotations

from torch import nn

from vlm_export.family import Part

# Half the smallest positive float16: what is below becomes zero.
_SMALLEST_FLOAT16 = 2.0**-25


def fp32_operators(part: Part) -> tuple[str, ...]:
    """Names of the norms that float16 breaks.

    Layer norms whose epsilon is zero in float16: a constant row would be divided by zero. RMS norms: they square what
    they normalise, and a residual stream's outliers exceed 256. A name is a module's: the graph's LayerNormalization,
    or its parts, reads the initializer `<name>.weight`.
    """
    return tuple(
        name
        for name, module in part.module.named_modules()
        if isinstance(module, nn.RMSNorm) or (isinstance(module, nn.LayerNorm) and module.eps <= _SMALLEST_FLOAT16)
    )
