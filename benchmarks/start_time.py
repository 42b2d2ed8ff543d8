"""How long the command line and the library take to start, in seconds of CPU time.

    python -m benchmarks.start_time

The median of three processes each. `import torch` is printed beside, for what can't be helped.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

STARTS = {
    "autogate --version": ["-m", "autogate.cli", "--version"],
    "autogate --help": ["-m", "autogate.cli", "--help"],
    "autogate train --help": ["-m", "autogate.cli", "train", "--help"],
    "import autogate": ["-c", "import autogate"],
    "import autogate; autogate.prepare": ["-c", "import autogate; autogate.prepare"],
    "import torch": ["-c", "import torch"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU time of a fresh Python with these arguments, system calls included."""

    def so_far() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = so_far()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return so_far() - before


if __name__ == "__main__":
    for name, arguments in STARTS.items():
        print(f"{name:36}{statistics.median(cpu_seconds(arguments) for _ in range(3)):6.2f} s", flush=True)
