"""Runs of PPO: the loop, its log and its summary."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.base import build, logs
from experiments.base.errors import DivergedError, UserError, check_positive
from experiments.control import games, ppo
from experiments.training import optimizer
from experiments.training.interrupt import Interrupt


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Play and update for `config.steps` iterations; return the content of summary.json.

    `return` is the mean return of episodes in the last tenth of the run, with actions drawn from
    the policy. A return is 1 if all answers are right, and -1 if all are wrong. A stopped run
    starts again from the first iteration.
    """
    check_positive(config, "steps", "log_every")
    settings = ppo.Settings(**config.control.to_dict())
    check_positive(config.control, "envs", "rollout", "epochs", "minibatches")
    if settings.envs % settings.minibatches:
        raise UserError(
            f"config.control.minibatches={settings.minibatches} must divide "
            f"config.control.envs={settings.envs}"
        )
    game = games.make(**config.game.to_dict())
    model = build.build_feature_model(config.model, game.features, games.SUITS + 1)
    updates = config.steps * settings.epochs * settings.minibatches
    transform = optimizer.make_optimizer(config.optimizer, updates, model.param_roles())
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 0))
    opt = transform.init(params)
    state = ppo.start(game, model, settings.envs, jax.random.fold_in(key, 1))
    iteration = ppo.make_iteration(game, model, transform, settings)

    size = sum(map(np.size, jax.tree.leaves(params)))
    per_step = settings.envs * settings.rollout
    print(
        f"{config.name}: {size:,} parameters, {config.steps} iterations of {settings.envs} x "
        f"{settings.rollout} steps of {config.game.name} in {workdir}",
        flush=True,
    )
    log, progress = logs.RunLog(workdir, 0), logs.Progress(0, config.steps)
    returns: list[float] = []
    speed = 0.0
    with Interrupt("stopping; a run of a game starts again from the start") as interrupt:
        for step in range(1, config.steps + 1):
            before = time.perf_counter()
            params, opt, state, mean, loss = iteration(
                params, opt, state, jax.random.fold_in(key, step + 1)
            )
            row = {"step": step, "return": float(mean), "loss": float(loss)}
            if not math.isfinite(row["loss"]):
                raise DivergedError(
                    f"the loss became {row['loss']} at step {step} and training stopped: start "
                    "again with a smaller --config.optimizer.learning_rate "
                    f"(now {config.optimizer.learning_rate:g})"
                )
            returns.append(row["return"])
            log.write([row])
            if step > 1:  # the first iteration compiles
                speed = per_step / (time.perf_counter() - before)
            progress.step()
            if step % config.log_every == 0:
                recent = float(np.mean(returns[-config.log_every :]))
                progress.show(step, {"return": recent, "loss": row["loss"]}, speed)
            if interrupt.signal is not None:
                break
    progress.close()
    log.close()
    if interrupt.signal is not None:
        return {"exit_code": interrupt.exit_code, "step": step}
    last = max(config.steps // 10, 1)
    result = {"return": float(np.mean(returns[-last:])), "exit_code": 0, "step": step}
    result["tokens"] = step * per_step
    (workdir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"return {result['return']:.3f} in the last {last} iterations", flush=True)
    return result
