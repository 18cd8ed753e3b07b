"""The classes of a task, in order."""

from __future__ import annotations

from collections.abc import Iterable

from lmscale.errors import ConfigError, DataError


class Labels:
    """Classes and their numbers.

    Args:
        names: in order.
        is_listed: whether the config lists them, or they are those of the training examples.
    """

    def __init__(self, names: Iterable[str], is_listed: bool):
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._where = "in task.labels" if is_listed else "among those of task.train"

    @staticmethod
    def seen(names: Iterable[str]) -> Labels:
        """Take those of the training examples, in the order of numbers where all are, else of strings.

        Raises:
            DataError: if there is only one.
        """
        found = set(names)
        if len(found) < 2:
            raise DataError(
                f"all examples have the label {next(iter(found))!r}", field="task.train", remedy="give two classes"
            )
        return Labels(_sorted(found), is_listed=False)

    def number(self, name: str, place: str) -> int:
        """Return the number of a class.

        Raises:
            DataError: if it is not known.
        """
        if name not in self._numbers:
            raise DataError(
                f"label {name!r} is not {self._where}", field=place, remedy="known are " + ", ".join(self.names[:20])
            )
        return self._numbers[name]

    def words(self, given: dict[str, str]) -> tuple[str, ...]:
        """Return what stands for each class in text.

        Raises:
            ConfigError: if a word is given for no class, or is empty.
        """
        for name, word in given.items():
            if name not in self._numbers:
                raise ConfigError(
                    f"is no label {self._where}",
                    field="task.label_words",
                    value=name,
                    remedy=", ".join(self.names[:20]),
                )
            if not word.strip():
                raise ConfigError("is empty", field=f"task.label_words.{name}", value=word)
        return tuple(given.get(name, name) for name in self.names)


def _sorted(names: set[str]) -> list[str]:
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    return sorted(names, key=lambda name: (numbers[name], name))
