from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['vmamba', 'vmamba.*']), 'vmamba.kernels'],
    package_dir={'vmamba.kernels': 'kernels'},
)
