"""Which branches of blocks run on the kernels of `vmamba.kernels.branches`."""

from vmamba.kernels import branches, use_triton


class Chains(list):
    """Of every chain the dtype of its products and the classes of its branches; `links` are those of the last one."""

    def note(self, links, dtype):
        self.links = links
        self.append((dtype, *(type(link.branch).__name__ for link in links)))


def record(monkeypatch):
    """The chains that run from now on."""
    seen, run_chain = Chains(), branches.run_chain

    def run(x, links, dtype):
        seen.note(links, dtype)
        return run_chain(x, links, dtype)

    monkeypatch.setattr(branches, 'run_chain', run)
    return seen


def pretend(monkeypatch):
    """The chains that would run on Triton from now on: they add nothing to the stream, and operators stay in PyTorch.

    To run modules in Triton's interpreter takes long, and is not needed to find out which are called.
    """
    seen, can_run = Chains(), branches.can_run

    def would_run(x):
        with use_triton(True):
            return can_run(x)

    def run(x, links, dtype):
        seen.note(links, dtype)
        return x + 0

    monkeypatch.setattr(branches, 'can_run', would_run)
    monkeypatch.setattr(branches, 'run_chain', run)
    return seen
