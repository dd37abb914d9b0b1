"""What the processes of several ranks have imported before they are forked."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import rwkv_train.training.loop
    import rwkv_train.training.strategy.fsdp
    import rwkv_train.training.strategy.zero  # noqa: F401
