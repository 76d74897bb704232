"""Oracle of multi-head latent attention: float64 loops from the equations."""

import numpy as np


def mla(layer, params, x, reset=None):
    """Softmax over earlier positions with keys and values from one latent (arXiv 2405.04434)."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    reset = np.zeros(x.shape[:2], bool) if reset is None else np.asarray(reset)
    heads, own, shared = layer.heads, layer.head_dim, layer.rotary_dim
    scale = layer.scale or (own + shared) ** -0.5

    def rms(z, name):
        return z / np.sqrt(np.mean(z * z) + layer.norm_eps) * p[name]

    def rotate(z, t):
        if layer.rope_base is None:
            return z
        out = z.copy()
        for j in range(shared // 2):
            angle = t * layer.rope_base ** (-2 * j / shared)
            a, b = z[..., 2 * j], z[..., 2 * j + 1]
            out[..., 2 * j] = a * np.cos(angle) - b * np.sin(angle)
            out[..., 2 * j + 1] = b * np.cos(angle) + a * np.sin(angle)
        return out

    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        keys, values = [], []
        for t in range(x.shape[1]):
            if reset[b, t]:
                keys, values = [], []
            x_t, time = x[b, t], len(keys)
            c = rms(x_t @ p["kv_down"] + p.get("kv_down_bias", 0), "kv_norm")
            r = np.zeros(0)
            if shared:
                r = rotate(x_t @ p["k_rope"] + p.get("k_rope_bias", 0), time)
            k = (c @ p["k_up"]).reshape(heads, own)
            keys.append(np.concatenate([k, np.broadcast_to(r, (heads, shared))], axis=1))
            values.append((c @ p["v_up"]).reshape(heads, -1))
            if "q_down" in p:
                q = rms(x_t @ p["q_down"] + p.get("q_down_bias", 0), "q_norm") @ p["q_up"]
            else:
                q = x_t @ p["q_proj"]
            q = q.reshape(heads, own + shared)
            q = np.concatenate([q[:, :own], rotate(q[:, own:], time)], axis=1)
            o = []
            for h in range(heads):
                scores = scale * np.array([k_s[h] @ q[h] for k_s in keys])
                weights = np.exp(scores - scores.max())
                weights = weights / weights.sum()
                o.append(sum(w * v[h] for w, v in zip(weights, values, strict=True)))
            y[b, t] = np.concatenate(o) @ p["out_proj"] + p.get("out_bias", 0)
    return y
