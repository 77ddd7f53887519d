"""Which operators of the library run, and what they return."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Within this context `names`, `operators`, `arguments` and `outputs` grow with every operator."""

    def __init__(self):
        super().__init__()
        self.names, self.operators, self.arguments, self.outputs = [], [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function.namespace == 'vmamba':
            self.names.append(function._opname)
            self.operators.append(function)
            self.arguments.append(args)
            self.outputs.append(outputs)
        return outputs
