"""Adaptation beside PEFT on the same model: steps, batches whose rows have LoRAs of their own, memory of a step."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_race import Contender, collect, median_ratio, race
from bench_sheet import Sheet
from bench_train import BATCH, SEQ_LENGTH, SMALL

from lmscale.config.model import ModelConfig

Keys = dict[str, Any]

RANK, LENGTH = 8, 10
"""Of LoRA; of prefix and prompt."""
NUM_ROWS, ROW_LENGTH = 64, 32
GOAL_OF_STEP, GOAL_OF_ROWS, GOAL_OF_MEMORY = 1.0, 1.5, 0.5
LARGER = SMALL.model_copy(update={"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12})
MEMORY_CASES = ((SMALL, BATCH), (SMALL, 1), (LARGER, 2))
"""Models, and the rows of a step."""
OURS, PEFT = "lmscale", "PEFT"
LORA: Keys = {"method": "lora", "rank": RANK, "alpha": 2.0 * RANK}
ADAPTS: dict[str, Keys] = {
    "LoRA, query and value": {**LORA, "targets": ["query", "value"]},
    "LoRA, fused query, key, value": {**LORA, "targets": ["qkv"]},
    "prefix": {"method": "prefix_tuning", "length": LENGTH, "projection": None},
    "prompt": {"method": "prompt_tuning", "length": LENGTH, "init": "uniform_sym"},
}
FULL: Keys = {"method": "full"}


# --- what runs in the ranks ---


def make_base(home: str, model: ModelConfig = SMALL) -> None:
    """Save a random GPT-2 of transformers, and import it: the base of all contenders."""
    from transformers import GPT2LMHeadModel

    from lmscale.convert.importing import import_hf

    hf = GPT2LMHeadModel(_gpt2_config(model))
    hf.save_pretrained(f"{home}/hf")
    import_hf(Path(home) / "hf", Path(home) / "base")


def our_step(home: str, adapt: Keys, batch: int, length: int, optim: str = "adamw") -> Callable[[], Any]:
    """Build lmscale's engine around the base and return its next step."""
    import bench_peers
    import torch

    engine = _engine(home, adapt, batch, length, optim)
    micro_batch, number = _micro_batch(adapt, batch, length), iter(range(1, 10**9))
    labels = micro_batch["labels"]
    micro_batch["loss_mask"] = torch.ones(labels.shape)
    micro_batch["loss_mask"][:, -1] = 0.0  # as in PEFT's, nothing follows the last token
    if "prompt_places" in micro_batch:
        micro_batch["loss_mask"][:, :LENGTH] = 0.0
    return lambda: engine.train_step([micro_batch], 1, next(number), bench_peers.LR).loss.item()


def peft_step(home: str, adapt: Keys, batch: int, length: int) -> Callable[[], Any]:
    """Build PEFT's model around the base, or take the base itself, and return its next step."""
    import bench_peers

    model = _peft_model(home, adapt).train()
    tokens = _tokens(batch, length)
    trainer = bench_peers.TorchTrainer(model, lambda module, x, y: module(input_ids=x, labels=y).loss, "fp32")
    return lambda: trainer.step(tokens, tokens)


def our_forward(home: str, adapt: Keys, batch: int, length: int) -> Callable[[], Any]:
    """Build lmscale's model and return a pass without gradients."""
    import torch

    engine = _engine(home, adapt, batch, length, "sgd")
    model, micro_batch = engine.model.eval(), _micro_batch(adapt, batch, length)
    fields = tuple(micro_batch[name] for name in engine.context.wire.input_names)
    inputs = fields if len(fields) > 1 else fields[0]

    @torch.no_grad()
    def forward() -> None:
        model(inputs)

    return forward


def peft_forward(home: str, num_loras: int, batch: int, length: int) -> Callable[[], Any]:
    """Build PEFT's model with some LoRAs and return a pass without gradients, each row naming one of them."""
    import torch

    adapt = {**LORA, "targets": ["qkv"]}
    model = _peft_model(home, adapt)
    for number in range(1, num_loras):
        model.add_adapter(str(number), _peft_config(adapt))
    names = ["default", *(str(number) for number in range(1, num_loras))]
    tokens = _tokens(batch, length)
    chosen = {"adapter_names": [names[row % num_loras] for row in range(batch)]} if num_loras > 1 else {}
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens, use_cache=False, **chosen)

    return forward


def peak_of_step(build: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Return the most bytes that a step holds beside the libraries: weights, gradients, optimizer state, activations."""
    import torch

    import lmscale.pretrain  # noqa: F401  libraries come first, for all contenders alike

    if build is peft_step:
        import peft  # noqa: F401
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = _resident("VmRSS")
    step = build(*arguments)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the building
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _engine(home: str, adapt: Keys, batch: int, length: int, optim: str) -> Any:
    from bench_peers import LR, MAX_GRAD_NORM, OPTIM

    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.plan.adaptation import adaptation_of
    from lmscale.pretrain import build_engine
    from lmscale.train.start import begin

    settings = {**OPTIM, "max_grad_norm": MAX_GRAD_NORM}
    if optim == "sgd":  # as adaptations side by side are trained
        settings = {"weight_decay": 0.0, "max_grad_norm": 0.0}
    config = parse_run(
        {
            "model": {"init_from": f"{home}/base"},
            "adapt": adapt,
            "data": {"train": [{"prefix": "unread"}], "seq_length": length + _prompt_length(adapt)},
            "batch": {"micro_batch_size": batch, "global_batch_size": batch},
            "optim": {"name": optim, "lr": LR, **settings},
            "train": {"train_tokens": 10**12},
            "deepspeed": {"zero_optimization": {"stage": 0}},
            "output_dir": f"{home}/unwritten",
        }
    )
    engine = build_engine(config, init_topology(1, 1), ZeroChoice())
    begin(engine, config, adaptation_of(config))
    return engine


def _micro_batch(adapt: Keys, batch: int, length: int) -> dict[str, Any]:
    import torch

    tokens = _tokens(batch, length)
    places = _prompt_length(adapt)
    made = {"tokens": tokens, "labels": tokens.roll(-1, 1)}
    if places:
        made = {name: torch.nn.functional.pad(tensor, (places, 0)) for name, tensor in made.items()}
        made["prompt_places"] = torch.full(made["tokens"].shape, -1)
        made["prompt_places"][:, :places] = torch.arange(places)
    if adapt.get("entries", 1) > 1:
        made["adapter_ids"] = torch.arange(batch) % adapt["entries"]
    return made


def _prompt_length(adapt: Keys) -> int:
    return int(adapt["length"]) if adapt["method"] == "prompt_tuning" else 0


def _tokens(batch: int, length: int) -> Any:
    import torch

    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def _gpt2_config(model: ModelConfig) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )


def _peft_model(home: str, adapt: Keys) -> Any:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(f"{home}/hf", attn_implementation="sdpa")
    model.config.use_cache = adapt["method"] == "prefix_tuning"  # PEFT's prefixes are a cache
    if adapt["method"] == "full":
        return model
    import peft

    return peft.get_peft_model(model, _peft_config(adapt))


def _peft_config(adapt: Keys) -> Any:
    import peft

    if adapt["method"] == "lora":
        targets = ["c_attn"]
        keys: Keys = {"r": adapt["rank"], "lora_alpha": adapt["alpha"], "fan_in_fan_out": True}
        return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **keys)
    kinds = {"prefix_tuning": peft.PrefixTuningConfig, "prompt_tuning": peft.PromptTuningConfig}
    return kinds[adapt["method"]](task_type="CAUSAL_LM", num_virtual_tokens=adapt["length"])


# --- what is measured ---


def adaptation(seconds: float) -> Iterator[Sheet]:
    """Measure all of it, on one base."""
    with tempfile.TemporaryDirectory(prefix="lmscale-bench-") as home:
        collect(Contender("base", make_base, (home,)))
        yield steps(home, seconds)
        yield rows(home, seconds)
        yield memory(home)


def steps(home: str, seconds: float) -> Sheet:
    """Race a training step of each method against PEFT's."""
    sheet = Sheet(
        "Adaptation: training step, one process of two threads, fp32",
        ["", "ms, median", "PEFT's", "of PEFT's", "goal"],
        note=f"6 layers, 384 wide, 6 heads, vocabulary 8,192, {BATCH} x {SEQ_LENGTH} tokens; the same weights, read by "
        f"both; LoRA of rank {RANK}, prefix and prompt of {LENGTH}; AdamW, clipping 1.0; the median of the rounds' ratios. "
        "GPT-2 has one matrix for query, key and value: PEFT puts one LoRA beside all three.",
    )
    for name, adapt in ADAPTS.items():
        arguments = (home, adapt, BATCH, SEQ_LENGTH)
        times = race([Contender(OURS, our_step, arguments), Contender(PEFT, peft_step, arguments)], seconds)
        ours, theirs = (f"{1e3 * statistics.median(times[who]):,.0f}" for who in (OURS, PEFT))
        sheet.row(name, ours, theirs, f"{median_ratio(times[OURS], times[PEFT]):.3f}", f"<= {GOAL_OF_STEP}")
    return sheet


def rows(home: str, seconds: float) -> Sheet:
    """Race a batch of rows that have LoRAs of their own against one that has one LoRA."""
    one = ADAPTS["LoRA, fused query, key, value"]
    many = {**one, "entries": NUM_ROWS}
    size = (NUM_ROWS, ROW_LENGTH)
    races = {
        "lmscale, forward": (our_forward, (home, many, *size), (home, one, *size)),
        "lmscale, training step": (our_step, (home, many, *size, "sgd"), (home, one, *size, "sgd")),
        "PEFT, forward (adapter_names)": (peft_forward, (home, NUM_ROWS, *size), (home, 1, *size)),
    }
    contenders = [
        Contender(f"{name}, {what}", build, arguments)
        for name, (build, *both) in races.items()
        for what, arguments in zip(("many", "one"), both, strict=True)
    ]
    times = race(contenders, seconds)
    sheet = Sheet(
        f"Adaptation: {NUM_ROWS} rows of {ROW_LENGTH} tokens, each with a LoRA of its own",
        ["", f"ms, {NUM_ROWS} LoRAs", "ms, one LoRA", "ratio", "goal"],
        note=f"The same model; LoRA of rank {RANK} beside the fused query, key and value; training by sgd. PEFT trains no such "
        "batch.",
    )
    for name in races:
        many_s, one_s = times[f"{name}, many"], times[f"{name}, one"]
        goal = f"<= {GOAL_OF_ROWS}" if name.startswith(OURS) else ""
        cells = (f"{1e3 * statistics.median(taken):,.0f}" for taken in (many_s, one_s))
        sheet.row(name, *cells, f"{median_ratio(many_s, one_s):.2f}", goal)
    return sheet


def memory(home: str) -> Sheet:
    """Set the peak of a LoRA step beside that of full fine-tuning, each in a process of its own."""
    lora = ADAPTS["LoRA, fused query, key, value"]
    sheet = Sheet(
        "Adaptation: peak memory of a step, MiB",
        ["", "LoRA", "full fine-tuning", "ratio", "goal"],
        note="Most that the process holds during a step, less what it held before the model was built: weights, gradients, "
        "AdamW's moments, activations, what the allocator keeps. fp32, no recompute. LoRA saves the states of the weights, 12 "
        "bytes of 16, and of the activations what frozen matrices do not need: the more, the larger the model beside the batch.",
    )
    for model, batch in MEMORY_CASES:
        directory = f"{home}/{model.num_layers}-{model.hidden_size}"
        if not Path(directory).exists():
            collect(Contender("base", make_base, (directory, model)))
        shape = f"{model.num_layers} layers of {model.hidden_size}, {batch} x {SEQ_LENGTH} tokens"
        for who, build in ((OURS, our_step), ("transformers, PEFT", peft_step)):
            held = [
                collect(Contender(who, peak_of_step, (build, directory, adapt, batch, SEQ_LENGTH)))[0]
                for adapt in (lora, FULL)
            ]
            goal = f"< {GOAL_OF_MEMORY}" if who == OURS else ""
            sheet.row(f"{who}, {shape}", *(f"{x / 2**20:,.0f}" for x in held), f"{held[0] / held[1]:.2f}", goal)
    return sheet
