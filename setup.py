from setuptools import find_namespace_packages, find_packages, setup

FOLDERS = ('kernels', 'configs', 'tools')  # top-level folders of the repository, installed as vmamba.FOLDER

found = [name for folder in FOLDERS for name in find_namespace_packages(include=[folder, f'{folder}.*'])]
setup(
    packages=[
        *find_packages(include=['vmamba', 'vmamba.*']),
        *(f'vmamba.{name}' for name in found if '__pycache__' not in name),
    ],
    package_dir={f'vmamba.{folder}': folder for folder in FOLDERS},
    package_data={
        'vmamba': ['py.typed'],
        'vmamba.configs': ['model-index.yml'],
        'vmamba.configs.biomedical': ['*.yaml'],
        'vmamba.configs.classification': ['*.yaml', 'published.yml'],
        'vmamba.configs.sequence': ['*.yaml'],
        'vmamba.configs.detection': ['metafile.yml'],
        'vmamba.configs.segmentation': ['metafile.yml'],
    },
    py_modules=['vmamba_cli'],
)
