from setuptools import find_packages, setup

FOLDERS = ('kernels', 'configs', 'tools')  # top-level folders of the repository, installed as vmamba.FOLDER

setup(
    packages=[
        *find_packages(include=['vmamba', 'vmamba.*']),
        *('vmamba.' + name for folder in FOLDERS for name in find_packages(include=[folder, f'{folder}.*'])),
    ],
    package_dir={f'vmamba.{folder}': folder for folder in FOLDERS},
    package_data={'vmamba': ['py.typed'], 'vmamba.configs': ['**/*.yaml', '**/*.py']},
    py_modules=['vmamba_cli'],
)
