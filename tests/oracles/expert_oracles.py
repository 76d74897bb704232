"""Mixtures of experts as float64 loops over positions and experts; see `layer_oracles`."""

import numpy as np

from tests.oracles.layer_oracles import _f64, _sigmoid, gated_mlp, mlp


def routed(layer, router, bias, x):
    """Return the chosen experts of one position [dim] and their weights."""
    logits = x @ router
    if layer.router == "softmax":
        scores = choice = np.exp(logits) / np.exp(logits).sum()
    else:
        scores = _sigmoid(logits)
        choice = scores + bias
    size = layer.experts // layer.groups
    ranks = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(layer.groups)]
    best = np.argsort(ranks)[::-1][: layer.top_groups or layer.groups]
    allowed = [e for e in range(layer.experts) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: layer.top_k]
    total = sum(scores[e] for e in chosen) if layer.renormalize else 1
    return chosen, [layer.routed_scale * scores[e] / total for e in chosen]


def _run(layer, params, x):
    """Run an MLP with or without a gate."""
    return (gated_mlp if "gate_proj" in params else mlp)(layer, params, x)


def moe(layer, params, x, reset=None):
    """y = sum of p_e expert_e(x) over the chosen experts, and the shared expert's output."""
    del reset
    p, x = _f64(params), _f64(x)
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        now = inner = x[b, t]
        if "latent_down" in p:
            inner = now @ p["latent_down"] + p.get("latent_down_bias", 0)
        total = np.zeros_like(inner)
        chosen = routed(layer, p["router"], p.get("correction_bias"), now)
        for e, weight in zip(*chosen, strict=True):
            own = {name: value[e] for name, value in p["experts"].items()}
            total += weight * _run(layer.expert, own, inner)
        if "latent_up" in p:
            total = total @ p["latent_up"] + p.get("latent_up_bias", 0)
        if "shared" in p:
            gate = _sigmoid(now @ p["shared_gate"]) if "shared_gate" in p else 1
            total = total + gate * _run(layer.shared, p["shared"], now)
        y[b, t] = total
    return y
