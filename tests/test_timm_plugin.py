"""What the plugin for timm's own tests selects."""

from types import SimpleNamespace

import timm
import timm_plugin
from timm_plugin import list_models

OF_TOKENS = {name for prefix in ('adventurer', 'vim', 'vim2') for name in timm.list_models(f'{prefix}_*')}
OF_STAGES = {name for prefix in ('mambavision', 'vmamba', 'vssd') for name in timm.list_models(f'{prefix}_*')}
TOKENS = ['vit_*', 'naflexvit*', 'efficientvim*']


def test_only_our_variants_are_listed():
    assert (len(OF_TOKENS), len(OF_STAGES)) == (15, 27)
    assert set(list_models()) == set(list_models(exclude_filters=['*enormous*'])) == OF_TOKENS | OF_STAGES
    assert set(list_models(module=['vision_transformer', 'convnext'])) == OF_TOKENS | OF_STAGES
    assert list_models('efficientnet_[hx]_*') == []
    assert {name.split('.')[0] for name in list_models(include_tags=True)} == OF_TOKENS | OF_STAGES
    assert 'vim_t.in1k' in list_models(include_tags=True)


def test_models_of_tokens_and_of_stages_are_told_apart():
    assert set(list_models(filter=TOKENS)) == OF_TOKENS
    assert set(list_models(exclude_filters=['*huge*', *TOKENS])) == OF_STAGES
    assert {name.split('.')[0] for name in list_models(filter=TOKENS, include_tags=True)} == OF_TOKENS


def item(test, **params):
    callspec = {'callspec': SimpleNamespace(params=params)} if params else {}
    return SimpleNamespace(originalname=test, **callspec)


def test_tests_of_other_models_and_of_torchscript_are_deselected():
    kept = [
        item('test_model_forward', model_name='vim_t', batch_size=1),
        item('test_model_default_cfgs', model_name='vmamba_t.in1k'),
    ]
    others = [
        item('test_model_forward', model_name='convit_tiny'),
        item('test_eva_reset', pool_type='avg'),
        item('test_hybrid'),
        item('test_model_forward_torchscript', model_name='vim_t'),
        item('test_model_load_pretrained', model_name='vmamba_t.in1k'),
    ]
    items, deselected = [others[0], kept[0], *others[1:], kept[1]], []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    timm_plugin.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert (items, deselected) == (kept, others)


def test_the_suite_is_given_our_list(monkeypatch):
    monkeypatch.setattr(timm, 'list_models', timm.list_models)
    markers = []
    timm_plugin.pytest_configure(SimpleNamespace(addinivalue_line=lambda *line: markers.append(line)))
    assert timm.list_models is list_models
    assert len(markers) == 1 and markers[0][0] == 'markers' and markers[0][1].startswith('timeout:')
