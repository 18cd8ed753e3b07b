"""Adaptations that a rule refuses: (overrides, what the message says)."""

_BASE = "model.init_from=runs/base/latest"
_ADAPTER, _LORA = [_BASE, "adapt.method=adapter"], [_BASE, "adapt.method=lora"]
_NO_BIAS = ["model.linear_bias=false", "model.normalization=rmsnorm"]
_ENTRIES = [*_LORA, "adapt.entries=3", "deepspeed={zero_optimization: {stage: 0}}"]
_SGD = "optim.name=sgd"
_ALONE = [*_ENTRIES, "optim.max_grad_norm=0"]

BROKEN_ADAPTATIONS = [
    (["adapt.method=lora"], "model.init_from: is what adapt.method: lora adapts, and is left out"),
    ([_BASE, "adapt.method=full", "adapt.top_layers=5"], "adapt.top_layers = 5: must be at most model.num_layers = 4"),
    (
        [_BASE, "adapt.method=full", "adapt.top_layers=1", "adapt.layer_decay=0.9"],
        "adapt.layer_decay = 0.9: tells layers apart, and adapt.top_layers = 1 leaves nothing to tell apart",
    ),
    (
        [*_ADAPTER, "adapt.variant=parallel", "adapt.init_std=0.1"],
        "adapt.init_std = 0.1: is not read with adapt.init: zero_up",
    ),
    ([*_ADAPTER, "adapt.width=65"], "adapt.width = 65: must be at most model.hidden_size = 64"),
    ([*_LORA, "adapt.rank=65"], "adapt.rank = 65: must be at most model.hidden_size = 64"),
    ([_BASE, "adapt.method=bitfit", *_NO_BIAS], "adapt.method = 'bitfit': the model's layers have no biases"),
    (
        [_BASE, "adapt.method=bitfit", "adapt.which=query_fc1", "model.linear_bias=false"],
        "adapt.which = 'query_fc1': the model's linear layers have no biases",
    ),
    ([*_LORA, "adapt.bias=all", *_NO_BIAS], "adapt.bias = 'all': the model's layers have no biases"),
    (
        [*_LORA, "adapt.bias=lora_only", "model.linear_bias=false"],
        "adapt.bias = 'lora_only': the model's linear layers have no biases",
    ),
    (
        [_BASE, "adapt.method=bitfit", "adapt.which=query_fc1", "optim.decay_biases_and_norms=true"],
        "optim.decay_biases_and_norms = True: would decay biases that adapt.which: query_fc1 leaves as they are",
    ),
    (
        [*_LORA, "adapt.dropout=0.1", "train.compile=true"],
        "adapt.dropout = 0.1: train.compile: true needs 0.0",
    ),
    (_ENTRIES, "optim.max_grad_norm = 1.0: scales one adaptation by another's gradient"),
    (
        [*_ENTRIES, "optim.max_grad_norm=0", "optim.adam_bias_correction=false"],
        "adapt.entries = 3 has an AdamW of its own",
    ),
    (
        [*_ENTRIES, "optim.max_grad_norm=0", "adapt.bias=all"],
        "adapt.bias = 'all': adapt.entries = 3 would all train it",
    ),
    (_ALONE, "adapt.entries = 3: is told by a task's rows (task.columns.entry), and the run has no task"),
    ([*_ENTRIES, "optim.name=adafactor"], "optim.name = 'adafactor': adapt.entries = 3 needs sgd or adamw"),
    ([*_ENTRIES, "optim.name=muon"], "optim.name = 'muon': adapt.entries = 3 needs sgd or adamw"),
    ([*_ENTRIES, _SGD], "optim.weight_decay = 0.1: moves adaptations that have no row in a batch"),
    (
        [*_ENTRIES, _SGD, "optim.weight_decay=0", "optim.sgd_momentum=0.9"],
        "optim.sgd_momentum = 0.9: moves adaptations that have no row in a batch",
    ),
]
