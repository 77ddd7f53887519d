"""Device functions that the kernels over maps share: walking the four routes, softplus, the recurrence.

A pair of opposite routes (0 and 2 by rows, 1 and 3 by columns) is walked by one program. Its tiles [ROWS, SPLITS,
2 * DB] hold T = ROWS * SPLITS steps of DB channels of the forward route beside the same channels of the backward
route; step s * ROWS + r lies at [r, s]. In the layout that Triton gives such tiles a thread owns ROWS steps of a
column, so that scans over the first axis stay inside threads, and warps share the splits and the columns.
"""

import triton
import triton.language as tl


@triton.jit
def route_of_pair(pair, height, width, magic, T: tl.constexpr, WRAP: tl.constexpr):
    """How the forward route of a pair walks: step l lies at (l % line) * step + l // line.

    Returns:
        line: Steps until the route turns to the next line; by rows the whole map is one line.
        step: Distance of neighbouring steps on the map.
        jump: What a turn adds, 1 - line * step.
        magic: ceil(2**32 / line); the last two are 0 where nothing turns.
        tiles: Tiles of a line; with WRAP tiles cross the ends of lines, so that they form one.
        lines: Lines of the map; 1 with WRAP.
    """
    columns = (pair == 1) & (height > 1)
    line = tl.where(columns, height, height * width)
    step = tl.where(columns, width, 1)
    jump = tl.where(columns, 1 - height * width, 0)
    magic = tl.where(columns, magic, 0)
    if WRAP:
        tiles = tl.cdiv(height * width, T)
        lines = tl.where(columns, 1, 1)
    else:
        tiles = tl.cdiv(line, T)
        lines = tl.where(columns, width, 1)
    return line, step, jump, magic, tiles, lines


@triton.jit
def walk(
    steps,
    tile,
    backward,
    seqlen,
    line,
    step,
    jump,
    magic,
    tiles,
    lines,
    T: tl.constexpr,
    WRAP: tl.constexpr,
):
    """Where steps of tiles of T steps lie on the map.

    Args:
        steps: Numbers of the steps in the walk through the tile.
        tile: The tile's number in the order of the forward route.
        backward: 1 where the tile is walked from its last step to its first, else 0.
        seqlen: Pixels of the map.
        line, step, jump, magic, tiles, lines: See `route_of_pair`.

    Returns:
        Positions in the broadcast shape of the first three, and which of them exist; the others are 0.
    """
    start = backward * (T - 1)
    direction = 1 - 2 * backward
    offset = start + direction * steps
    if WRAP:
        first = tile * T
        line_of_first = first // line
        within = first - line_of_first * line
        exists = offset < seqlen - first
        along = within + offset
        turns = tl.umulhi(along.to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)
        position = along * step + line_of_first + turns * jump
    else:
        line_of_tile = tile // tiles
        within = (tile - line_of_tile * tiles) * T
        exists = offset < tl.where(line_of_tile < lines, line - within, 0)
        position = ((within + start) * step + line_of_tile) + (direction * step) * steps
    return tl.where(exists, position, 0), exists


@triton.jit
def _step_after_with_before(decay0, value0, lead_decay0, lead_value0, decay1, value1, lead_decay1, lead_value1):
    """Composes two steps h -> decay * h + value, the first one first; and the same without the last step."""
    return (
        decay0 * decay1,
        decay1 * value0 + value1,
        decay0 * lead_decay1,
        lead_decay1 * value0 + lead_value1,
    )


@triton.jit
def _pick(x, index, SIZE: tl.constexpr):
    """x[index] in fp32; as integers, since the compiler removes integer additions of 0."""
    rows = tl.arange(0, SIZE)
    rows = tl.reshape(rows, [SIZE] + [1] * (len(x.shape) - 1))
    bits = x.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(rows == index, bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def recur(decay, value, carry, ROWS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """h = decay * (h of the step before) + value along a tile [ROWS, SPLITS, COLUMNS] in order of (split, row).

    Args:
        carry: State before the tile [COLUMNS].

    Returns:
        States, states before each step, the state before each split [SPLITS, COLUMNS] and after the tile [COLUMNS].
    """
    # -0.0, because the compiler removes additions of it.
    nothing = tl.full([ROWS, SPLITS, COLUMNS], -0.0, tl.float32)
    one = tl.full([ROWS, SPLITS, COLUMNS], 1.0, tl.float32)
    if SPLITS == 1:
        first = tl.arange(0, ROWS)[:, None, None] == 0
        value = tl.where(first, decay * carry[None, None, :] + value, value)
        before = tl.where(first, carry[None, None, :], nothing)
        decays, h, leads, before = tl.associative_scan((decay, value, one, before), 0, _step_after_with_before)
        return h, before, carry[None, :], tl.reshape(_pick(h, ROWS - 1, ROWS), [COLUMNS])
    else:
        # Threads scan their rows from zero; what arrives at each split then decays through its rows.
        decays, h, leads, before = tl.associative_scan((decay, value, one, nothing), 0, _step_after_with_before)
        through = _pick(decays, ROWS - 1, ROWS)
        end = _pick(h, ROWS - 1, ROWS)
        first = tl.arange(0, SPLITS)[:, None] == 0
        end = tl.where(first, through * carry[None, :] + end, end)
        arriving = tl.where(first, carry[None, :], tl.full([SPLITS, COLUMNS], 0.0, tl.float32))
        unit = tl.full([SPLITS, COLUMNS], 1.0, tl.float32)
        through, end, unit, arriving = tl.associative_scan((through, end, unit, arriving), 0, _step_after_with_before)
        carry = _pick(end, SPLITS - 1, SPLITS)
        return h + decays * arriving[None, :, :], before + leads * arriving[None, :, :], arriving, carry


@triton.jit
def recur_back(decay, value, carry, ROWS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """g = value + (decay * g of the step after) against the order of `recur`; carry is decay * g of the step after all.

    Returns:
        decay * g of the step after each step, and decay * g of the first step [COLUMNS].
    """
    # Free, since threads own whole columns of rows: the compiler renames registers.
    decay = tl.flip(decay, 0)
    value = tl.flip(value, 0)
    nothing = tl.full([ROWS, SPLITS, COLUMNS], -0.0, tl.float32)
    one = tl.full([ROWS, SPLITS, COLUMNS], 1.0, tl.float32)
    if SPLITS == 1:
        first = tl.arange(0, ROWS)[:, None, None] == 0
        value = decay * tl.where(first, value + carry[None, None, :], value)
        after = tl.where(first, carry[None, None, :], nothing)
        decays, g, leads, after = tl.associative_scan((decay, value, one, after), 0, _step_after_with_before)
        return tl.flip(after, 0), tl.reshape(_pick(g, ROWS - 1, ROWS), [COLUMNS])
    else:
        decays, g, leads, after = tl.associative_scan((decay, decay * value, one, nothing), 0, _step_after_with_before)
        through = tl.flip(_pick(decays, ROWS - 1, ROWS), 0)
        end = tl.flip(_pick(g, ROWS - 1, ROWS), 0)
        first = tl.arange(0, SPLITS)[:, None] == 0
        end = tl.where(first, through * carry[None, :] + end, end)
        arriving = tl.where(first, carry[None, :], tl.full([SPLITS, COLUMNS], 0.0, tl.float32))
        unit = tl.full([SPLITS, COLUMNS], 1.0, tl.float32)
        through, end, unit, arriving = tl.associative_scan((through, end, unit, arriving), 0, _step_after_with_before)
        carry = _pick(end, SPLITS - 1, SPLITS)
        arriving = tl.flip(arriving, 0)
        return tl.flip(after + leads * arriving[None, :, :], 0), carry


@triton.jit
def _second(first, second):
    return second


@triton.jit
def by_column(x, ROWS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS * SPLITS, COLUMNS] as [ROWS, SPLITS, COLUMNS], whose columns of rows are owned by threads.

    A scan without effect, where the compiler changes the layout of a product. Without it what follows a product is
    computed in the product's layout and converted piece by piece.
    """
    return tl.associative_scan(tl.reshape(x, [ROWS, SPLITS, COLUMNS]), 0, _second)
