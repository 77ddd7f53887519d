"""Pathfinder: are two marked circles the ends of one dashed curve? By the published rules of its generator.

Learning long-range spatial dependencies with horizontal gated recurrent units, https://arxiv.org/abs/1805.08315
Long Range Arena, https://arxiv.org/abs/2011.04006, whose settings for three sizes are in SETTINGS

Two long curves of dashes start near each other and grow in turn, a dash at a time, without touching anything drawn so
far. Then short curves are added as distractors. A dash is one of few small pictures, which are drawn once: an image
takes milliseconds.
"""

import copy
import functools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from PIL import Image, ImageDraw

_TRIES = 3  # for a dash, and for the first dash of a curve
_DISTRACTOR_TRIES = 5
_TOUCHES = 1.8  # sum of two occupancies from which on two dashes touch
_OCCUPIED = 0.3
_DEAD_END = 1e-4  # total weight of the places where a curve may end next
_LEAST_FREE = 0.01  # share of pixels below which no more distractors start

Point = Tuple[int, int]  # row and column


class Settings(NamedTuple):
    """What decides how images look.

    Attributes:
        size: Side of an image.
        seed_distance: Between the first ends of both curves.
        marker_radius: Of the circles.
        length: Of a dash.
        thickness: Of a dash.
        margins: Distances to keep between dashes; an image has one of them.
        continuity: Factor of the angle between dashes; larger ones make straighter curves.
        distractors: Number of short curves.
        contrast: Of the long curves.
        distractor_contrast: Of the short ones.
        dashes: Of a long curve.
        distractor_dashes: Of a short one.
        padding: Pixels at the border that stay empty.
        antialias: Dashes and circles are drawn so many times as large.
    """

    size: int
    seed_distance: int
    marker_radius: float
    length: int
    thickness: float
    margins: Tuple[int, ...]
    continuity: float
    distractors: int
    contrast: float
    distractor_contrast: float
    dashes: int = 14
    distractor_dashes: int = 4
    padding: int = 1
    antialias: int = 2


SETTINGS: Dict[int, Settings] = {
    32: Settings(32, 7, 1.5, 2, 0.5, (1,), 1.0, 5, 2 * 0.75, 2.0),
    64: Settings(64, 12, 2.5, 5, 1.0, (1,), 1.8, 5, 0.8, 0.8),
    128: Settings(128, 20, 3.0, 5, 1.5, (2, 3), 1.8, 8, 0.9, 0.9),
}


class Dash(NamedTuple):
    """A dash that begins in the middle of a small picture.

    Attributes:
        line: Brightness, 0 to 1, [S, S].
        mask: Occupancy: the line with a margin, 0 to 1, [S, S].
        grown: The mask with another margin, [S + 2 * margin, S + 2 * margin].
    """

    line: np.ndarray
    mask: np.ndarray
    grown: np.ndarray


class Sample(NamedTuple):
    """An image and how it was made.

    Attributes:
        image: uint8 [size, size].
        label: 1 if both markers are on one curve.
        markers: Centres of the two circles, int16 [2, 2].
        curves: First end and the head of each further dash of both long curves, int16 [2, dashes, 2].
        unmarked: The image without circles, of brightness 0 to 2, [size, size].
    """

    image: np.ndarray
    label: int
    markers: np.ndarray
    curves: np.ndarray
    unmarked: np.ndarray


def draw_sample(settings: Settings, seed: int, index: int) -> Sample:
    """Image number `index` of a seed; it does not depend on others."""
    rng = np.random.default_rng((seed, index))
    label = int(rng.integers(2))
    tools = _tools(settings, settings.margins[int(rng.integers(len(settings.margins)))])
    drawn = None
    while drawn is None:
        drawn = _draw_two_curves(tools, rng)
    canvas, curves = drawn
    for _ in range(settings.distractors):
        for _ in range(_DISTRACTOR_TRIES):
            attempt = _draw_distractor(canvas, rng)
            if attempt is not None:
                canvas = attempt
                break
    first = int(rng.integers(2))
    markers = curves[first][0], curves[first if label else 1 - first][-1]
    image = np.maximum(canvas.image, np.maximum(*(_circle(settings, centre) for centre in markers)))
    image = (image - image.min()) * (255 / (image.max() - image.min()))
    points = np.array(markers, np.int16), np.array(curves, np.int16)
    return Sample((image + 0.5).astype(np.uint8), label, *points, canvas.image)


def translate(point: Point, angle: float, distance: float) -> Point:
    """The pixel at a distance in a direction, rounded up."""
    return math.ceil(point[0] + distance * math.sin(angle)), math.ceil(point[1] + distance * math.cos(angle))


def opposite(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


def dilate(image: np.ndarray, offsets: np.ndarray, margin: int) -> np.ndarray:
    """The maximum over offsets [n, 2] of at most `margin`: [H, W] -> [H, W]; beyond the border are zeros."""
    height, width = image.shape
    padded = np.pad(image, margin)
    out = np.zeros_like(image)
    for y, x in offsets + margin:
        np.maximum(out, padded[y : y + height, x : x + width], out=out)
    return out


def disk(radius: int) -> np.ndarray:
    """Offsets of the pixels of a disk [n, 2]."""
    side = np.arange(-radius, radius + 1)
    return np.argwhere(side[:, None] ** 2 + side**2 <= radius**2) - radius


class _Tools:
    """What curves of one margin are drawn with, all of it independent of where they are."""

    def __init__(self, settings: Settings, margin: int) -> None:
        self.settings, self.margin = settings, margin
        self.half = settings.length + math.ceil(settings.thickness) + margin
        self._dashes: Dict[Point, Dash] = {}
        radius = settings.length + margin  # of the circle around a joint on which a dash may end
        angles = np.radians(np.arange(0, 360, 360 / (2 * radius * np.pi)))
        ends = np.floor(radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)).astype(int)
        self.ends = np.unique(ends, axis=0)  # [n, 2]
        self.end_angles = np.arctan2(self.ends[:, 0], self.ends[:, 1])
        # From there a dash runs back towards the joint.
        self.end_dashes = [self.dash(opposite(angle)) for angle in self.end_angles]
        self._weights: Dict[float, np.ndarray] = {}
        directions = range(-180, 180)
        self.footprints = {degrees: self._footprint(degrees) for degrees in directions}
        self.blank = _Canvas(self)
        # Where the first of the long curves can begin, by direction, [n, 2] each.
        border = 2 * settings.seed_distance
        self.first_places = {degrees: self.blank.free_places(degrees, border) for degrees in directions}

    def dash(self, angle: float) -> Dash:
        """The dash in a direction."""
        scale = self.settings.antialias
        centre = self.half * scale
        end = translate((centre, centre), angle, self.settings.length * scale)
        if end not in self._dashes:
            self._dashes[end] = self._draw_dash(centre, end)
        return self._dashes[end]

    def _draw_dash(self, centre: int, end: Point) -> Dash:
        scale, side = self.settings.antialias, 2 * self.half + 1
        large = Image.new('L', (2 * centre + 1, 2 * centre + 1))
        line = [(centre, centre), (end[1], end[0])]
        ImageDraw.Draw(large).line(line, fill=255, width=round(self.settings.thickness * scale))
        thick = dilate(np.asarray(large), disk(self.margin * scale), self.margin * scale)
        line, mask = (
            np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) / 255
            for picture in (large, Image.fromarray(thick))
        )
        return Dash(line, mask, dilate(np.pad(mask, self.margin), disk(self.margin), self.margin))

    def weights(self, angle: float) -> np.ndarray:
        """How probable the ends are after a dash in this direction [n]."""
        if angle not in self._weights:
            turn = np.abs(self.end_angles - angle)
            turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * self.settings.continuity, np.pi / 2)
            self._weights[angle] = np.maximum(np.cos(turn), 0) ** 2
        return self._weights[angle]

    def _footprint(self, degrees: int) -> Optional[np.ndarray]:
        """Offsets of the pixels that a first dash in this direction takes for sure [n, 2].

        None if at some pixel of the image all of them are outside. In the published generator the dilation by such an
        offset fails, so that first dashes found by search point up and to the left. This decides how often curves fit.
        """
        radius = self.settings.length + self.margin
        start = self.half - radius - 1  # of the generator's window in the mask
        window = self.dash(math.radians(degrees)).mask[start:, start:][: 2 * radius + 1, : 2 * radius + 1]
        offsets = np.argwhere(window == 1) - radius
        everywhere = dilate(np.ones((self.settings.size, self.settings.size)), offsets, radius).all()
        return offsets if everywhere else None


@functools.cache
def _tools(settings: Settings, margin: int) -> _Tools:
    return _Tools(settings, margin)


class _Canvas:
    """An image and what is occupied in it.

    Attributes:
        image: [size, size].
        mask: Occupancy.
        grown: Occupancy with a margin.
    """

    def __init__(self, tools: _Tools) -> None:
        size, padding = tools.settings.size, tools.settings.padding
        self.tools = tools
        self.image, self.mask = np.zeros((size, size)), np.ones((size, size))
        self.mask[padding : size - padding, padding : size - padding] = 0
        self.grown = dilate(self.mask, disk(tools.margin), tools.margin)

    def copy(self) -> '_Canvas':
        other = copy.copy(self)
        other.image, other.mask, other.grown = self.image.copy(), self.mask.copy(), self.grown.copy()
        return other

    def has(self, point: Point) -> bool:
        size = self.tools.settings.size
        return 0 <= point[0] < size and 0 <= point[1] < size

    def draw(self, dash: Dash, point: Point, contrast: float) -> None:
        own, theirs = self._windows(point, self.tools.half)
        self.image[own] = np.maximum(self.image[own], dash.line[theirs] * contrast)

    def occupy(self, dash: Dash, point: Point) -> None:
        own, theirs = self._windows(point, self.tools.half)
        self.mask[own] = np.maximum(self.mask[own], dash.mask[theirs])
        own, theirs = self._windows(point, self.tools.half + self.tools.margin)
        self.grown[own] = np.maximum(self.grown[own], dash.grown[theirs])

    def touches(self, dash: Dash, point: Point) -> bool:
        own, theirs = self._windows(point, self.tools.half)
        return bool((self.mask[own] + dash.mask[theirs]).max() >= _TOUCHES)

    def free_places(self, degrees: int, border: int = 1) -> np.ndarray:
        """Pixels at which a dash in this direction can begin, not within `border` of the edge [n, 2]."""
        footprint = self.tools.footprints[degrees]
        if footprint is None:
            return np.empty((0, 2), int)
        inner = self.mask[border:-border, border:-border] > _OCCUPIED
        radius = self.tools.settings.length + self.tools.margin
        return np.argwhere(~dilate(np.pad(inner, border, constant_values=True), footprint, radius))

    def is_full(self) -> bool:
        return float((self.mask <= _OCCUPIED).mean()) < _LEAST_FREE

    def _windows(self, point: Point, half: int) -> Tuple[Any, Any]:
        """The part of the image that a picture around a point covers, and the part of the picture in the image."""
        own, theirs = [], []
        for centre in point:
            first, last = max(centre - half, 0), min(centre + half + 1, self.tools.settings.size)
            own.append(slice(first, last))
            theirs.append(slice(first - centre + half, last - centre + half))
        return tuple(own), tuple(theirs)


class _Curve:
    """A curve that grows on a canvas.

    Its last dash counts as occupied once the next one is drawn.

    Attributes:
        points: Its first end, and the head of each further dash.
    """

    def __init__(self, canvas: _Canvas, tail: Point, pivot: Point, degrees: int, contrast: float) -> None:
        self.pivot, self.angle, self.contrast = pivot, math.radians(degrees), contrast
        self.points = [tail]
        self.last = canvas.tools.dash(self.angle), tail
        canvas.draw(*self.last, contrast)

    def extend(self, canvas: _Canvas, rng: np.random.Generator) -> bool:
        """Adds a dash; False in a dead end."""
        tools = canvas.tools
        pivot = translate(self.pivot, self.angle, tools.settings.length + 2 * tools.margin)
        ends = tools.ends + pivot
        inside = np.flatnonzero(((ends >= 0) & (ends < tools.settings.size)).all(axis=1))
        places = ends[inside]
        weights = (1 - canvas.grown[places[:, 0], places[:, 1]]) * tools.weights(self.angle)[inside]
        total = weights.cumsum()
        if len(total) == 0 or total[-1] < _DEAD_END:
            return False
        for _ in range(_TRIES):
            chosen = int(np.searchsorted(total, rng.random() * total[-1], side='right'))
            number = int(inside[chosen])
            head, dash = (int(places[chosen, 0]), int(places[chosen, 1])), tools.end_dashes[number]
            if not canvas.touches(dash, head):
                canvas.draw(dash, head, self.contrast)
                canvas.occupy(*self.last)
                self.last, self.pivot, self.angle = (dash, head), pivot, float(tools.end_angles[number])
                self.points.append(head)
                return True
        return False


def _begin(canvas: _Canvas, tail: Point, degrees: int, contrast: float) -> Optional[_Curve]:
    """The first dash of a curve; None if it leaves the image."""
    tools = canvas.tools
    angle = math.radians(degrees)
    head = translate(tail, angle, tools.settings.length)
    pivot = translate(head, opposite(angle), tools.settings.length + tools.margin)
    return _Curve(canvas, tail, pivot, degrees, contrast) if canvas.has(head) and canvas.has(pivot) else None


def _begin_anywhere(
    canvas: _Canvas, rng: np.random.Generator, contrast: float, places_of: Callable[[int], np.ndarray]
) -> Optional[_Curve]:
    """A curve in a random direction, at one of the places for that direction."""
    for _ in range(_TRIES):
        degrees = int(rng.integers(-180, 180))
        places = places_of(degrees)
        if len(places) == 0:
            return None
        row, column = places[int(rng.integers(len(places)))].tolist()
        curve = _begin(canvas, (row, column), degrees, contrast)
        if curve is not None:
            return curve
    return None


def _draw_two_curves(tools: _Tools, rng: np.random.Generator) -> Optional[Tuple[_Canvas, List[List[Point]]]]:
    """Both long curves and their points; None if one of them got stuck."""
    settings, canvas = tools.settings, tools.blank.copy()
    first = _begin_anywhere(canvas, rng, settings.contrast, tools.first_places.__getitem__)
    if first is None:
        return None
    second = None
    for _ in range(_TRIES):
        degrees, direction = int(rng.integers(-180, 180)), math.radians(int(rng.integers(360)))
        (row, column), distance = first.points[0], settings.seed_distance
        tail = round(row + distance * math.sin(direction)), round(column + distance * math.cos(direction))
        second = _begin(canvas, tail, degrees, settings.contrast)
        if second is not None:
            break
    if second is None:
        return None
    for _ in range(settings.dashes - 1):
        if not (first.extend(canvas, rng) and second.extend(canvas, rng)):
            return None
    canvas.occupy(*second.last)
    return canvas, [first.points, second.points]


def _draw_distractor(canvas: _Canvas, rng: np.random.Generator) -> Optional[_Canvas]:
    """A copy of the canvas with a short curve more; None if it got stuck."""
    if canvas.is_full():
        return None
    settings, canvas = canvas.tools.settings, canvas.copy()
    curve = _begin_anywhere(canvas, rng, settings.distractor_contrast, canvas.free_places)
    if curve is None or not all(curve.extend(canvas, rng) for _ in range(settings.distractor_dashes - 1)):
        return None
    canvas.occupy(*curve.last)
    return canvas


def _circle(settings: Settings, centre: Point) -> np.ndarray:
    """A filled circle of brightness 1, [size, size]."""
    scale, side = settings.antialias, np.arange(settings.size * settings.antialias)
    inside = (side[:, None] - centre[0] * scale) ** 2 + (side - centre[1] * scale) ** 2
    large = Image.fromarray(np.where(inside <= (settings.marker_radius * scale) ** 2, 255, 0).astype(np.uint8))
    return np.asarray(large.resize((settings.size, settings.size), Image.Resampling.LANCZOS)) / 255
