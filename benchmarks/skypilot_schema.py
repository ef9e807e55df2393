"""SkyPilot's own reading of the tasks that are written for it, and the schema that the tests hold them to.

    python -m venv sky && sky/bin/pip install skypilot==0.14.1
    sky/bin/python benchmarks/skypilot_schema.py

SkyPilot brings a hundred packages and an older click than this package's tests need, so they do without it. This reads
every golden task (tests/launch/golden) by SkyPilot's parser, and writes the schemas that the parser checks a task and
its resources by to tests/launch/skypilot.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import sky  # type: ignore[import-not-found]
from sky.utils import schemas  # type: ignore[import-not-found]

TESTS = Path(__file__).parents[1] / "tests" / "launch"


def main() -> None:
    for path in sorted((TESTS / "golden").rglob("task.yaml")):
        task = sky.Task.from_yaml(str(path))
        (resources,) = task.resources
        print(f"{path.relative_to(TESTS)}: {task.num_nodes} x {resources.accelerators}, image {resources.image_id}")
    held = {
        "source": f"skypilot {sky.__version__} sky/utils/schemas.py, get_task_schema() and get_resources_schema()",
        "licence": "Apache-2.0",
        "task": schemas.get_task_schema(),
        "resources": schemas.get_resources_schema(),
    }
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in held.items())
    (TESTS / "skypilot.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
