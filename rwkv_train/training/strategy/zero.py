"""DeepSpeed's ZeRO: optimiser state (stage 1), gradients (2) and parameters (3) are sharded over the devices.

The only file that imports deepspeed, and only when such a strategy is asked for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from rwkv_train.checkpoint.shards import MOMENTS, WEIGHT, StateShard
from rwkv_train.config import Config
from rwkv_train.json_files import load_object
from rwkv_train.models import LanguageModel
from rwkv_train.planning.resolved import ResolvedConfig
from rwkv_train.training.strategy.shared import ShardedStrategy, adam_moments
from rwkv_train.user_path import user_path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deepspeed's import, about torch's own deprecations
    import deepspeed
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

MAX_BUCKET_ELEMENTS = 200_000_000  # elements of one collective


def deepspeed_config(config: Config, resolved: ResolvedConfig, stage: int, offload: bool, block: int) -> dict[str, Any]:
    """DeepSpeed's JSON, from our config; a JSON of the user's own is merged over it.

    Args:
        config: of the run.
        resolved: what runs.
        stage: 1, 2 or 3.
        offload: whether Adam, and in stage 3 the parameters, live in the host's memory.
        block: parameters of one block: the elements of one collective.
    """
    bucket, gpu = min(block, MAX_BUCKET_ELEMENTS), resolved.gpu
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": gpu,  # CPUs have nothing to overlap with
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # DeepSpeed's defaults, 1e9 elements each, keep a model of a billion parameters gathered, and copy all
            # gradients of a shard at once
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 0,
            "sub_group_size": bucket,
            "stage3_param_persistence_threshold": config.model.n_embd,  # vectors stay gathered
        }
    host = {"device": "cpu", "pin_memory": gpu}
    if offload:
        zero |= {"offload_optimizer": host} | ({"offload_param": host} if stage == 3 else {})
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": resolved.micro,
        "gradient_clipping": config.optim.clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW in its fused form, on the CPU too
        "zero_force_ds_cpu_optimizer": False,
    }
    if resolved.precision == "bf16-mixed":
        # Not DeepSpeed's own bf16 mode: that one casts decay, bonus, mix and norm parameters as well. The modules named
        # are those whose gradients would be summed over the ranks in bfloat16: none.
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if config.deepspeed is not None:
        derived = _merged(derived, load_object(user_path(config.deepspeed)))
    return derived


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


class _Precision(DeepSpeedPrecision):
    """Leaves the parameters in float32; torch_autocast of DeepSpeed decides which products run in bfloat16."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning has divided the loss by the passes of a step; left to itself, DeepSpeed would divide it again."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class Zero(ShardedStrategy, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, on CPUs as well (over gloo)."""

    divided = brings_precision = True

    def __init__(self, settings: dict[str, Any], backend: str, precision: str) -> None:
        super().__init__(
            config=settings,
            process_group_backend=backend,
            precision_plugin=_Precision(precision),  # type: ignore[arg-type]
            logging_level=logging.ERROR,
        )
        self.stage = int(settings["zero_optimization"]["stage"])
        self.sharded = self.stage == 3

    # Lightning refuses DeepSpeed without CUDA; DeepSpeed itself runs on any device with torch.distributed.
    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def _find_ranks(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        if self.root_device.type == "cpu":
            # DeepSpeed would compile an operator for all-reduces through shared memory: minutes on a busy machine, and
            # under a lock for which every later run waits if this one is killed. Gloo needs none. To find out what it
            # could compile takes it another second.
            deepspeed.ops.__compatible_ops__ = {}
        self._init_deepspeed_distributed()

    def _format_config(self) -> None:
        self._format_batch_size_and_grad_accum_config()  # without Lightning's choice of DeepSpeed's precision mode

    def init_deepspeed(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deepspeed, about torch's own deprecations
            assert self.model is not None
            self._initialize_deepspeed_train(self.model)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        yield  # `materialise` shards the parameters

    def _materialise(self, model: LanguageModel) -> None:
        """In stage 3 one parameter at a time, each of which is sharded at once."""
        self._init_config_if_needed()
        device = torch.device("cpu") if self.root_device.type == "cpu" else self.root_device
        if self.stage < 3:
            model.to_empty(device=device)
            return
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = torch.empty(parameter.shape, device=device)
                setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
                deepspeed.zero.Init(module=_Holder(getattr(module, name)), config_dict_or_path=self.config)

    @property
    def engine_optimizer(self) -> Any:
        return self.optimizers[0]

    def shards(self, moments: bool) -> Iterator[StateShard]:
        yield from (self._shards_of_stage_3 if self.stage == 3 else self._shards_of_stages_1_and_2)(moments)

    def _shards_of_stage_3(self, moments: bool) -> Iterator[StateShard]:
        if moments:
            self._make_moments()
        for name, parameter in self.named_weights():
            held: Any = parameter
            cut = held.ds_tensor  # flat, padded so that all ranks have the same size
            start = min(cut.numel() * self.global_rank, held.ds_numel)
            count = min(cut.numel(), held.ds_numel - start)
            yield StateShard(WEIGHT, name, start, cut.data[:count], not parameter.requires_grad)
            if not parameter.requires_grad:
                continue  # the optimiser has no copy of its own
            master = safe_get_local_fp32_param(parameter)

            def put(values: Tensor, parameter: Any = parameter, room: int = cut.numel()) -> None:
                safe_set_local_fp32_param(parameter, _padded(values, room))

            yield StateShard(WEIGHT, name, start, master[:count], True, put)
            for moment in MOMENTS if moments else ():

                def put_moment(
                    values: Tensor, parameter: Any = parameter, moment: str = moment, room: int = cut.numel()
                ) -> None:
                    safe_set_local_optimizer_state(parameter, _padded(values, room), moment)

                yield StateShard(
                    moment, name, start, safe_get_local_optimizer_state(parameter, moment)[:count], True, put_moment
                )

    def _shards_of_stages_1_and_2(self, moments: bool) -> Iterator[StateShard]:
        if moments:
            self._make_moments()
        zero = self.engine_optimizer
        for name, parameter in self.named_weights():
            frozen = not parameter.requires_grad  # then the optimiser has no copy of its own
            yield StateShard(WEIGHT, name, 0, parameter.detach().view(-1), frozen and self.global_rank == 0)
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # this rank owns none of it
                continue
            start, address = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            yield StateShard(WEIGHT, name, start, mapping.hp_fragment.detach(), True)
            if moments:
                state = zero.optimizer.state[zero.single_partition_of_fp32_groups[mapping.param_group_index]]
                for moment in MOMENTS:
                    values = state[moment].narrow(0, address.start, address.numel)
                    yield StateShard(moment, name, start, values, True)

    def _make_moments(self) -> None:
        """Makes Adam's state of the flat tensors that hold this rank's parameters."""
        for flat in self._flat():
            list(adam_moments(self.engine_optimizer.optimizer.state[flat], flat.detach()))

    def _flat(self) -> list[Tensor]:
        zero = self.engine_optimizer
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flat

    def states(self) -> Iterator[dict[str, Any]]:
        yield from self.engine_optimizer.optimizer.state.values()

    def filled(self) -> None:
        """Gathers again the vectors that ZeRO-3 keeps complete on every device."""
        persistent = getattr(self.engine_optimizer, "persistent_parameters", None)
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def clip(self, limit: float) -> Tensor | None:
        return None  # the step of the engine clips

    def norm_of_step(self) -> Tensor | None:
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def skip_update_if(self, bad: Tensor) -> None:
        self.engine_optimizer.optimizer.found_inf = bad.float()  # the engine itself skips gradients that are not finite

    def full_value(self, parameter: Tensor) -> Tensor | None:
        kept: Any = parameter
        return parameter.detach() if self.stage < 3 or kept.numel() == kept.ds_numel else None

    def probe(self, batch: Any) -> Tensor:
        assert self.model is not None
        assert self.lightning_module is not None
        return cast(Tensor, self._forward_redirection(self.model, self.lightning_module, "probe", batch))


class _Holder(nn.Module):
    """A module with one parameter, for deepspeed.zero.Init."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def _padded(values: Tensor, numel: int) -> Tensor:
    return nn.functional.pad(values, (0, numel - values.numel()))
