"""results.json: what a run that adapts a model came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmscale.monitor.atomic import replaced

RESULTS = "results.json"


def write_results(output_dir: Path, results: Mapping[str, Any]) -> None:
    """Write a run's results.json, atomically."""
    with replaced(output_dir / RESULTS) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
