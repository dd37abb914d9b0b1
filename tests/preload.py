"""What the processes of several ranks have imported before they are forked."""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # imports torch._inductor, for two seconds
    import hydra.core.plugins
    import matplotlib.backends.backend_agg  # noqa: F401

    import rwkv_train.cli.configure
    import rwkv_train.models.rwkv4
    import rwkv_train.training.loop
    import rwkv_train.training.strategy.fsdp
    import rwkv_train.training.strategy.zero  # noqa: F401

    hydra.core.plugins.Plugins.instance()  # imports its own plugins
gc.freeze()  # a forked process does not look through all these modules for garbage
