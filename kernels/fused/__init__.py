"""The Triton kernels. Imports torch and triton; only `vmamba.kernels` decides when they run."""
