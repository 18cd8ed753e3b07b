"""Schedules that contradict themselves, overlap, never end or are not read, each with its line: see test_run."""

STAGES = "batch.stages=[{batch_size: 4, until_tokens: 1000}, {batch_size: 8, until_tokens: 2000}]"
LENGTHS = "data.seq_length_stages=[{seq_length: 8, until_tokens: 1000}, {seq_length: 16, until_tokens: 2000}]"
WSD = ("optim.lr_decay_style=wsd", "optim.lr_cooldown_tokens=2000")
COOLDOWN = ("optim.lr_cooldown={start_tokens: 5000, tokens: 5000}", "optim.lr_decay_tokens=20000")
REWARMUP = "optim.lr_rewarmup={start_tokens: 5000, tokens: 1000}"

BROKEN_SCHEDULES = [
    (
        ["optim.lr_decay_style=constant", "optim.lr_warmup_tokens=20000"],
        "optim.lr_warmup_tokens = 20000: the warm-up never ends: train.train_tokens is 10000",
    ),
    (["optim.lr_decay_tokens=5000"], "optim.lr_decay_tokens = 5000: the rate is 0 from there to the end"),
    (["batch.ramp={start: 16, increment: 4, ramp_samples: 100}"], "batch.ramp.start = 16: changes nothing"),
    (
        ["optim.weight_decay_style=cosine", "optim.weight_decay_end=0.1"],
        "optim.weight_decay_end = 0.1: changes nothing",
    ),
    ([STAGES, "batch.ramp={start: 4, increment: 4, ramp_samples: 100}"], "batch.ramp = 'a section': is the other form"),
    (["batch.ramp={start: 4, increment: 4, ramp_samples: 400}"], "ramp_samples = 400: the ramp never ends"),
    ([STAGES, "batch.stages.1.until_tokens=1000"], "batch.stages.1.until_tokens = 1000: must be above the end"),
    ([STAGES, "batch.stages.1.until_tokens=10000"], "batch.stages.1.until_tokens = 10000: the stage never ends"),
    ([STAGES, "batch.stages.0.batch_size=8"], "batch.stages.0.batch_size = 8: is that of what follows"),
    ([STAGES, "batch.stages.1.batch_size=16"], "batch.stages.1.batch_size = 16: is that of what follows"),
    ([STAGES, "batch.stages.1.batch_size=32"], "batch.stages.1.batch_size = 32: must be at most batch.global_batch"),
    ([STAGES, "batch.stages.1.batch_size=7"], "batch.stages.1.batch_size = 7: must be a multiple of"),
    ([LENGTHS, "train.compile=true"], "train.compile: true compiles for one length"),
    ([LENGTHS, "data.seq_length_stages.0.until_tokens=2000"], "stages.1.until_tokens = 2000: must be above the end"),
    ([LENGTHS, "data.seq_length_stages.0.seq_length=16"], "seq_length = 16: is that of what follows the stage"),
    ([LENGTHS, "data.seq_length_stages.1.seq_length=64"], "seq_length = 64: must be at most data.seq_length = 32"),
    ([LENGTHS, "train.train_tokens=1500"], "stages.1.until_tokens = 2000: the stage never ends"),
    (
        [LENGTHS, "parallel.tp_size=2", "parallel.sequence_parallel=true", "data.seq_length_stages.0.seq_length=7"],
        "data.seq_length_stages.0.seq_length = 7: must be a multiple of parallel.tp_size = 2",
    ),
    (
        [LENGTHS, "model.preset=bert-base", "tokenizer.path=x"],
        "data.seq_length_stages = '2 stages': cuts windows of causal_lm, and the objective is bert",
    ),
    (["optim.lr_decay_style=wsd"], "optim.lr_cooldown_tokens: is required with optim.lr_decay_style: wsd"),
    ([*WSD, "optim.lr_warmup_tokens=9000"], "optim.lr_cooldown_tokens = 2000: overlaps the warm-up"),
    ([*WSD, "optim.lr_decay_tokens=20000"], "optim.lr_decay_tokens = 20000: the cooldown never ends"),
    (["optim.lr_cooldown_tokens=5"], "optim.lr_cooldown_tokens = 5: is read with optim.lr_decay_style: wsd only"),
    (["optim.lr_cooldown_style=cosine"], "optim.lr_cooldown_style = 'cosine': is read with optim.lr_decay_style: wsd"),
    (["optim.lr_decay_power=2"], "optim.lr_decay_power = 2.0: is read with optim.lr_decay_style: polynomial only"),
    (
        ["optim.lr_decay_style=constant", "optim.lr_decay_tokens=5"],
        "optim.lr_decay_tokens = 5: is read with an optim.lr_decay_style that decays only",
    ),
    (["optim.lr_decay_style=constant", "optim.min_lr=1e-5"], "optim.min_lr = 1e-05: is read with"),
    ([COOLDOWN[0]], "optim.lr_decay_tokens: is required with optim.lr_cooldown, whose run is shorter"),
    ([*COOLDOWN, "optim.lr_warmup_tokens=6000"], "optim.lr_cooldown.start_tokens = 5000: overlaps the warm-up"),
    ([*COOLDOWN, *WSD, "optim.lr_decay_tokens=6000"], "lr_cooldown.start_tokens = 5000: overlaps the cooldown of"),
    ([*COOLDOWN, "optim.lr_cooldown.tokens=6000"], "optim.lr_cooldown.tokens = 6000: the cooldown never ends"),
    ([*COOLDOWN, "optim.lr_cooldown.tokens=4000"], "optim.lr_cooldown.tokens = 4000: the rate would be 0 from 9000"),
    ([REWARMUP, "optim.lr_warmup_tokens=6000"], "optim.lr_rewarmup.start_tokens = 5000: overlaps the warm-up"),
    ([REWARMUP, "optim.lr_rewarmup.tokens=6000"], "optim.lr_rewarmup.tokens = 6000: the warm-up never ends"),
    ([REWARMUP, *COOLDOWN], "optim.lr_rewarmup.start_tokens = 5000: overlaps optim.lr_cooldown, from 5000 to 10000"),
    (
        [REWARMUP, *WSD, "optim.lr_decay_tokens=7500", "optim.min_lr=1e-5"],
        "lr_rewarmup.start_tokens = 5000: overlaps the cooldown of",
    ),
    (["optim.weight_decay_end=0.5"], "optim.weight_decay_end = 0.5: is read with optim.weight_decay_style linear"),
    (["optim.weight_decay_style=cosine"], "optim.weight_decay_end: is required with optim.weight_decay_style: cosine"),
    (
        ["checkpoint.allow_change=[batch]", "checkpoint.resume=never"],
        "checkpoint.allow_change = ['batch']: is read where a run is resumed",
    ),
]
