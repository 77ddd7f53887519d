"""How well features separate classes: nearest neighbours and a linear probe, by scikit-learn.

The classes are the class folders of the images. With --test the classifiers are fitted to the first features and tested
on those; without, by stratified cross-validation. Maps are averaged over their pixels. Writes a CSV file.

    vmamba knn features/train --test features/val
    vmamba knn features/ --features pooled stages.2 --neighbours 10
"""

import argparse
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from vmamba.tools.features.store import check_comparable, read_features, read_index, read_settings
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, at_least, one_line_errors, positive, positive_float

from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

WIDTH = 120  # of the table where there is no terminal

Labelled = Tuple[np.ndarray, np.ndarray]  # features [n, d] and classes [n]


class Row(NamedTuple):
    """One line of the CSV file; accuracies in %, spread is the standard deviation over the folds."""

    feature: str
    classifier: str
    accuracy: float
    spread: Optional[float]
    folds: Optional[int]
    train_images: int
    test_images: int
    classes: int
    dim: int


def load(folder: Path, name: str) -> Labelled:
    """The features of all images that are done, and the names of their class folders.

    Raises:
        UserError: If there are none, or images are outside of class folders.
    """
    index = [row for row in read_index(folder) if row['state'] == 'done']
    if not index:
        raise UserError(f'{folder} holds no finished features')
    outside = [row['image'] for row in index if not row['label']]
    if outside:
        raise UserError(f'{folder}: {outside[0]} lies in no class folder, so it has no class')
    features = read_features(folder, name, [int(row['row']) for row in index])
    vectors = np.stack([f if f.ndim == 1 else f.mean(axis=(-2, -1), dtype=np.float32) for f in features])
    return vectors.astype(np.float32), np.array([row['label'] for row in index])


def left_out(folder: Path) -> str:
    """'3 of 10 images left out: 2 todo, 1 unreadable', or nothing if all have features."""
    states = [row['state'] for row in read_index(folder)]
    counts = {state: states.count(state) for state in ('todo', 'unreadable') if state in states}
    if not counts:
        return ''
    way_out = '; `vmamba extract` continues with them' if 'todo' in counts else ''
    parts = ', '.join(f'{count} {state}' for state, count in counts.items())
    return f'{folder}: {sum(counts.values())} of {len(states)} images left out: {parts}{way_out}'


def classifiers(args: argparse.Namespace) -> Dict[str, ClassifierMixin]:
    """Nearest neighbours by cosine distance, and logistic regression on standardised features.

    Of several C, the inverse of the regularisation, cross-validation on the training images chooses one.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=args.C[0], max_iter=args.max_iter))
    if len(args.C) > 1:
        probe = GridSearchCV(probe, {'logisticregression__C': args.C}, cv=3)
    knn = KNeighborsClassifier(args.neighbours, metric='cosine', weights='distance')
    return {f'{args.neighbours}-NN': knn, 'linear probe': probe}


def check(train: Labelled, test: Optional[Labelled], args: argparse.Namespace) -> None:
    """Raises UserError where the classes do not allow what is asked for."""
    names, counts = np.unique(train[1], return_counts=True)
    if len(names) < 2:
        raise UserError(f'{args.train} has images of one class only, {str(names[0])!r}')
    if test is None and counts.min() < args.folds:
        rare = f'class {str(names[counts.argmin()])!r} has {counts.min()} images'
        raise UserError(f'{rare}, fewer than the {args.folds} folds: lower --folds, or give --test')
    if len(args.C) > 1 and counts.min() < 5:
        raise UserError(f'choosing among {len(args.C)} values of --C needs 5 images a class, got {counts.min()}')
    fitted = len(train[1]) if test is not None else len(train[1]) - -(-len(train[1]) // args.folds)
    if args.neighbours > fitted:
        raise UserError(f'--neighbours {args.neighbours} is more than the {fitted} images to learn from')
    if test is not None and not set(test[1]) <= set(names):
        unknown = ', '.join(sorted(set(test[1]) - set(names))[:5])
        raise UserError(f'{args.test} has classes that {args.train} lacks: {unknown}')


def evaluate(args: argparse.Namespace) -> Iterator[Row]:
    """Accuracy of every classifier on every feature."""
    if args.test:
        check_comparable(args.train, args.test)
    names = args.features or _features_of(args.train)
    for name in names:
        train = load(args.train, name)
        test = load(args.test, name) if args.test else None
        check(train, test, args)
        for label, classifier in classifiers(args).items():
            if test:
                found = [classifier.fit(*train).score(*test)]
            else:
                folds = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
                found = cross_val_score(classifier, *train, cv=folds, error_score='raise')
            yield Row(
                feature=name,
                classifier=label,
                accuracy=100 * float(np.mean(found)),
                spread=100 * float(np.std(found)) if test is None else None,
                folds=args.folds if test is None else None,
                train_images=len(train[1]),
                test_images=len(test[1]) if test is not None else len(train[1]),
                classes=len(set(train[1])),
                dim=train[0].shape[1],
            )


def _features_of(folder: Path) -> List[str]:
    read_index(folder)
    return read_settings(folder)['features']


def report(rows: Sequence[Row], output: Path, console: Console) -> None:
    """Prints a table and writes the CSV file."""
    table = Table('feature', 'dim', 'classifier', 'accuracy, %', 'images', 'classes')
    for row in rows:
        spread = '' if row.spread is None else f' \u00b1 {row.spread:.2f} ({row.folds} folds)'
        images = str(row.train_images) if row.folds else f'{row.train_images} + {row.test_images}'
        table.add_row(
            row.feature, str(row.dim), row.classifier, f'{row.accuracy:.2f}{spread}', images, str(row.classes)
        )
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output, [Row._fields, *rows])
    console.print(f'Results are in {output}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    examples = '\n'.join(__doc__.splitlines()[5:])
    parser = Parser(description=__doc__.splitlines()[0], epilog=examples)
    parser.add_argument('train', type=Path, help='folder that `vmamba extract` wrote')
    parser.add_argument('--test', type=Path, help='features to test on; default: cross-validation')
    parser.add_argument('--features', nargs='+', help='names; default: all')
    parser.add_argument('--neighbours', type=positive, default=20)
    parser.add_argument(
        '--C', type=positive_float, nargs='+', default=[1.0], help='inverse regularisation of the probe'
    )
    parser.add_argument('--max-iter', type=positive, default=1000, help='steps of the linear probe')
    parser.add_argument('--folds', type=at_least(2), default=5)
    parser.add_argument('--seed', type=at_least(0), default=0, help='of the folds')
    parser.add_argument('--output', type=Path, help='CSV file; default: evaluation.csv in the folder of the features')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    console = open_console(WIDTH)
    with one_line_errors('evaluate_features.py'):
        for folder in filter(None, (args.train, args.test)):
            note = left_out(folder)
            if note:
                console.print(note, highlight=False, soft_wrap=True)
        count = 2 * len(args.features or _features_of(args.train))
        rows = list(track(evaluate(args), 'Evaluating', total=count, console=console, transient=True))
        report(rows, args.output or args.train / 'evaluation.csv', console)


if __name__ == '__main__':
    main()
