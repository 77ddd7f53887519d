"""How well features separate classes: nearest neighbours and a linear probe, by scikit-learn.

The classes are the class folders of the images. With --test the classifiers are fitted to the first features and tested
on those; without, by stratified cross-validation. Maps are averaged over their pixels. Writes a CSV file.

    vmamba knn features/train --test features/val
    vmamba knn features/ --features pooled stages.2 --neighbours 10
"""

import argparse
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from vmamba.tools.features.store import check_comparable, read_features, read_index, read_settings
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import open_console, table_of
from vmamba.tools.user_errors import Parser, UserError, at_least, one_line_errors, positive, positive_float

from rich.progress import track
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Labelled = Tuple[np.ndarray, np.ndarray]  # features [n, d] and classes [n]


def load(folder: Path, name: str) -> Labelled:
    """The features of all images that are done, and the names of their class folders.

    Raises:
        UserError: If there are none, or images are outside of class folders.
    """
    index = read_index(folder).query('state == "done"')
    if index.empty:
        raise UserError(f'{folder} holds no finished features')
    outside = index.image[index.label == '']
    if len(outside):
        raise UserError(f'{folder}: {outside.iloc[0]} lies in no class folder, so it has no class')
    features = read_features(folder, name, index.index)
    vectors = np.stack([f if f.ndim == 1 else f.mean(axis=(-2, -1), dtype=np.float32) for f in features])
    return vectors.astype(np.float32), index.label.to_numpy(object)


def left_out(folder: Path) -> str:
    """'3 of 10 images left out: 2 todo, 1 unreadable', or nothing if all have features."""
    states = read_index(folder).state
    counts = states[states != 'done'].value_counts()
    if counts.empty:
        return ''
    way_out = '; `vmamba extract` continues with them' if 'todo' in counts else ''
    parts = ', '.join(f'{count} {state}' for state, count in counts.items())
    return f'{folder}: {counts.sum()} of {len(states)} images left out: {parts}{way_out}'


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
        raise UserError(f'{args.train} has images of one class only, {names[0]!r}')
    if test is None and counts.min() < args.folds:
        rare = f'class {names[counts.argmin()]!r} has {counts.min()} images'
        raise UserError(f'{rare}, fewer than the {args.folds} folds: lower --folds, or give --test')
    if len(args.C) > 1 and counts.min() < 5:
        raise UserError(f'choosing among {len(args.C)} values of --C needs 5 images a class, got {counts.min()}')
    fitted = len(train[1]) if test is not None else len(train[1]) - -(-len(train[1]) // args.folds)
    if args.neighbours > fitted:
        raise UserError(f'--neighbours {args.neighbours} is more than the {fitted} images to learn from')
    if test is not None and not set(test[1]) <= set(names):
        unknown = ', '.join(sorted(set(test[1]) - set(names))[:5])
        raise UserError(f'{args.test} has classes that {args.train} lacks: {unknown}')


def evaluate(args: argparse.Namespace, names: Sequence[str]) -> Iterator[Dict[str, Any]]:
    """Rows of the CSV file, of every classifier on every feature: accuracies in %, spread is that of the folds."""
    for name in names:
        train = load(args.train, name)
        test = load(args.test, name) if args.test else None
        check(train, test, args)
        for label, classifier in classifiers(args).items():
            if test:
                found, spread, folds = classifier.fit(*train).score(*test), None, None
            else:
                splits = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
                scores = cross_val_score(classifier, *train, cv=splits, error_score='raise')
                found, spread, folds = scores.mean(), 100 * scores.std(), args.folds
            yield dict(
                feature=name,
                classifier=label,
                accuracy=100 * found,
                spread=spread,
                folds=folds,
                train_images=len(train[1]),
                test_images=len((test or train)[1]),
                classes=len(set(train[1])),
                dim=train[0].shape[1],
            )


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
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


@one_line_errors('evaluate_features.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    console = open_console()
    for folder in filter(None, (args.train, args.test)):
        note = left_out(folder)
        if note:
            console.print(note, highlight=False, soft_wrap=True)
    if args.test:
        check_comparable(args.train, args.test)
    names: List[str] = args.features or read_settings(args.train)['features']
    found = track(evaluate(args, names), 'Evaluating', total=2 * len(names), console=console, transient=True)
    rows = pd.DataFrame(found)
    rows_shown = rows.dropna(axis=1, how='all').rename(columns={'accuracy': 'accuracy, %'})
    console.print(table_of(rows_shown, forms={'accuracy, %': '.2f', 'spread': '.2f'}))
    output = args.output or args.train / 'evaluation.csv'
    write_csv(output, rows.to_dict('records'))
    console.print(f'Results are in {output}')


if __name__ == '__main__':
    main()
