"""What lmscale does with each of DeepSpeed's JSON keys: one table, checked before any rank starts.

DeepSpeed accepts a misspelt key without a word, and some of its keys would do what a section of ours does already. So
each key that DeepSpeed 0.19 reads is here, `tested` (used in our tests), `passed` (handed through as it is, not tested
by us) or `refused` (with the reason and what to write instead). Tests compare the table with the keys that the
installed DeepSpeed asks for, both ways: none is missing, none is left over from an older release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "float", "bool", "str", "section", "any"]


@dataclass(frozen=True)
class DeepSpeedKey:
    """One key of the JSON."""

    path: str
    """Dotted path, as in "zero_optimization.stage"."""
    status: Literal["tested", "passed", "refused"]
    kind: Kind
    """Type of the value; the keys of a "section" are in the table, those inside "any" are not looked at."""
    note: str
    """What it does; for a refused key, why."""
    remedy: str = ""
    """For a refused key: what to do instead."""


def _tested(path: str, kind: Kind, note: str) -> DeepSpeedKey:
    return DeepSpeedKey(path, "tested", kind, note)


def _passed(path: str, kind: Kind, note: str) -> DeepSpeedKey:
    return DeepSpeedKey(path, "passed", kind, note)


def _refused(path: str, note: str, remedy: str = "drop the key") -> DeepSpeedKey:
    return DeepSpeedKey(path, "refused", "any", note, remedy)


_REMOVED = "DeepSpeed 0.19 has removed it"
_OWN_METRICS = "lmscale writes the metrics"
_OWN_RECOMPUTE = "lmscale decides what backward computes again"
_OWN_CHECKPOINT = "lmscale writes and reads its own checkpoints"
_NO_NVME = "offload to NVMe is not tested"
_ZERO_PLUS = "ZeRO++ is not tested"
_SHARDS = "it moves the partitions that checkpoints are cut from, and is not tested"

_TOP_LEVEL = (
    _tested("train_batch_size", "int", 'agrees with batch.global_batch_size, or "auto"'),
    _tested("train_micro_batch_size_per_gpu", "int", 'agrees with batch.micro_batch_size, or "auto"'),
    _tested("gradient_accumulation_steps", "int", 'agrees with the batch and the number of ranks, or "auto"'),
    _tested("gradient_clipping", "float", 'agrees with optim.max_grad_norm, or "auto"'),
    _tested("zero_optimization", "section", "ZeRO: stage, offload, communication"),
    _tested("fp16", "section", "agrees with precision and loss_scale"),
    _tested("bf16", "section", "agrees with precision"),
    _tested("data_types", "section", "types of accumulation buffers"),
    _tested("zero_allow_untested_optimizer", "bool", "always true: the optimizers are lmscale's"),
    _passed(
        "zero_force_ds_cpu_optimizer",
        "bool",
        "with optimizer offload, insist on DeepSpeed's CPU Adam; false unless given",
    ),
    _passed("communication_data_type", "str", "type in which gradients are reduced"),
    _passed("prescale_gradients", "bool", "divide gradients before they are summed over the ranks"),
    _passed("gradient_predivide_factor", "float", "with prescale_gradients, the part divided beforehand"),
    _passed("disable_allgather", "bool", "read by DeepSpeed, used by none of its engines"),
    _passed("disable_python_gc", "bool", "stop Python's cyclic garbage collector in the ranks"),
    _passed("steps_per_print", "int", "DeepSpeed's own progress lines, to the rank logs; off unless given"),
    _passed("wall_clock_breakdown", "bool", "DeepSpeed's timers, to the rank logs; they synchronize the device"),
    _passed("memory_breakdown", "bool", "DeepSpeed's memory report, to the rank logs"),
    _passed("dump_state", "bool", "DeepSpeed's configuration, to the rank logs"),
    _passed("log_level", "str", "level of DeepSpeed's logger"),
    _passed("timers", "section", "settings of DeepSpeed's throughput timer"),
    _passed("comms_logger", "section", "DeepSpeed's log of collectives, to the rank logs"),
    _passed("flops_profiler", "section", "DeepSpeed's profiler, to the rank logs; it turns wall_clock_breakdown on"),
    _refused("optimizer", "lmscale builds the optimizer", "use the optim section"),
    _refused("scheduler", "lmscale computes the rate from the consumed tokens", "use optim.lr and its schedule"),
    _refused("gradient_allreduce_op", "lmscale divides the summed loss by the global number of tokens"),
    _refused("managed_gradient_accumulation", "lmscale counts the micro batches", "use the batch section"),
    _refused("vocabulary_size", "the model has it", "use model.vocab_size"),
    _refused("dataloader_drop_last", "lmscale reads the data"),
    _refused("data_efficiency", "lmscale reads the data", "use the data section"),
    _refused("curriculum_learning", _REMOVED),
    _refused("tensorboard", _OWN_METRICS, "use monitor.tensorboard"),
    _refused("wandb", _OWN_METRICS, "use monitor.wandb"),
    _refused("csv_monitor", _OWN_METRICS, "read metrics.jsonl in the run's directory"),
    _refused("comet", _OWN_METRICS, "use monitor.tensorboard or monitor.wandb"),
    _refused("activation_checkpointing", _OWN_RECOMPUTE, "use parallel.recompute"),
    _refused("checkpoint", _OWN_CHECKPOINT, "use the checkpoint section"),
    _refused("datastates_ckpt", _OWN_CHECKPOINT, "use the checkpoint section"),
    _refused("nebula", _OWN_CHECKPOINT, "use the checkpoint section"),
    _refused(
        "pipeline", "lmscale sets the pipeline's partitioning off, which mixes ranks otherwise", "use parallel.pp_size"
    ),
    _refused("tensor_parallel", "lmscale builds tensor-parallel modules", "use parallel.tp_size"),
    _refused("data_parallel_size", "lmscale gives DeepSpeed the ranks' layout", "use the parallel section"),
    _refused("sequence_parallel_size", "Ulysses sequence parallelism is not tested", "use parallel.sequence_parallel"),
    _refused("seq_parallel_communication_data_type", "Ulysses sequence parallelism is not tested"),
    _refused("expert_parallel", "mixtures of experts are not tested"),
    _refused("use_data_before_expert_parallelism", "mixtures of experts are not tested"),
    _refused("compile", "lmscale compiles the layers; DeepCompile is not tested", "use train.compile"),
    _refused("torch_autocast", "lmscale sets the precision", "use precision: bf16 or fp16"),
    _refused("bfloat16", "it is the old name of bf16", "use precision: bf16"),
    _refused("amp", _REMOVED, "use precision: fp16 or bf16"),
    _refused("aio", _NO_NVME),
    _refused("autotuning", "the autotuner starts runs of its own, past lmscale's checks"),
    _refused("model_info", "it belongs to the autotuner, which starts runs past lmscale's checks"),
    _refused("hybrid_engine", "lmscale does not use the RLHF engine"),
    _refused("weight_quantization", "quantized weights are not tested"),
    _refused("allgather_size", "it is an old name", "use zero_optimization.allgather_bucket_size"),
    _refused("compression_training", _REMOVED),
    _refused("quantize_training", _REMOVED),
    _refused("eigenvalue", _REMOVED),
    _refused("progressive_layer_drop", _REMOVED),
    _refused("sparse_attention", _REMOVED),
    _refused("sparse_gradients", _REMOVED),
    _refused("graph_harvesting", _REMOVED),
    _refused("elasticity", _REMOVED, "start again on another number of ranks"),
)

_PRECISION = (
    _tested("fp16.enabled", "bool", 'agrees with precision, or "auto"'),
    _tested("fp16.initial_scale_power", "int", 'agrees with log2 of loss_scale.initial, or "auto"'),
    _tested("fp16.loss_scale_window", "int", 'agrees with loss_scale.window, or "auto"'),
    _tested("fp16.hysteresis", "int", 'agrees with loss_scale.hysteresis, or "auto"'),
    _tested("fp16.min_loss_scale", "int", 'agrees with loss_scale.minimum, or "auto"'),
    _tested("fp16.loss_scale", "float", "0, for dynamic scaling; a static scale is refused"),
    _passed("fp16.consecutive_hysteresis", "bool", "fill the hysteresis up after every step without overflow"),
    _refused("fp16.auto_cast", "the inputs are token ids"),
    _refused("fp16.fp16_master_weights_and_grads", "master weights are fp32"),
    _tested("bf16.enabled", "bool", 'agrees with precision, or "auto"'),
    _passed("bf16.immediate_grad_update", "bool", "add each gradient to the fp32 buffer as soon as it is there"),
    _passed("bf16.check_grad_overflow", "bool", "skip a step whose gradients are not finite"),
    _refused("bf16.bf16_master_weights_and_grads", "master weights are fp32"),
    _refused("bf16.bf16_optimizer_states", "optimizer state is fp32"),
    _tested("data_types.grad_accum_dtype", "str", "type of the gradient accumulation buffers: fp32, bf16, fp16"),
    _refused("data_types.param_dtype", "lmscale sets the precision", "use precision"),
    _refused("data_types.buffer_dtype", "lmscale sets the precision", "use precision"),
    _refused("data_types.keep_in_fp32_modules", "lmscale sets the precision", "use precision"),
)

_ZERO = (
    _tested("zero_optimization.stage", "int", "0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters"),
    _tested("zero_optimization.offload_optimizer", "section", "optimizer state in host memory"),
    _tested("zero_optimization.offload_param", "section", "parameters in host memory (stage 3)"),
    _tested("zero_optimization.contiguous_gradients", "bool", "copy gradients to one buffer as they are made"),
    _tested("zero_optimization.overlap_comm", "bool", "reduce gradients while backward goes on"),
    _tested("zero_optimization.reduce_scatter", "bool", "reduce-scatter in the place of all-reduce"),
    _tested("zero_optimization.reduce_bucket_size", "int", "elements reduced at a time"),
    _tested("zero_optimization.allgather_bucket_size", "int", "elements gathered at a time"),
    _tested("zero_optimization.sub_group_size", "int", "elements updated at a time (stage 3)"),
    _tested("zero_optimization.stage3_prefetch_bucket_size", "int", "elements fetched ahead of use"),
    _tested("zero_optimization.stage3_param_persistence_threshold", "int", "smaller parameters are not partitioned"),
    _tested("zero_optimization.stage3_max_live_parameters", "int", "elements kept gathered at most"),
    _tested("zero_optimization.stage3_max_reuse_distance", "int", "a parameter used again within it stays gathered"),
    _passed("zero_optimization.stage3_model_persistence_threshold", "int", "elements left unpartitioned at most"),
    _passed("zero_optimization.stage3_module_granularity_threshold", "int", "fetch small modules as one"),
    _passed("zero_optimization.stage3_use_all_reduce_for_fetch_params", "bool", "fetch parameters by all-reduce"),
    _passed("zero_optimization.stage3_allgather_sequential", "bool", "gather parameters one by one, with less memory"),
    _passed(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save", "bool", "without effect: " + _OWN_CHECKPOINT
    ),
    _passed("zero_optimization.allgather_partitions", "bool", "gather updated parameters, or broadcast them"),
    _passed("zero_optimization.use_multi_rank_bucket_allreduce", "bool", "reduce the buckets of all ranks at once"),
    _passed("zero_optimization.ignore_unused_parameters", "bool", "accept parameters without a gradient (stage 2)"),
    _passed("zero_optimization.memory_efficient_linear", "bool", "DeepSpeed's own linear function (stage 3)"),
    _passed("zero_optimization.override_module_apply", "bool", "gather parameters in Module.apply (stage 3)"),
    _passed("zero_optimization.leaf_module", "section", "modules fetched as one (stage 3)"),
    _passed("zero_optimization.leaf_module.classes", "any", "by class, a list"),
    _passed("zero_optimization.leaf_module.names", "any", "by full name, a list"),
    _passed("zero_optimization.leaf_module.name_suffixes", "any", "by the end of the name, a list"),
    _passed("zero_optimization.log_trace_cache_warnings", "bool", "warnings of the prefetcher, to the rank logs"),
    _passed("zero_optimization.enable_sanity_checks", "bool", "DeepSpeed's internal checks"),
    _refused("zero_optimization.compute_grad_norm", "lmscale reports the gradient norm"),
    _refused("zero_optimization.round_robin_gradients", _SHARDS),
    _refused("zero_optimization.parameter_alignment", _SHARDS),
    _refused("zero_optimization.load_from_fp32_weights", _OWN_CHECKPOINT),
    _refused("zero_optimization.elastic_checkpoint", _OWN_CHECKPOINT),
    _refused("zero_optimization.pipeline_loading_checkpoint", _OWN_CHECKPOINT),
    _refused("zero_optimization.legacy_stage1", "it is an old implementation", "use stage 1"),
    _refused("zero_optimization.cpu_offload", "it is an old name", "use offload_optimizer"),
    _refused("zero_optimization.cpu_offload_param", "it is an old name", "use offload_param"),
    _refused("zero_optimization.cpu_offload_use_pin_memory", "it is an old name", "use offload_optimizer.pin_memory"),
    _refused(
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "it is an old name",
        "use stage3_gather_16bit_weights_on_model_save",
    ),
    _refused("zero_optimization.zenflow", "ZenFlow is not tested"),
    _refused("zero_optimization.zero_hpz_partition_size", _ZERO_PLUS),
    _refused("zero_optimization.zero_quantized_weights", _ZERO_PLUS),
    _refused("zero_optimization.zero_quantized_nontrainable_weights", _ZERO_PLUS),
    _refused("zero_optimization.zero_quantized_gradients", _ZERO_PLUS),
    _refused("zero_optimization.zeropp_loco_param", _REMOVED),
    _refused("zero_optimization.mics_shard_size", _REMOVED),
    _refused("zero_optimization.mics_hierarchical_params_gather", _REMOVED),
    _refused("zero_optimization.save_muon_momentum_buffer_in_memory", "it belongs to the Muon optimizer"),
)

_OFFLOAD = (
    _tested("zero_optimization.offload_optimizer.device", "str", "cpu or none; nvme is refused"),
    _tested("zero_optimization.offload_optimizer.pin_memory", "bool", "page-locked host memory"),
    _passed("zero_optimization.offload_optimizer.cpuadam_cores_perc", "float", "share of the cores for SuperOffload"),
    _passed("zero_optimization.offload_optimizer.fast_init", "bool", "without effect but with NVMe"),
    _refused("zero_optimization.offload_optimizer.ratio", "partial offload is not tested"),
    _refused("zero_optimization.offload_optimizer.super_offload", "SuperOffload is not tested"),
    _refused("zero_optimization.offload_optimizer.nvme_path", _NO_NVME),
    _refused("zero_optimization.offload_optimizer.buffer_count", _NO_NVME),
    _refused("zero_optimization.offload_optimizer.pipeline_read", _NO_NVME),
    _refused("zero_optimization.offload_optimizer.pipeline_write", _NO_NVME),
    _tested("zero_optimization.offload_param.device", "str", "cpu or none; nvme is refused"),
    _tested("zero_optimization.offload_param.pin_memory", "bool", "page-locked host memory"),
    _refused("zero_optimization.offload_param.nvme_path", _NO_NVME),
    _refused("zero_optimization.offload_param.buffer_count", _NO_NVME),
    _refused("zero_optimization.offload_param.buffer_size", _NO_NVME),
    _refused("zero_optimization.offload_param.max_in_cpu", _NO_NVME),
)

_WATCHING = (
    _passed("timers.throughput", "section", "the timer of a step"),
    _passed("timers.throughput.enabled", "bool", "on unless given"),
    _passed("timers.throughput.synchronized", "bool", "wait for the device before the time is read; on unless given"),
    _passed("comms_logger.enabled", "bool", "off unless given"),
    _passed("comms_logger.prof_all", "bool", "log every operation"),
    _passed("comms_logger.prof_ops", "any", "operations to log, a list"),
    _passed("comms_logger.verbose", "bool", "a line for each call"),
    _passed("comms_logger.debug", "bool", "name the caller"),
    _passed("flops_profiler.enabled", "bool", "off unless given"),
    _passed("flops_profiler.recompute_fwd_factor", "float", "forward passes that recompute adds"),
    _passed("flops_profiler.profile_step", "int", "the step to profile"),
    _passed("flops_profiler.module_depth", "int", "depth of the modules to print; -1 for the innermost"),
    _passed("flops_profiler.top_modules", "int", "modules to print at each depth"),
    _passed("flops_profiler.detailed", "bool", "print the whole model"),
    _passed("flops_profiler.output_file", "str", "a file in the place of the log"),
)

KEYS: dict[str, DeepSpeedKey] = {key.path: key for key in (*_TOP_LEVEL, *_PRECISION, *_ZERO, *_OFFLOAD, *_WATCHING)}
"""By dotted path, in the order of the docs' table."""
