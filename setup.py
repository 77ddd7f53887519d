from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=['vmamba', 'vmamba.*']),
        *('vmamba.' + name for name in find_packages(include=['kernels', 'kernels.*'])),
    ],
    package_dir={'vmamba.kernels': 'kernels'},
)
