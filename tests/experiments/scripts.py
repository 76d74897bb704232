"""Programs that tests run in separate processes."""

KILLED = """
import os, signal, sys
from experiments import train
from experiments.base import cli

write_metrics = train.Run.write_metrics
def killed(self, timed=True):
    write_metrics(self, timed)
    if self.step == 8:  # Rows up to 8 are written, the newest checkpoint is that of step 5.
        self._checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
train.Run.write_metrics = killed
sys.exit(cli.run(train.define_flags, train.main))
"""
