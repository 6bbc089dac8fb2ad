"""Commands without a terminal, a home or a locale, with a clock that jumps, in an odd folder.

python -m tests.hostile.surroundings FOLDER       run all verbs in an empty folder
"""

import os
import subprocess
import sys
from pathlib import Path

CHAIN = Path(__file__).with_name("chain.py")
FOLDER = "a \"b\" 'c' <script>\nd;$(touch hacked)"


def run(folder: Path, *flags: str) -> str:
    """Run verbs in a subfolder with an odd name; returns the traceback of an error, or ""."""
    surroundings = {
        "PATH": os.environ["PATH"],
        "HOME": "/proc/nonexistent",  # cannot be made, not even by root
        "LC_ALL": "C",
        # Python would use UTF-8 in this locale.
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "JAX_PLATFORMS": "cpu",
    }
    log = folder / "log"
    command = [sys.executable, str(CHAIN), FOLDER, str(log), "--jumping", *flags]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    process = subprocess.run(shell, cwd=folder, env=surroundings, timeout=600, check=False)
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    assert (process.returncode == 0) == (text == "")
    return text


if __name__ == "__main__":
    print(run(Path(sys.argv[1])) or "all verbs succeeded")
