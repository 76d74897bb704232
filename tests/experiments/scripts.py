"""Programs that tests run in processes of their own."""

KILLED = """
import os, signal, sys
from experiments import train
from experiments.base import cli
from experiments.training import loop

drain = loop.Run._drain
def killed(self, timed=True):
    drain(self, timed)
    if self.step == 8:  # Rows up to 8 are written, the newest checkpoint is that of step 5.
        self._checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
loop.Run._drain = killed
sys.exit(cli.run(train.define_flags, train.main))
"""
