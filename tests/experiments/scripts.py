"""Programs that tests run in separate processes."""

KILLED = """
import os, signal, sys
from experiments import train
from experiments.base import cli
from experiments.training import checkpoints, metrics

save = checkpoints.Checkpoints.save
def saved(self, *args, **keywords):
    save(self, *args, **keywords)
    self.wait()
checkpoints.Checkpoints.save = saved

write = metrics.StepMetrics.write
def killed(self, **keywords):
    steps = [step for step, _ in self._pending]
    write(self, **keywords)
    if 8 in steps:  # Rows up to 8 are written, the newest checkpoint is that of step 5.
        os.kill(os.getpid(), signal.SIGKILL)
metrics.StepMetrics.write = killed
sys.exit(cli.run(train.define_flags, train.main))
"""
