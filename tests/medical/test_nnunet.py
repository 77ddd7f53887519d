"""U-Mamba in nnU-Net: by its own commands on a tiny data set, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from medical_cases import discs
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from vmamba.models import UMamba
from vmamba.nnunet import FOLDER
from vmamba.nnunet.umamba_trainers import nnUNetTrainer, nnUNetTrainerUMambaBot, plan_arguments

from skimage.io import imread, imsave

TRAINERS = {
    'nnUNetTrainerUMambaBot': ('bot', 'mamba'),
    'nnUNetTrainerUMambaEnc': ('enc', 'mamba'),
    'nnUNetTrainerUMamba2Bot': ('bot', 'mamba2'),
    'nnUNetTrainerUMamba2Enc': ('enc', 'mamba2'),
    'nnUNetTrainerUMambaNone': ('bot', 'none'),
}
SHORT = Path(__file__).with_name('trainers')
FOLDERS = {'nnUNet_raw': 'raw', 'nnUNet_preprocessed': 'preprocessed', 'nnUNet_results': 'results'}
RUN = 'results/Dataset001_Discs/nnUNetTrainerShort__nnUNetPlans__2d'


@pytest.fixture
def trained(tmp_path):
    """The folder of a data set that nnU-Net has planned, trained on and predicted."""
    folder = tmp_path
    raw = folder / 'raw/Dataset001_Discs'
    for name in ('imagesTr', 'labelsTr', 'imagesTs'):
        (raw / name).mkdir(parents=True)
    for i, (image, mask) in enumerate(discs(4, (32, 48))):
        imsave(raw / f'imagesTr/disc{i}_0000.png', image, check_contrast=False)
        imsave(raw / f'labelsTr/disc{i}.png', mask, check_contrast=False)
    imsave(raw / 'imagesTs/disc_0000.png', image, check_contrast=False)
    facts = dict(channel_names={'0': 'grey'}, labels=dict(background=0, disc=1), numTraining=4, file_ending='.png')
    (raw / 'dataset.json').write_text(json.dumps(facts))
    variables = {
        **{variable: str(folder / name) for variable, name in FOLDERS.items()},
        'nnUNet_extTrainer': os.pathsep.join([str(FOLDER), str(SHORT)]),
        'nnUNet_n_proc_DA': '1',
        'nnUNet_def_n_proc': '1',
    }

    def run(command, *arguments):
        path = Path(sys.executable).with_name(command)
        done = subprocess.run(
            [path, *arguments], env={**os.environ, **variables}, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    cpu = ('-device', 'cpu')
    run('nnUNetv2_plan_and_preprocess', *'-d 1 -c 2d -np 1 -npfp 1'.split())
    run('nnUNetv2_train', '1', '2d', 'all', '-tr', 'nnUNetTrainerShort', *cpu)
    chosen = '-d 1 -c 2d -f all -tr nnUNetTrainerShort --disable_tta -npp 1 -nps 1'.split()
    run('nnUNetv2_predict', '-i', str(raw / 'imagesTs'), '-o', 'predicted', *chosen, *cpu)
    return folder


# One test, so that several workers do not train twice.
def test_two_epochs_and_a_prediction_and_the_checkpoint_without_nnunet(trained):
    path = trained / RUN / 'fold_all/checkpoint_final.pth'
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint['current_epoch'] == 2
    assert np.isfinite(checkpoint['logging']['train_losses']).all()
    predicted = imread(trained / 'predicted/disc.png')
    assert predicted.shape == (32, 48) and set(np.unique(predicted)) <= {0, 1}
    plans = json.loads((trained / RUN / 'plans.json').read_text())['configurations']['2d']
    network = plans['architecture']['arch_kwargs']
    blocks = network['n_conv_per_stage'], network['n_conv_per_stage_decoder']
    sizes = network['features_per_stage'], network['kernel_sizes'], network['strides']
    UMamba('enc', 1, 2, plans['patch_size'], *sizes, *blocks).load_pretrained(path)
    assert network['n_conv_per_stage'] == [2] * len(network['strides'])  # the plans are not edited


NETWORK = dict(features_per_stage=[8, 16], kernel_sizes=[[3, 3]] * 2, strides=[[1, 1], [2, 2]])
BLOCKS = dict(n_conv_per_stage=[2, 2], n_conv_per_stage_decoder=[2])


@pytest.mark.parametrize('name', TRAINERS)
def test_nnunet_finds_the_trainers_and_builds_their_networks(name, monkeypatch):
    monkeypatch.setenv('nnUNet_extTrainer', str(FOLDER))
    trainer = recursive_find_trainer_class_by_name(name)
    architecture = dict(network_class_name='', arch_kwargs={**NETWORK, **BLOCKS}, _kw_requires_import=[])
    plans = PlansManager(dict(configurations={'2d': dict(patch_size=[32, 48], architecture=architecture)}))
    model = trainer.build_network_architecture(plans, plans.get_configuration('2d'), 1, 2, False)
    kind, mixer = TRAINERS[name]
    expected = UMamba(kind, 1, 2, mixer=mixer, **plan_arguments(plans.get_configuration('2d')), device='meta')
    assert list(model.state_dict()) == list(expected.state_dict())
    assert not model.decoder.deep_supervision


def test_plans_of_residual_encoders_are_read():
    network = dict(NETWORK, n_blocks_per_stage=[1, 3], n_conv_per_stage_decoder=[1])
    found = plan_arguments(SimpleNamespace(network_arch_init_kwargs=network, patch_size=np.array([32, 48])))
    assert found['encoder_blocks'] == [1, 3] and found['patch_size'] == [32, 48]


def test_plans_without_the_needed_keys_are_refused():
    with pytest.raises(ValueError, match='no n_conv_per_stage or n_blocks_per_stage, n_conv_per_stage_decoder for'):
        plan_arguments(SimpleNamespace(network_arch_init_kwargs=NETWORK, patch_size=[32, 48]))


@pytest.mark.parametrize('missing', ['arch_kwargs', 'patch_size'])
def test_plans_without_a_network_or_a_size_are_refused(missing):
    configuration = dict(patch_size=[32, 48], architecture=dict(arch_kwargs={**NETWORK, **BLOCKS}))
    configuration.pop(missing, None)
    configuration['architecture'].pop(missing, None)
    with pytest.raises(ValueError, match=f'the plans have no {missing}: U-Mamba needs the plans of a convolutional'):
        plan_arguments(ConfigurationManager(configuration))


def test_a_loss_that_is_nan_stops_the_training(monkeypatch):
    monkeypatch.setattr(nnUNetTrainer, 'train_step', lambda self, batch: dict(loss=np.float32('nan')))
    trainer = object.__new__(nnUNetTrainerUMambaBot)
    trainer.current_epoch, trainer.initial_lr = 3, 0.01
    with pytest.raises(RuntimeError, match=r'the loss is nan in epoch 3.*initial_lr 0.01'):
        trainer.train_step({})
