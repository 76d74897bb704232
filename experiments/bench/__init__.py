"""Benchmarks: `python -m experiments.bench`."""

import os
import sys

# The device check starts before the other suites are imported, because they need the extra.
if sys.argv[0] == "-m" and "experiments.bench" in sys.orig_argv and sys.argv[1:2] == ["device"]:
    from experiments.bench import device

    code = device.main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)  # without waiting for programs that still compile
