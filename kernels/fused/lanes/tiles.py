"""Building blocks of the Triton selective scan: tiles, their loads, and a linear recurrence along a tile.

A tile holds `R` channels and `J * E` neighbouring positions as [R, J, E]: E positions lie in the registers of one
thread, J in neighbouring lanes. Recurrences walk the registers one by one and cross lanes once per E positions.
"""

import triton
import triton.language as tl

from ..elementwise import LOG2_E, MAX_DECAY


@triton.jit
def softplus(x):
    """log(1 + e^x) as max(x, 0) + log(1 + t) with t = e^-|x|; above 20 that is x itself.

    log(1 + t) / t is a polynomial on [0, 1], exact to 2e-7, so that a small t keeps all its digits.
    """
    t = tl.exp2(tl.abs(x) * -LOG2_E)
    p = -0.00837115291506052 * t + 0.04349390044808388
    p = p * t - 0.1068500280380249
    p = p * t + 0.1768747717142105
    p = p * t - 0.24474774301052094
    p = p * t + 0.3327192962169647
    p = p * t - 0.49997174739837646
    p = p * t + 0.9999997615814209
    return tl.maximum(x, 0.0) + t * p


@triton.jit
def load_tile(
    pointer, rows, in_rows, first, length, unit, R: tl.constexpr, J: tl.constexpr, E: tl.constexpr, DIRECT: tl.constexpr
):
    """Positions first ... first + J * E of the sequences at `pointer + rows` in fp32, zero outside of them.

    DIRECT loads E positions at once, which needs rows that start and end at multiples of 16 bytes. Otherwise every
    position is loaded by itself; `unit` is a 1 that the compiler must not know, or it would spread neighbouring
    positions over lanes, where a recurrence is several times as expensive.
    """
    if DIRECT:
        position = first + tl.arange(0, J * E)
        mask = in_rows[:, None] & (position < length)[None, :]
        x = tl.load(pointer + rows[:, None] + position[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.reshape(x, (R, J, E))
    else:
        position = (first + tl.arange(0, J) * E)[:, None, None] + tl.arange(0, E)[None, None, :]
        mask = in_rows[None, :, None] & (position < length)
        x = tl.load(pointer + rows[None, :, None] + position * unit, mask=mask, other=0.0).to(tl.float32)
        x = tl.permute(x, (1, 0, 2))
    return x


@triton.jit
def store_tile(pointer, rows, in_rows, first, length, x, R: tl.constexpr, J: tl.constexpr, E: tl.constexpr):
    position = first + tl.arange(0, J * E)
    mask = in_rows[:, None] & (position < length)[None, :]
    x = tl.reshape(x, (R, J * E)).to(pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] + position[None, :], x, mask=mask)


@triton.jit
def load_coefficients(pointer, first, length, rows, in_rows, J: tl.constexpr, E: tl.constexpr, CONSTANT: tl.constexpr):
    """B or C for one state: [1, J, E] of a group's positions, or [R, 1, 1] where it is constant."""
    if CONSTANT:
        return tl.load(pointer + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None, None]
    else:
        position = first + tl.arange(0, J * E)
        x = tl.load(pointer + position, mask=position < length, other=0.0)
        return tl.reshape(x, (1, J, E)).to(tl.float32)


@triton.jit
def pick(x, index: tl.constexpr, E: tl.constexpr):
    """x[:, :, index]. Adding -0 changes no number, which the compiler knows, so this costs no instruction."""
    minus_zero = tl.zeros((1, 1, 1), tl.float32) * -1.0  # a literal -0.0 becomes 0.0
    return tl.sum(tl.where(tl.arange(0, E)[None, None, :] == index, x, minus_zero), 2)


@triton.jit
def walk_registers(decay, drive, state, R: tl.constexpr, J: tl.constexpr, E: tl.constexpr, REVERSE: tl.constexpr):
    """h_l = decay_l * h_{l-1} + drive_l over the positions of each thread from `state` [R, J].

    Returns:
        All states h_l and what they keep of the one before, decay_l * h_{l-1}, both [R, J, E]; and the last state of
        each thread [R, J].
    """
    index = tl.arange(0, E)[None, None, :]
    states = tl.zeros((R, J, E), tl.float32)
    kept = tl.zeros((R, J, E), tl.float32)
    for step in tl.static_range(E):
        at = E - 1 - step if REVERSE else step
        keep = pick(decay, at, E) * state
        state = keep + pick(drive, at, E)
        states = tl.where(index == at, state[:, :, None], states)
        kept = tl.where(index == at, keep[:, :, None], kept)
    return states, kept, state


@triton.jit
def walk_registers_adjoint(
    decay, drive, state, R: tl.constexpr, J: tl.constexpr, E: tl.constexpr, REVERSE: tl.constexpr
):
    """g_l = drive_l + decay_{l+1} * g_{l+1} over the positions of each thread, from the end of the walk to its start.

    Args:
        decay, drive: [R, J, E].
        state: decay_{l+1} * g_{l+1} at the thread's last position [R, J].

    Returns:
        All g [R, J, E] and decay_l * g_l at the first position of each thread [R, J].
    """
    index = tl.arange(0, E)[None, None, :]
    adjoints = tl.zeros((R, J, E), tl.float32)
    a, adjoint = state, state
    for step in tl.static_range(E):
        at = step if REVERSE else E - 1 - step
        if step == 0:
            adjoint = state + pick(drive, at, E)
        else:
            adjoint = a * adjoint + pick(drive, at, E)
        a = pick(decay, at, E)
        adjoints = tl.where(index == at, adjoint[:, :, None], adjoints)
    return adjoints, a * adjoint


@triton.jit
def walk_lanes(decay, drive, carry, R: tl.constexpr, J: tl.constexpr, REVERSE: tl.constexpr):
    """The recurrence over lanes: decay and drive [R, J] summarise the positions of each thread, carry is [R].

    Returns:
        The state before each thread's positions and the one after them, both [R, J]; the latter of the last
        thread is the state after the tile.
    """
    lane = tl.broadcast_to(tl.arange(0, J)[None, :], (R, J))
    step: tl.constexpr = -1 if REVERSE else 1
    start = lane == (J - 1 if REVERSE else 0)
    carry = tl.broadcast_to(carry[:, None], (R, J))
    # An infinite product of decays that grow would make a NaN of a state that is zero.
    decay = tl.minimum(decay, MAX_DECAY)
    if J == 1:
        before = carry
        after = decay * carry + drive
    else:
        after = tl.where(start, decay * carry + drive, drive)
        for level in tl.static_range(5):
            distance = 2**level
            if distance < J:
                source = lane - step * distance
                inside = (source >= 0) & (source < J)
                source = tl.minimum(tl.maximum(source, 0), J - 1)
                after = tl.where(inside, decay * tl.gather(after, source, 1) + after, after)
                if 2 * distance < J:
                    decay = tl.where(inside, tl.minimum(decay * tl.gather(decay, source, 1), MAX_DECAY), decay)
        before = tl.gather(after, tl.minimum(tl.maximum(lane - step, 0), J - 1), 1)
        before = tl.where(start, carry, before)
    return before, after


@triton.jit
def sum_positions(x):
    """[R, J, E] -> [R]"""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def last_lane_offset(J: tl.constexpr, REVERSE: tl.constexpr):
    """Offsets [1, J] that are 0 for the lane in which a walk ends, and the mask of that lane.

    A store masked to that lane looks contiguous along the lanes, so the compiler leaves the data where they are.
    """
    lane = tl.arange(0, J)[None, :]
    end: tl.constexpr = 0 if REVERSE else J - 1
    return lane - end, lane == end


@triton.jit
def only_if(condition, size):
    """A bound to compare indices with: `size` or nothing. (The interpreter cannot combine masks with a scalar.)"""
    return tl.where(condition, size, 0)
