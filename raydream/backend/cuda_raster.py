"""Triton kernel of rasterising; its plain torch twin is in ``reference.py``, whose operations and their order it has.

Only ``cuda.py`` imports this module, because it needs triton.
"""

from typing import no_type_check

import triton
import triton.language as tl


# no_type_check keeps jaxtyping's import hook from wrapping what triton has to compile.
@triton.jit
@no_type_check
def depth_test(
    corners,
    spans,
    nearest,
    lowest,
    num_faces,
    num_pixels,
    width_px,
    splits,
    WINNERS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The least depth at each pixel; and with ``WINNERS``, for which that must stand there, the first face that has it.

    A program takes a face in a view, and every ``splits``-th part of ``PIXELS`` of its box. ``corners`` are x, y and w
    of its corners; ``spans`` its first column and row, their numbers, and their product or 0 where it is not seen.
    Depths are not negative: their bits are in their order.
    """
    face, view = tl.program_id(0), tl.program_id(1)
    at = view.to(tl.int64) * num_faces + face
    left, top, num_columns, count = _span(spans, at, 0), _span(spans, at, 1), _span(spans, at, 2), _span(spans, at, 4)
    for first in range(tl.program_id(2) * PIXELS, count, splits * PIXELS):
        place = first + tl.arange(0, PIXELS)
        column, row = left + place % num_columns, top + place // num_columns
        x0, y0, w0 = _corner(corners, at * 9, column, row)
        x1, y1, w1 = _corner(corners, at * 9 + 3, column, row)
        x2, y2, w2 = _corner(corners, at * 9 + 6, column, row)
        area0, area1, area2 = x1 * y2 - y1 * x2, x2 * y0 - y2 * x0, x0 * y1 - y0 * x1
        total = area0 + area1 + area2
        one_side = ((area0 >= 0) & (area1 >= 0) & (area2 >= 0)) | ((area0 <= 0) & (area1 <= 0) & (area2 <= 0))
        inside = one_side & (total != 0) & (place < count)
        normalizer = _divide(area0, w0) + _divide(area1, w1) + _divide(area2, w2)
        depth = _divide(total, tl.where(inside, normalizer, 1)).to(nearest.dtype.element_ty, bitcast=True)
        pixel = view.to(tl.int64) * num_pixels + row * width_px + column
        if WINNERS:
            won = inside & (depth == tl.load(nearest + pixel, mask=inside, other=0))
            tl.atomic_min(lowest + pixel, place * 0 + face, mask=won, sem="relaxed")
        else:
            tl.atomic_min(nearest + pixel, depth, mask=inside, sem="relaxed")


@triton.jit
@no_type_check
def _span(spans, at, which: tl.constexpr):
    return tl.load(spans + at * 5 + which)


@triton.jit
@no_type_check
def _corner(corners, at, column, row):
    """A corner as seen from pixel centres."""
    x, y, w = tl.load(corners + at), tl.load(corners + at + 1), tl.load(corners + at + 2)
    return x - (column.to(x.dtype) + 0.5), y - (row.to(y.dtype) + 0.5), w


@triton.jit
@no_type_check
def _divide(a, b):
    # A plain quotient of 32 bits is only close on a GPU.
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b
