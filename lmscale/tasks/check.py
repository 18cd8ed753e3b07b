"""What can be checked of a task before a rank starts."""

from __future__ import annotations

from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import load_tokenizer
from lmscale.errors import ConfigError
from lmscale.tasks.build import build_task
from lmscale.tasks.exchanges import Writer
from lmscale.tasks.head_task import read_items
from lmscale.tasks.metrics import check_libraries
from lmscale.tasks.splits import read_files, read_labels


def check_task(config: RunConfig, room: int = 0) -> None:
    """Check files, columns, labels, templates and lengths of a run's task. No torch here.

    With a tokenizer of transformers, which takes seconds to import, lengths and label words are left to the ranks.

    Args:
        config: of a run with the section `task`.
        room: as of `build_task`.

    Raises:
        DataError: if a file is wrong, with its name and line.
        ConfigError: if keys contradict each other or the files.
    """
    task, architecture = config.task, config.model.architecture
    if task is None or config.tokenizer is None:
        raise ConfigError("is required and missing", field="task" if task is None else "tokenizer")
    check_libraries(task.kind)
    if config.tokenizer.type != "hf":
        build_task(config, load_tokenizer(config.tokenizer), room)
        return
    files = read_files(task)
    labels = read_labels(task, files)
    is_text = task.output_of(architecture) == "text"
    read = Writer(task, architecture, labels).read if is_text else read_items(task, labels)
    for examples in files.examples.values():
        for example in examples:
            read(example)
