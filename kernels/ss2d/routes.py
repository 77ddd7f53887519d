"""Device functions of the scans over maps: how the routes walk, the recurrence along them, and loads.

A pair of opposite routes (0 and 2 by rows, 1 and 3 by columns) is walked by one program. Its tiles [STEPS, SPLITS,
2 * BLOCK_D] hold BLOCK_L = STEPS * SPLITS steps of BLOCK_D channels of the forward route, beside the same channels of
the backward route; step s * STEPS + r lies at [r, s]. In the layout that Triton gives such tiles a thread owns STEPS
steps of a column, so that scans over the first axis stay inside threads, and warps share the splits and the columns.

`plane` stands for (height, width, magic); see `line_of` for the last.
"""

from .._device import MAX_DECAY, flip_first, last_of_axis
from .._launch import tl, triton


@triton.jit
def route_of_pair(pair, plane, BLOCK_L: tl.constexpr, WRAP: tl.constexpr):
    """How the forward route of a pair walks: step l lies at (l % line) * step + l // line.

    Returns:
        line: Steps until the route turns to the next line; by rows the whole map is one line.
        step: Distance of neighbouring steps on the map.
        jump: What a turn adds, 1 - line * step.
        magic: See `line_of`; the last two are 0 where nothing turns.
        tiles: Tiles of a line; with WRAP tiles cross the ends of lines, so that they form one.
        lines: Lines of the map; 1 with WRAP.
    """
    height, width, magic = plane
    columns = (pair == 1) & (height > 1)
    line = tl.where(columns, height, height * width)
    step = tl.where(columns, width, 1)
    jump = tl.where(columns, 1 - height * width, 0)
    magic = tl.where(columns, magic, 0)
    if WRAP:
        tiles = tl.cdiv(height * width, BLOCK_L)
        lines = tl.where(columns, 1, 1)
    else:
        tiles = tl.cdiv(line, BLOCK_L)
        lines = tl.where(columns, width, 1)
    return line, step, jump, magic, tiles, lines


@triton.jit
def offsets_of(backward, count, BLOCK_L: tl.constexpr):
    """Offsets in the order of the forward route of steps that are counted from where a route enters the tile."""
    return backward * (BLOCK_L - 1) + (1 - 2 * backward) * count


@triton.jit
def walk(offset, backward, tile, tile_back, pair, plane, BLOCK_L: tl.constexpr, WRAP: tl.constexpr):
    """Where steps of a pair's two tiles lie on the map.

    Args:
        offset: Of the steps from the start of their tile; see `offsets_of`.
        backward: 1 where a step belongs to the backward route, else 0.
        tile, tile_back: Numbers of the routes' tiles in the order of the forward route. What is computed of them, and
            of the route, is the same for all threads, and computed once however often this is called.
        pair, plane: See `route_of_pair`.

    Returns:
        Positions in the broadcast shape of offset and backward, and which of them exist; the others are 0.
    """
    route = route_of_pair(pair, plane, BLOCK_L, WRAP)
    line, step, jump, magic, tiles, lines = route
    seqlen = plane[0] * plane[1]
    start, within, limit = _tile_start(tile, seqlen, route, BLOCK_L, WRAP)
    start_back, within_back, limit_back = _tile_start(tile_back, seqlen, route, BLOCK_L, WRAP)
    exists = offset < tl.where(backward == 0, limit, limit_back)
    position = tl.where(backward == 0, start, start_back) + offset * step
    if WRAP:
        along = tl.where(backward == 0, within, within_back) + offset
        position += _divide(along, magic) * jump
    return tl.where(exists, position, 0), exists


@triton.jit
def _tile_start(tile, seqlen, route, BLOCK_L: tl.constexpr, WRAP: tl.constexpr):
    """Where a tile starts on the map and on its line, and the steps that follow on the line (with WRAP, on the map)."""
    line, step, jump, magic, tiles, lines = route
    if WRAP:
        first = tile * BLOCK_L
        number = _quotient(first, line, magic)
        within = first - number * line
        limit = seqlen - first
    else:
        number = line_of(tile, magic, tiles)
        within = (tile - number * tiles) * BLOCK_L
        limit = tl.where(number < lines, line - within, 0)
    return within * step + number, within, limit


@triton.jit
def line_of(tile, magic, tiles):
    """The line of a tile; where tiles end with lines magic is ceil(2**32 / tiles), else ceil(2**32 / line).

    A division would take longer than all else that has to be known before a tile can be loaded.
    """
    return tl.where(tiles == 1, tile, _quotient(tile, tiles, magic))


@triton.jit
def _quotient(number, divisor, magic):
    """number // divisor for magic = ceil(2**32 / divisor), exact for all that fits 31 bits, as on long narrow maps."""
    quotient = _divide(number, magic)
    return quotient - tl.where(quotient * divisor > number, 1, 0)


@triton.jit
def _divide(number, magic):
    """number // divisor for magic = ceil(2**32 / divisor), exact while number * divisor < 2**32."""
    return tl.umulhi(number.to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)


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
def recur(decay, value, carry, STEPS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """h = decay * (h of the step before) + value along a tile [STEPS, SPLITS, COLUMNS] in order of (split, step).

    Args:
        carry: State before the tile, the same in all rows of [SPLITS, COLUMNS].

    Returns:
        States, states before each step, the state before each split [SPLITS, COLUMNS], and the next carry.
    """
    # -0.0, because the compiler removes additions of it.
    nothing = tl.full([STEPS, SPLITS, COLUMNS], -0.0, tl.float32)
    one = tl.full([STEPS, SPLITS, COLUMNS], 1.0, tl.float32)
    if SPLITS == 1:
        first = tl.arange(0, STEPS)[:, None, None] == 0
        value = tl.where(first, decay * carry[None, :, :] + value, value)
        before = tl.where(first, carry[None, :, :], nothing)
        decays, h, leads, before = tl.associative_scan((decay, value, one, before), 0, _step_after_with_before)
        return h, before, carry, last_of_axis(h)
    else:
        # Threads scan their steps from zero; what arrives at each split then decays through its steps.
        decays, h, leads, before = tl.associative_scan((decay, value, one, nothing), 0, _step_after_with_before)
        through = last_of_axis(decays)
        end = last_of_axis(h)
        first = tl.arange(0, SPLITS)[:, None] == 0
        end = tl.where(first, through * carry + end, end)
        arriving = tl.where(first, carry, 0.0)
        unit = tl.full([SPLITS, COLUMNS], 1.0, tl.float32)
        through, end, unit, arriving = tl.associative_scan((through, end, unit, arriving), 0, _step_after_with_before)
        # All splits learn what the last one ends with; a reduction would take one more barrier.
        carry = tl.associative_scan(end, 0, _first, reverse=True)
        return h + decays * arriving[None, :, :], before + leads * arriving[None, :, :], arriving, carry


@triton.jit
def recur_back(decay, value, carry, STEPS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """g = value + (decay * g of the step after) against the order of `recur`; carry is decay * g of the step after all,
    the same in all rows of [SPLITS, COLUMNS].

    Returns:
        decay * g of the step after each step, and the next carry, decay * g of the first step.
    """
    decay = flip_first(decay)
    value = flip_first(value)
    nothing = tl.full([STEPS, SPLITS, COLUMNS], -0.0, tl.float32)
    one = tl.full([STEPS, SPLITS, COLUMNS], 1.0, tl.float32)
    if SPLITS == 1:
        first = tl.arange(0, STEPS)[:, None, None] == 0
        value = decay * tl.where(first, value + carry[None, :, :], value)
        after = tl.where(first, carry[None, :, :], nothing)
        decays, g, leads, after = tl.associative_scan((decay, value, one, after), 0, _step_after_with_before)
        return flip_first(after), last_of_axis(g)
    else:
        decays, g, leads, after = tl.associative_scan((decay, decay * value, one, nothing), 0, _step_after_with_before)
        through = last_of_axis(decays)
        end = last_of_axis(g)
        last = tl.arange(0, SPLITS)[:, None] == SPLITS - 1
        end = tl.where(last, through * carry + end, end)
        arriving = tl.where(last, carry, 0.0)
        unit = tl.full([SPLITS, COLUMNS], 1.0, tl.float32)
        through, end, unit, arriving = tl.associative_scan(
            (through, end, unit, arriving), 0, _step_after_with_before, reverse=True
        )
        carry = tl.associative_scan(end, 0, _first)
        return flip_first(after + leads * arriving[None, :, :]), carry


@triton.jit
def arriving_state(a, ends, end_stride, sums, sum_stride, order, from_last, chunks, has_channel):
    """The state that arrives at a chunk: what the chunks before it end with, decayed on the way.

    Args:
        a: Decay rates [COLUMNS] over ln 2.
        ends, sums: Pointers [COLUMNS] to the first chunk's state at its end from a start at zero, and to the sum of its
            steps; those of the others lie the strides apart.
        order: How many chunks a column's route passes before [COLUMNS].
        from_last: 1 where a route begins with the last chunk, else 0.
    """
    state = tl.zeros(a.shape, tl.float32)
    for before in range(0, chunks - 1):
        chunk = tl.where(from_last == 0, before, chunks - 1 - before)
        passed = has_channel & (before < order)
        total = tl.load(sums + chunk * sum_stride, mask=passed, other=0.0).to(tl.float32)  # [COLUMNS]
        decay = tl.minimum(tl.exp2(total * a), MAX_DECAY)  # infinite, it would make NaN of a state of zero
        state = decay * state + tl.load(ends + chunk * end_stride, mask=passed, other=0.0).to(tl.float32)
    return state


@triton.jit
def _first(first, second):
    return first


@triton.jit
def _seconds(first0, first1, second0, second1):
    return second0, second1


@triton.jit
def by_column(x, like, STEPS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [STEPS * SPLITS, COLUMNS] as [STEPS, SPLITS, COLUMNS], whose columns of steps are owned by threads; and `like`.

    A scan without effect, where the compiler changes the layout of a product to that of `like`, a loaded tile. Without
    it what follows a product is computed in the product's layout, or in both.
    """
    return tl.associative_scan((tl.reshape(x, [STEPS, SPLITS, COLUMNS]), like), 0, _seconds)


@triton.jit
def load_low_rank(
    pointer,
    has_rank,
    offset,
    backward,
    tile,
    tile_back,
    pair,
    plane,
    PROJECTIONS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WRAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The projections of dt of a pair's two tiles [BLOCK_L, 2 * BLOCK_R], of the PROJECTIONS of a position; see `walk`.

    Args:
        pointer: To those of position 0, [1, 2 * BLOCK_R].
    """
    position, exists = walk(offset, backward, tile, tile_back, pair, plane, BLOCK_L, WRAP)
    if WIDE:
        position = position.to(tl.int64)
    return tl.load(pointer + position * PROJECTIONS, mask=has_rank[None, :], other=0.0)


@triton.jit
def projections_at(position, first, PROJECTIONS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the projection `first` [COLUMNS] of the PROJECTIONS of positions lies.

    A pretended contiguity: the compiler deals the axes out to threads in its order, the first one last.
    """
    return tl.max_contiguous(position * PROJECTIONS + first[None, None, :], (1, SPLITS, COLUMNS))


@triton.jit
def load_pair(pointer, position, route, R: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """B and C of a route [COLUMNS] of one state at positions in fp32: after the R of dt among a route's E.

    The tensor must begin where a word of 32 bits does.
    """
    if R % 2 == 0 and pointer.dtype.element_ty == tl.bfloat16:
        # Then both are one word of 32 bits.
        words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
        pair = tl.load(words + projections_at(position, (route * E + R) // 2, 2 * E, SPLITS, COLUMNS))
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        pointer += projections_at(position, route * E + R, 4 * E, SPLITS, COLUMNS)
        return tl.load(pointer).to(tl.float32), tl.load(pointer + 1).to(tl.float32)
