"""Owns the three GPU kernels of linear attention over Maclaurin monomials: accumulate a state, read it, differentiate.

A program evaluates tiles of ROWS monomials of a block of TOKENS tokens in registers; no feature ever reaches memory.
Legend: B batch, H heads, L length, D head_dim (DIM: padded), E columns of v (COLUMNS: padded), R monomials in tiles,
N = B H. Everything is computed in float32; PRECISION is how matrix products round their factors.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, stride, tokens, live, columns, width):
    """[TOKENS, columns] in float32, 0 where a token is not live and beyond the width. `base`: of the block's first
    token, so that the offsets of the others fit into 32 bits, which spares registers."""
    mask = live[:, None] & (columns < width)[None, :]
    return tl.load(base + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, stride, tokens, live, columns, width, x):
    mask = live[:, None] & (columns < width)[None, :]
    tl.store(base + tokens[:, None] * stride + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def normalize(x, columns, width, eps, UNIT: tl.constexpr):
    """unit(x) and the norms [TOKENS] it was divided by. UNIT: 0 leaves x, 1 divides, 2 takes the mean off first."""
    norms = tl.sum(x, 1) * 0.0 + 1.0
    if UNIT == 2:
        x = tl.where((columns < width)[None, :], x - (tl.sum(x, 1) / width)[:, None], 0.0)
    if UNIT > 0:
        norms = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), eps)
        # a padded row has norm 0, where eps may be 0 too
        x = x / tl.where(norms > 0.0, norms, 1.0)[:, None]
    return x, norms


@triton.jit
def prologue(unit, scale, shift, n, h, columns, width):
    """scale * unit - shift; `scale` [H] and `shift` [N, D] may be None."""
    x = unit
    if scale is not None:
        x = x * tl.load(scale + h)
    if shift is not None:
        x = x - tl.load(shift + n * width + columns, mask=columns < width, other=0.0)[None, :]
    return x


@triton.jit
def load_expanded(at, stride, tokens, live, eps, scale, shift, n, h, columns, width, UNIT: tl.constexpr):
    """What the monomials are of, [TOKENS, DIM], and of `normalize` the result and the norms."""
    unit, norms = normalize(load_rows(at, stride, tokens, live, columns, width), columns, width, eps, UNIT)
    return prologue(unit, scale, shift, n, h, columns, width), unit, norms


@triton.jit
def factor(x, matrix, bias, j, columns, rows, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """One factor of each of ROWS products, [TOKENS, ROWS]: a projection, or 1 where a product has fewer factors."""
    weights = tl.load(matrix + j * (DIM * ROWS) + columns[:, None] * ROWS + rows[None, :])
    return tl.dot(x, weights, input_precision=PRECISION) + tl.load(bias + j * ROWS + rows)[None, :]


@triton.jit
def pull_back(d_factor, matrix, j, columns, rows, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of x [TOKENS, DIM] from that of a factor."""
    weights = tl.load(matrix + j * (DIM * ROWS) + columns[:, None] * ROWS + rows[None, :])
    return tl.dot(d_factor, tl.trans(weights), input_precision=PRECISION)


@triton.jit
def evaluate(
    x, matrix, bias, first, last, columns, rows, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """The monomials of one tile, [TOKENS, ROWS]: the product of its factors first..last-1."""
    phi = factor(x, matrix, bias, first, columns, rows, ROWS, DIM, PRECISION)
    for j in range(first + 1, last):
        phi *= factor(x, matrix, bias, j, columns, rows, ROWS, DIM, PRECISION)
    return phi


@triton.jit
def are_live(inside, hidden, line, tokens):
    """Which of the tokens inside the sequence are not hidden, [TOKENS]; `hidden` [B, L] may be None."""
    live = inside
    if hidden is not None:
        live = live & (tl.load(hidden + line + tokens, mask=live, other=1) == 0)
    return live


@triton.jit
def with_constants(phi, constants, line, tokens, live, tile, rows, ROWS: tl.constexpr):
    """The first monomial of the first tile times the tokens' own constants [N, L], which may be None."""
    if constants is not None:
        own = tl.load(constants + line + tokens, mask=live, other=0.0)
        phi *= tl.where((tile * ROWS + rows == 0)[None, :], own[:, None], 1.0)
    return phi


@triton.jit
def load_weighted(u, stride, inverse, w, line, tokens, live, columns, width):
    """inverse u [TOKENS, columns] and w [TOKENS]; `inverse` and `w` [N, L] are 1 where they are None."""
    weights = live.to(tl.float32)
    if w is not None:
        weights = tl.load(w + line + tokens, mask=live, other=0.0)
    given = load_rows(u, stride, tokens, live, columns, width)
    if inverse is not None:
        given *= tl.load(inverse + line + tokens, mask=live, other=0.0)[:, None]
    return given, weights


@triton.jit
def through_prologue(gradient, unit, norms, eps, scale, h, width, UNIT: tl.constexpr):
    """The gradient of what `normalize` and `prologue` were given, from that of what they gave."""
    if scale is not None:
        gradient *= tl.load(scale + h)
    if UNIT > 0:
        along = tl.where(norms > eps, tl.sum(unit * gradient, 1), 0.0)
        gradient = (gradient - unit * along[:, None]) / tl.where(norms > 0.0, norms, 1.0)[:, None]
    if UNIT == 2:
        gradient -= (tl.sum(gradient, 1) / width)[:, None]
    return gradient


@triton.jit
def divisor(x, floor, POLICY: tl.constexpr):
    """`attention.normalizers.Normalizer.divisor`, its constant already multiplied by the number of keys."""
    result = x
    if POLICY == "sum" or POLICY == "clamp_min":
        result = tl.maximum(x, floor)
    elif POLICY == "sum_plus":
        result = x + floor
    elif POLICY == "abs_clamp":
        result = tl.maximum(tl.abs(x), floor)
    elif POLICY == "signed_clamp":
        result = tl.where(x < 0.0, -1.0, 1.0) * tl.maximum(tl.abs(x), floor)
    return result


@triton.jit
def accumulate_kernel(
    x, u, inverse, w, hidden, constants, scale, shift, matrix, bias, starts, sums, totals,
    xb, xh, xl, ub, uh, ul, num_examples, num_heads, length, tiles, width, num_columns, piece, eps,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """sums [splits, N, R, COLUMNS] = sum_l phi(x_l) (inverse_l u_l)^T and totals [splits, N, R] = sum_l phi(x_l) w_l.

    One program per tile, example and head, and piece of L; `inverse` and `w` [N, L] are 1 where they are None.
    """
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    n = (rest % (num_examples * num_heads)).to(tl.int64)
    split = (rest // (num_examples * num_heads)).to(tl.int64)
    b, h = n // num_heads, n % num_heads
    columns, values, rows = tl.arange(0, DIM), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    first, last = tl.load(starts + tile), tl.load(starts + tile + 1)
    state = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    tokens = tl.arange(0, TOKENS)
    for at in range(0, piece, TOKENS):
        start = split * piece + at
        line = n * length + start  # of the tensors [N, L]
        live = are_live(tokens < length - start, hidden, b * length + start, tokens)
        at_x = x + b * xb + h * xh + start * xl
        part, _, _ = load_expanded(at_x, xl, tokens, live, eps, scale, shift, n, h, columns, width, UNIT)
        phi = evaluate(part, matrix, bias, first, last, columns, rows, ROWS, DIM, PRECISION)
        phi = with_constants(phi, constants, line, tokens, live, tile, rows, ROWS)
        at_u = u + b * ub + h * uh + start * ul
        given, weights = load_weighted(at_u, ul, inverse, w, line, tokens, live, values, num_columns)
        state += tl.dot(tl.trans(phi), given, input_precision=PRECISION)
        total += tl.sum(phi * weights[:, None], 0)
    row = ((split * num_examples * num_heads + n) * tiles + tile) * ROWS + rows
    tl.store(sums + row[:, None] * COLUMNS + values[None, :], state)
    tl.store(totals + row, total)


@triton.jit
def read_kernel(
    x, hidden, constants, scale, shift, matrix, bias, starts, sums, totals, floors, out, denominators,
    xb, xh, xl, ob, oh, ol, num_examples, num_heads, length, tiles, width, num_columns, eps,
    UNIT: tl.constexpr, POLICY: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [B, H, L, E] = phi(x) . sums over the divisor of phi(x) . totals; rows of hidden tokens are 0.

    `floors` [B]: the policy's constant. `denominators` [N, L], or None where nobody wants them.
    """
    n = (tl.program_id(0) % (num_examples * num_heads)).to(tl.int64)
    start = (tl.program_id(0) // (num_examples * num_heads)).to(tl.int64) * TOKENS
    tokens, line = tl.arange(0, TOKENS), n * length + start  # `line`: of the tensors [N, L]
    b, h = n // num_heads, n % num_heads
    columns, values, rows = tl.arange(0, DIM), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    inside = tokens < length - start
    live = are_live(inside, hidden, b * length + start, tokens)
    at_x = x + b * xb + h * xh + start * xl
    part, _, _ = load_expanded(at_x, xl, tokens, live, eps, scale, shift, n, h, columns, width, UNIT)
    result = tl.zeros([TOKENS, COLUMNS], tl.float32)
    denominator = tl.zeros([TOKENS], tl.float32)
    for tile in range(tiles):
        first, last = tl.load(starts + tile), tl.load(starts + tile + 1)
        phi = evaluate(part, matrix, bias, first, last, columns, rows, ROWS, DIM, PRECISION)
        phi = with_constants(phi, constants, line, tokens, live, tile, rows, ROWS)
        row = (n * tiles + tile) * ROWS + rows
        state = tl.load(sums + row[:, None] * COLUMNS + values[None, :])
        result += tl.dot(phi, state, input_precision=PRECISION)
        denominator += tl.sum(phi * tl.load(totals + row)[None, :], 1)
    if POLICY != "none":
        result = result / divisor(denominator, tl.load(floors + b), POLICY)[:, None]
    result = tl.where(live[:, None], result, 0.0)
    store_rows(out + b * ob + h * oh + start * ol, ol, tokens, inside, values, num_columns, result)
    if denominators is not None:
        tl.store(denominators + line + tokens, denominator, mask=inside)


@triton.jit
def differentiate_kernel(
    x, u, inverse, w, hidden, constants, scale, shift, matrix, bias, starts, sums, totals,
    d_x, d_constants, d_scale, d_shift,
    xb, xh, xl, ub, uh, ul, gb, gh, gl, num_examples, num_heads, length, tiles, width, num_columns, eps,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradient of x where that of phi(x_l) is sums (inverse_l u_l) + totals w_l, 0 for hidden tokens.

    Also those of constants [N, L] and, per block of tokens, of scale [blocks, N] and shift [blocks, N, D].
    """
    n = (tl.program_id(0) % (num_examples * num_heads)).to(tl.int64)
    block = (tl.program_id(0) // (num_examples * num_heads)).to(tl.int64)
    start = block * TOKENS
    tokens, line = tl.arange(0, TOKENS), n * length + start  # `line`: of the tensors [N, L]
    b, h = n // num_heads, n % num_heads
    columns, values, rows = tl.arange(0, DIM), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    inside = tokens < length - start
    live = are_live(inside, hidden, b * length + start, tokens)
    at_x = x + b * xb + h * xh + start * xl
    part, unit, norms = load_expanded(at_x, xl, tokens, live, eps, scale, shift, n, h, columns, width, UNIT)
    at_u = u + b * ub + h * uh + start * ul
    given, weights = load_weighted(at_u, ul, inverse, w, line, tokens, live, values, num_columns)
    gradient = tl.zeros([TOKENS, DIM], tl.float32)
    of_constants = tl.zeros([TOKENS], tl.float32)
    for tile in range(tiles):
        first, last = tl.load(starts + tile), tl.load(starts + tile + 1)
        row = (n * tiles + tile) * ROWS + rows
        state = tl.load(sums + row[:, None] * COLUMNS + values[None, :])
        d_phi = tl.dot(given, tl.trans(state), input_precision=PRECISION)
        d_phi += weights[:, None] * tl.load(totals + row)[None, :]
        if constants is not None:
            of_constants += tl.sum(tl.where((tile * ROWS + rows == 0)[None, :], d_phi, 0.0), 1)
        # d_phi becomes, factor by factor from the last, d_phi times all later ones. The earlier ones are evaluated
        # again each time: no array of them fits into registers, and all but the first tile have few
        for back in range(first + 1, last):
            j = first + last - back
            others = d_phi
            for i in range(first, j):
                others *= factor(part, matrix, bias, i, columns, rows, ROWS, DIM, PRECISION)
            gradient += pull_back(others, matrix, j, columns, rows, ROWS, DIM, PRECISION)
            d_phi *= factor(part, matrix, bias, j, columns, rows, ROWS, DIM, PRECISION)
        gradient += pull_back(d_phi, matrix, first, columns, rows, ROWS, DIM, PRECISION)
    if constants is not None:
        tl.store(d_constants + line + tokens, of_constants, mask=inside)
    at = block * num_examples * num_heads + n
    if shift is not None:
        tl.store(d_shift + at * width + columns, -tl.sum(gradient, 0), mask=columns < width)
    if scale is not None:
        tl.store(d_scale + at, tl.sum(tl.sum(unit * gradient, 1), 0))
    gradient = through_prologue(gradient, unit, norms, eps, scale, h, width, UNIT)
    store_rows(d_x + b * gb + h * gh + start * gl, gl, tokens, inside, columns, width, gradient)


@triton.jit
def slope_kernel(
    d_out, out, slope, w, db, dh, dl, ob, oh, ol, num_examples, num_heads, length, num_columns,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """w [N, L] = slope * (d_out . out): the gradient of the denominators."""
    n = (tl.program_id(0) % (num_examples * num_heads)).to(tl.int64)
    start = (tl.program_id(0) // (num_examples * num_heads)).to(tl.int64) * TOKENS
    tokens, line = tl.arange(0, TOKENS), n * length + start  # `line`: of the tensors [N, L]
    b, h = n // num_heads, n % num_heads
    values, inside = tl.arange(0, COLUMNS), tokens < length - start
    left = load_rows(d_out + b * db + h * dh + start * dl, dl, tokens, inside, values, num_columns)
    right = load_rows(out + b * ob + h * oh + start * ol, ol, tokens, inside, values, num_columns)
    result = tl.sum(left * right, 1) * tl.load(slope + line + tokens, mask=inside, other=0.0)
    tl.store(w + line + tokens, result, mask=inside)
