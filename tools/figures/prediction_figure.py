"""The picture of `vmamba predict`."""

from pathlib import Path
from typing import List, Sequence, Tuple

from matplotlib.figure import Figure
from vmamba.tools.images.decoding import read_image

from .plots import save_figure


def plot_predictions(predictions: Sequence[Tuple[Path, List[Tuple[str, float]]]], path: Path) -> None:
    """Every image beside bars of its most probable classes."""
    figure = Figure(figsize=(9, 3 * len(predictions)), layout='constrained')
    for (image, classes), (left, right) in zip(predictions, figure.subplots(len(predictions), 2, squeeze=False)):
        pixels = read_image(image)
        pixels.thumbnail((512, 512))
        left.imshow(pixels)
        left.set_axis_off()
        left.set_title(image.name.replace('$', r'\$'), fontsize=9)
        rows = range(len(classes))
        right.barh(rows, [value for _, value in classes])
        right.set_yticks(rows, [name.replace('$', r'\$')[:40] for name, _ in classes], fontsize=8)
        right.set_xlim(0, 1)
        right.set_xlabel('probability', fontsize=8)
        right.invert_yaxis()
    save_figure(figure, path)
