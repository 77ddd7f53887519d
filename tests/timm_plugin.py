"""Plugin with which pytest runs timm's own tests of models, unchanged, on the variants of this library.

`make test-timm` loads it for tests/test_models.py of timm's source distribution. That file selects models with
`timm.list_models` when it is imported, by names and by timm's modules.
"""

from typing import Any, List, Optional, Sequence, Union

import pytest
import timm

import vmamba  # noqa: F401, registers the models

MODULES = ('adventurer', 'mambavision', 'vim', 'vmamba', 'vssd')
# timm's pattern and ours of models of tokens: the suite keeps all such patterns in one list.
TIMM_TOKENS, TOKENS = 'vit_*', ('adventurer_*', 'vim_*', 'vim2_*')
DESELECTED = {
    'test_model_forward_torchscript': 'PyTorch has deprecated TorchScript',
    'test_model_forward_fx_torchscript': 'PyTorch has deprecated TorchScript',
    'test_model_load_pretrained': 'downloads weights',
    'test_model_features_pretrained': 'downloads weights',
}

_list_models = timm.list_models


def list_models(
    filter: Union[str, Sequence[str]] = '',
    module: Union[str, Sequence[str]] = '',
    exclude_filters: Union[str, Sequence[str]] = '',
    **options: Any,
) -> List[str]:
    """`timm.list_models` of this library alone, whatever the module: the suite names those with intermediates."""
    return _list_models(_with_ours(filter), MODULES, exclude_filters=_with_ours(exclude_filters), **options)


def _with_ours(patterns: Union[str, Sequence[str]]) -> Union[str, Sequence[str]]:
    return [*patterns, *TOKENS] if TIMM_TOKENS in patterns else patterns


def pytest_configure(config: pytest.Config) -> None:
    timm.list_models = list_models
    config.addinivalue_line('markers', 'timeout: limit in seconds, which needs pytest-timeout')


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Leaves the tests that are given one of our variants; the others are of timm's own models."""
    names = {*list_models(), *list_models(include_tags=True)}
    kept = [item for item in items if _variant(item) in names and item.originalname not in DESELECTED]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _variant(item: pytest.Item) -> Optional[str]:
    return item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
