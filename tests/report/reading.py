"""Read the data files of a report, as report.js does."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any


def read_script(script: Path) -> Any:
    """Return the value that a script passes to `receive`; fails if it is not strict JSON."""

    def fail(constant: str) -> None:
        raise ValueError(f"{script} has {constant}, which is not JSON")

    text = script.read_text()
    assert text.startswith("receive(")
    assert text.endswith(");\n")
    return json.loads(text[len("receive(") : -len(");\n")], parse_constant=fail)


def read_cards(report: Path) -> list[dict]:
    """Return the data of all features with pages, in the order of the files."""
    cards = []
    for number, path in enumerate(sorted((report / "data").iterdir())):
        pack = read_script(path)
        assert path.name == f"p{number:04d}.js"
        assert pack["pack"] == number
        content = gzip.decompress(base64.b64decode(pack["cards"])).decode()
        assert "NaN" not in content
        cards += json.loads(content)
    return cards
