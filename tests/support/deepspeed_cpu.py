"""DeepSpeed on CPU for tests: Lightning's strategy refuses it, DeepSpeed itself does not (set DS_ACCELERATOR=cpu)."""

import argparse
from importlib import import_module

import deepspeed
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

# Gloo does the work: DeepSpeed would compile its shared memory first, 50 s on a machine that has not done so before.
import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # the attribute `torch` of deepspeed.comm is torch


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy with the four places replaced that insist on CUDA."""

    @property
    def root_device(self):
        return torch.device("cpu")

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=0),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer
