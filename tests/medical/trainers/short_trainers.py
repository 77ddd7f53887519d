"""A trainer of few iterations, which nnU-Net finds by the folder of this file."""

from vmamba.nnunet.umamba_trainers import nnUNetTrainerUMambaEnc


class nnUNetTrainerShort(nnUNetTrainerUMambaEnc):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1
        super().initialize()

    def perform_actual_validation(self, save_probabilities=False):
        pass  # it predicts as nnUNetv2_predict does, which the test calls
