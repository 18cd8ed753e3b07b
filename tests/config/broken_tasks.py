"""Sections `task` with keys that contradict each other, each with its line: see test_run."""


def _task(kind: str, *keys: str, architecture: str = "gpt") -> list[str]:
    """The overrides of a run with a task, in the place of its corpora."""
    own = [f"task.{key}" for key in keys if not key.startswith(("data.", "tokenizer"))]
    others = [key for key in keys if key.startswith(("data.", "tokenizer"))]
    run = [
        "data.train=[]",
        "tokenizer.path=t",
        f"model.architecture={architecture}",
        f"objective.name={_OF[architecture]}",
    ]
    return [*run, f"task.kind={kind}", "task.train=train.jsonl", *own, *others]


_OF = {"gpt": "causal_lm", "bert": "bert", "roberta": "roberta", "bart": "bart", "t5": "t5"}

BROKEN_TASKS = [
    (
        _task("classification", "columns.entry=user"),
        "task.columns.entry = 'user': is read with adapt.entries above 1 only",
    ),
    (
        [*_task("classification", "output=head"), "objective.prefix_lm=true"],
        "objective.prefix_lm = True: says what text is written behind, and a head writes none",
    ),
    (_task("classification", "entries=[a, b]"), "task.entries = ['a', 'b']: is read with task.columns.entry only"),
    (["data.train=[]"], "data.train: is required and missing"),
    (_task("classification", "data.train=[{prefix: a}]"), "data.train = 'a': is of corpora, and the run has a task"),
    (_task("classification", "data.valid=[{name: v, prefix: b}]"), "data.valid = 'b': is of corpora"),
    (_task("classification", "data.reset_attention_mask=true"), "data.reset_attention_mask = True: is of corpora"),
    (_task("classification", "data.split='1,0,0'"), "data.split = '1,0,0': is of corpora"),
    (_task("classification", "tokenizer=null"), "tokenizer: is required by a task"),
    (_task("generation", architecture="bert"), "task.kind = 'generation': writes text, and bert with a head does not"),
    (_task("classification", "output=text", architecture="roberta"), "task.output = 'text': roberta writes no text"),
    (_task("classification", "output=head", architecture="t5"), "task.output = 'head': t5 takes no head"),
    (_task("token_classification"), "task.kind = 'token_classification': needs a head over each word, and gpt"),
    (_task("extractive_qa", "output=head"), "task.output = 'head': gpt, whose tokens do not see what follows"),
    (_task("classification", "columns.question=q"), "task.columns.question = 'q': is not of task.kind: classification"),
    (
        _task("generation", "columns.messages=m", "columns.text=t"),
        "task.columns.text = 't': is given beside columns.messages",
    ),
    (
        _task("classification", "template='{text}'", architecture="bert"),
        "task.template = '{text}': is read with task.output",
    ),
    (
        _task("generation", "columns.messages=m", "template=x"),
        "task.template = 'x': is read with task.output: text and",
    ),
    (_task("generation", "labels=[a, b]"), "task.labels = ['a', 'b']: is read with task.kind: classification or"),
    (_task("classification", "label_words={a: x}", architecture="bert"), "task.label_words = {'a': 'x'}: is read with"),
    (_task("generation", "roles={user: '{content}'}"), "task.roles = {'user': '{content}'}: is read with task.columns"),
    (_task("classification", "max_new_tokens=4"), "task.max_new_tokens = 4: is read with task.output: text, where"),
    (
        _task("generation", "packed=true", architecture="bart"),
        "task.packed = True: is read with task.output: text of gpt",
    ),
    (
        _task("classification", "packed=true", architecture="bert"),
        "task.packed = True: is read with task.output: text of",
    ),
    (
        _task("classification", "label_smoothing=0.1"),
        "task.label_smoothing = 0.1: is read with task.kind: generation only",
    ),
    (_task("extractive_qa", "window_step=4"), "task.window_step = 4: is read with task.kind: extractive_qa and a head"),
    (_task("classification", "patience=2"), "task.patience = 2: is read with task.dev only"),
    (_task("classification", "dev_limit=2"), "task.dev_limit = 2: is read with task.dev only"),
    (_task("classification", "test_limit=2"), "task.test_limit = 2: is read with task.test only"),
    (
        _task("classification", "dev=d", "metric=rougeL"),
        "task.metric = 'rougeL': is no metric of task.kind: classification",
    ),
    (_task("classification", "test=[{name: dev, path: x}]"), "task.test.0.name = 'dev': is the name of another set"),
    (
        _task("classification", "test=[{name: x, path: x}, {name: x, path: y}]"),
        "task.test.1.name = 'x': is the name of",
    ),
    (_task("classification", "labels=[1, '1']"), "task.labels = '1': is given twice"),
]
