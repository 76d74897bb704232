"""Published models as float64 NumPy loops over time, written from the equations.

`logits(config, tensors, tokens)` takes the content of config.json and the tensors by their
published names. `shapes(config)` returns the shapes of these tensors. Nothing here comes from
seqjax. `make_from_equations.py` writes the checkpoints of this folder that have no other reference.
"""

import numpy as np


def logits(config, tensors, tokens):
    """Return the logits [B, T, vocabulary] of a model."""
    p = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    return (_rwkv if config["model_type"].startswith("rwkv") else _fla)(config, p, tokens)


def shapes(config):
    """Return the shape of each tensor by its name."""
    if config["model_type"].startswith("rwkv"):
        return _rwkv_shapes(config)
    return _fla_shapes(config)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _silu(x):
    return x * _sigmoid(x)


def _softplus(x):
    return np.logaddexp(0, x)


def _rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def _layer_norm(x, p, name, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def _heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _flat(x):
    return x.reshape(*x.shape[:-2], -1)


def _inside(p, prefix):
    """Return the tensors below a prefix, and a function that multiplies by one of them."""
    own = {name[len(prefix) :]: value for name, value in p.items() if name.startswith(prefix)}
    return own, lambda x, name: x @ own[f"{name}.weight"].T


def _conv(x, weight, activation=_silu):
    """Return the causal depthwise convolution; weight [C, 1, taps], the last tap meets the present.

    The result is the activation of the sum.
    """
    taps, y = weight.shape[-1], np.zeros_like(x)
    for k in range(taps):
        back = taps - 1 - k
        y[:, back:] += weight[:, 0, k] * x[:, : x.shape[1] - back]
    return activation(y)


def _memory(q, k, v, log_decay, beta=None):
    """Return S^T q with S = (I - beta k k^T) diag(decay) S + beta k v^T.

    Without beta, S = diag(decay) S + k v^T. Shapes: q, k, log_decay [B, T, H, K],
    v [B, T, H, V], beta [B, T, H].
    """
    batch, length, heads, keys = q.shape
    memory, out = np.zeros((batch, heads, keys, v.shape[-1])), np.zeros(v.shape)
    for t in range(length):
        memory = np.exp(log_decay[:, t])[..., None] * memory
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - np.einsum("bhk,bhkv->bhv", k[:, t], memory))
        memory = memory + k[:, t, :, :, None] * new[:, :, None]
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], memory)
    return out


# ---- fla-hub: GLA, RetNet, HGRN, HGRN2, DeltaNet, Gated DeltaNet, KDA


def _fla(config, p, tokens):
    eps, mixer = config["norm_eps"], _MIXERS[config["model_type"]]
    x = p["model.embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer, dense = _inside(p, prefix)
        h = _rms(x, layer["attn_norm.weight"], eps)
        x = x + mixer(config, *_inside(p, f"{prefix}attn."), h, _bound(config, p, i))
        h = _rms(x, layer["mlp_norm.weight"], eps)
        x = x + dense(_silu(dense(h, "mlp.gate_proj")) * dense(h, "mlp.up_proj"), "mlp.down_proj")
    head = "model.embeddings" if config["tie_word_embeddings"] else "lm_head"
    return _rms(x, p["model.norm.weight"], eps) @ p[f"{head}.weight"].T


def _bound(config, p, i):
    """Return the lower bound of the forget gates of layer i."""
    if not config.get("use_lower_bound") or i == 0:
        return 0.0
    weight = np.exp(p["model.lower_bounds"])
    return (weight / weight.sum(0))[1 : i + 1].sum(0)


def _qkv(config, p, dense, x, heads, value_heads):
    """Return q, k, v by head, after convolutions if the model has them."""
    made = []
    for name, count in zip("qkv", (heads, heads, value_heads), strict=True):
        y = dense(x, f"{name}_proj")
        if f"{name}_conv1d.weight" in p:
            y = _conv(y, p[f"{name}_conv1d.weight"])
        made.append(_heads(y, count))
    return made


def _gated(config, p, dense, x, o):
    """Return W_o (rms(o_h) silu(W_g x))."""
    name = "g_norm_swish_gate" if config["fuse_norm"] else "g_norm"
    o = _flat(_rms(o, p[f"{name}.weight"], config["norm_eps"]))
    return dense(o * _silu(dense(x, "g_proj")), "o_proj")


def _gla(config, p, dense, x, bound):
    heads = config["num_heads"]
    q, k, v = _qkv(config, p, dense, x, heads, heads)
    gate = dense(dense(x, "gk_proj.0"), "gk_proj.1") + p["gk_proj.1.bias"]
    decay = -_softplus(-_heads(gate, heads)) / 16
    return _gated(config, p, dense, x, _memory(q * q.shape[-1] ** -0.5, k, v, decay))


def _retnet(config, p, dense, x, bound):
    heads = config["num_heads"]
    q, k, v = _qkv(config, p, dense, x, heads, heads)
    size = q.shape[-1]
    pairs = np.arange(size // 2)
    angle = np.arange(x.shape[1])[:, None, None] * 1e4 ** (-2.0 * pairs / size)

    def rotate(z):
        turned = (z[..., : size // 2] + 1j * z[..., size // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    decay = np.log(1 - 2.0 ** (-5 - np.arange(heads)))[:, None] * np.ones(q.shape)
    return _gated(config, p, dense, x, _memory(rotate(q) * size**-0.5, rotate(k), v, decay))


def _hgrn(config, p, dense, x, bound):
    f = bound + (1 - bound) * _sigmoid(dense(x, "f_proj"))
    u = (1 - f) * _silu(dense(x, "i_proj"))
    h, out = 0.0, np.zeros(u.shape)
    for t in range(x.shape[1]):
        h = f[:, t] * h + u[:, t]
        out[:, t] = h
    out = _rms(out, p["g_norm.weight"], config["norm_eps"])
    return dense(out * _silu(dense(x, "g_proj")), "o_proj")


def _hgrn2(config, p, dense, x, bound):
    heads = config["hidden_size"] // config["expand_ratio"]
    q, f, v = (_heads(dense(x, f"{name}_proj"), heads) for name in "qfi")
    bound = bound if np.ndim(bound) == 0 else _heads(bound, heads)
    f = bound + (1 - bound) * _sigmoid(f)
    o = _memory(_silu(q) * q.shape[-1] ** -0.5, 1 - f, v, np.log(f))
    return dense(_rms(_flat(o), p["g_norm.weight"], 1e-5), "o_proj")


def _delta(config, p, dense, x, bound):
    """DeltaNet, Gated DeltaNet and KDA."""
    kind, heads = config["model_type"], config["num_heads"]
    value_heads = config.get("num_v_heads") or heads
    q, k, v = _qkv(config, p, dense, x, heads, value_heads)
    q, k = (z / np.sqrt(np.sum(z * z, -1, keepdims=True) + 1e-6) for z in (q, k))
    q, k = (np.repeat(z, value_heads // heads, axis=2) for z in (q, k))
    beta = _sigmoid(dense(x, "b_proj")) * (2 if config["allow_neg_eigval"] else 1)
    decay = np.zeros(q.shape)
    if kind == "gated_deltanet":
        steps = _softplus(dense(x, "a_proj") + p["dt_bias"])
        decay = decay - (np.exp(p["A_log"]) * steps)[..., None]
    elif kind == "kda":
        steps = _heads(dense(dense(x, "f_proj.0"), "f_proj.1") + p["dt_bias"], value_heads)
        rate = np.exp(p["A_log"]).reshape(-1, 1)
        if config["lower_bound"] is None:
            decay = -rate * _softplus(steps)
        else:
            decay = config["lower_bound"] * _sigmoid(rate * steps)
    o = _memory(q * q.shape[-1] ** -0.5, k, v, decay, beta)
    o = _flat(_rms(o, p["o_norm.weight"], config["norm_eps"]))
    if kind == "kda":
        o = o * _sigmoid(dense(dense(x, "g_proj.0"), "g_proj.1") + p["g_proj.1.bias"])
    elif config["use_gate"]:
        o = o * _silu(dense(x, "g_proj"))
    return dense(o, "o_proj")


_MIXERS = {
    "gla": _gla,
    "retnet": _retnet,
    "hgrn": _hgrn,
    "hgrn2": _hgrn2,
    "delta_net": _delta,
    "gated_deltanet": _delta,
    "kda": _delta,
}


def _fla_shapes(config):
    dim, vocabulary = config["hidden_size"], config["vocab_size"]
    depth, width = config["num_hidden_layers"], config["intermediate_size"]
    found = {"model.embeddings.weight": (vocabulary, dim), "model.norm.weight": (dim,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, dim)
    mixer, states = _mixer_shapes(config)
    if config.get("use_lower_bound"):
        found["model.lower_bounds"] = (depth, states)
    for i in range(depth):
        layer = {
            "attn_norm.weight": (dim,),
            "mlp_norm.weight": (dim,),
            "mlp.gate_proj.weight": (width, dim),
            "mlp.up_proj.weight": (width, dim),
            "mlp.down_proj.weight": (dim, width),
            **{f"attn.{name}": shape for name, shape in mixer.items()},
        }
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def _mixer_shapes(config):
    """Return the shapes of a mixer's tensors, and its channels if it has lower bounds."""
    kind, dim = config["model_type"], config["hidden_size"]
    if kind in ("hgrn", "hgrn2"):
        states = dim * config["expand_ratio"] if kind == "hgrn" else dim
        names = "ifg" if kind == "hgrn" else "qfi"
        found = {f"{name}_proj.weight": (states, dim) for name in names}
        return found | {"g_norm.weight": (states,), "o_proj.weight": (dim, states)}, states
    heads = config["num_heads"]
    value_heads = config.get("num_v_heads") or heads
    if kind in ("gla", "retnet", "delta_net"):
        keys, values = (round(dim * config[f"expand_{name}"]) for name in "kv")
    else:
        keys = heads * config["head_dim"]
        values = round(value_heads * config["head_dim"] * config["expand_v"])
    size = values // value_heads
    widths = {"q": keys, "k": keys, "v": values}
    found = {f"{name}_proj.weight": (width, dim) for name, width in widths.items()}
    found["o_proj.weight"] = (dim, values)
    if config.get("use_short_conv"):
        taps = config["conv_size"]
        found |= {f"{name}_conv1d.weight": (width, 1, taps) for name, width in widths.items()}
    if kind in ("gla", "retnet"):
        norm = "g_norm_swish_gate" if config["fuse_norm"] else "g_norm"
        found |= {f"{norm}.weight": (size,), "g_proj.weight": (values, dim)}
    else:
        found |= {"o_norm.weight": (size,), "b_proj.weight": (value_heads, dim)}
    if kind == "gla":
        found |= {"gk_proj.0.weight": (16, dim), "gk_proj.1.weight": (keys, 16)}
        found["gk_proj.1.bias"] = (keys,)
    if config.get("use_gate"):
        found["g_proj.weight"] = (values, dim)
    if kind == "gated_deltanet":
        found |= {"a_proj.weight": (value_heads, dim), "A_log": (value_heads,)}
        found["dt_bias"] = (value_heads,)
    if kind == "kda":
        gates = value_heads * config["head_dim"]
        found |= {"f_proj.0.weight": (size, dim), "f_proj.1.weight": (gates, size)}
        found |= {"g_proj.0.weight": (size, dim), "g_proj.1.weight": (values, size)}
        found |= {"g_proj.1.bias": (values,), "A_log": (value_heads,), "dt_bias": (gates,)}
    return found, None


# ---- RWKV-4, -5 and -6


def _shift(x):
    return np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def _rwkv(config, p, tokens):
    eps, version = config["layer_norm_epsilon"], config["model_type"]
    x = _layer_norm(p["rwkv.embeddings.weight"][tokens], p, "rwkv.blocks.0.pre_ln", eps)
    for i in range(config["num_hidden_layers"]):
        block = f"rwkv.blocks.{i}."
        h = _layer_norm(x, p, f"{block}ln1", eps)
        x = x + _TIME_MIX[version](config, *_inside(p, f"{block}attention."), h)
        h = _layer_norm(x, p, f"{block}ln2", eps)
        own, dense = _inside(p, f"{block}feed_forward.")
        mixed = [_mixed(own, h, name) for name in ("key", "receptance")]
        value = dense(np.maximum(dense(mixed[0], "key"), 0) ** 2, "value")
        x = x + _sigmoid(dense(mixed[1], "receptance")) * value
    return _layer_norm(x, p, "rwkv.ln_out", 1e-5) @ p["head.weight"].T


def _mixed(p, x, name, extra=0.0):
    if f"time_mix_{name}" in p:
        share = p[f"time_mix_{name}"]
        return x * share + _shift(x) * (1 - share)
    return x + (_shift(x) - x) * (p[f"time_maa_{name[0]}"] + extra)


def _rwkv4(config, p, dense, x):
    k, v, r = (dense(_mixed(p, x, name), name) for name in ("key", "value", "receptance"))
    decay = np.exp(-np.exp(p["time_decay"]))
    top, bottom, out = 0.0, 0.0, np.zeros_like(x)
    for t in range(x.shape[1]):
        now, weight = np.exp(p["time_first"] + k[:, t]), np.exp(k[:, t])
        out[:, t] = (top + now * v[:, t]) / (bottom + now)
        top, bottom = decay * top + weight * v[:, t], decay * bottom + weight
    return dense(_sigmoid(r) * out, "output")


def _rwkv_matrix(config, p, dense, x):
    names = ("key", "value", "receptance", "gate")
    heads = x.shape[-1] // config["head_size"]
    w, extra = np.broadcast_to(p["time_decay"].reshape(-1), x.shape), dict.fromkeys(names, 0.0)
    if config["model_type"] == "rwkv6":
        low = np.tanh(_mixed(p, x, "x") @ p["time_maa_w1"])
        low = np.moveaxis(_heads(low, 5), -2, 0)
        made = np.einsum("cbtr,crd->cbtd", low, p["time_maa_w2"])
        extra = dict(zip(("w", *names), made, strict=True))
        mixed = _mixed(p, x, "w", extra["w"])
        w = w + np.tanh(mixed @ p["time_decay_w1"]) @ p["time_decay_w2"]
    k, v, r, g = (dense(_mixed(p, x, name, extra[name]), name) for name in names)
    decay = _heads(np.exp(-np.exp(w)), heads)
    k, v, r = (_heads(z, heads) for z in (k, v, r))
    size = k.shape[-1]
    memory, out = np.zeros((len(x), heads, size, size)), np.zeros(v.shape)
    for t in range(x.shape[1]):
        write = k[:, t, :, :, None] * v[:, t, :, None]
        read = memory + p["time_faaaa"][..., None] * write
        out[:, t] = np.einsum("bhk,bhkv->bhv", r[:, t], read)
        memory = decay[:, t, :, :, None] * memory + write
    divisor = config["head_size_divisor"]
    out = out / divisor
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
    out = _flat(out) * p["ln_x.weight"] + p["ln_x.bias"]
    return dense(out * _silu(g), "output")


_TIME_MIX = {"rwkv": _rwkv4, "rwkv5": _rwkv_matrix, "rwkv6": _rwkv_matrix}


def _rwkv_shapes(config):
    dim, version = config["hidden_size"], config["model_type"]
    names = ("key", "value", "receptance") if version == "rwkv" else _LINEAR
    time = {f"{name}.weight": (dim, dim) for name in (*names, "output")}
    width = config["intermediate_size"]
    channel = {"key.weight": (width, dim), "value.weight": (dim, width)}
    channel["receptance.weight"] = (dim, dim)
    if version == "rwkv6":
        time |= {f"time_maa_{c}": (1, 1, dim) for c in "xwkvrg"}
        channel |= {f"time_maa_{c}": (1, 1, dim) for c in "kr"}
        time |= {"time_maa_w1": (dim, 5 * MIX_RANK), "time_maa_w2": (5, MIX_RANK, dim)}
        time |= {"time_decay_w1": (dim, DECAY_RANK), "time_decay_w2": (DECAY_RANK, dim)}
    else:
        time |= {f"time_mix_{name}": (1, 1, dim) for name in names}
        channel |= {f"time_mix_{name}": (1, 1, dim) for name in ("key", "receptance")}
    if version == "rwkv":
        time |= {"time_decay": (dim,), "time_first": (dim,)}
    else:
        matrix = (dim // config["head_size"], config["head_size"])
        time |= {"time_decay": matrix if version == "rwkv5" else (1, 1, dim), "time_faaaa": matrix}
        time |= {"ln_x.weight": (dim,), "ln_x.bias": (dim,)}
    norms = ["rwkv.ln_out", "rwkv.blocks.0.pre_ln"]
    table = (config["vocab_size"], dim)
    found = dict.fromkeys(("rwkv.embeddings.weight", "head.weight"), table)
    for i in range(config["num_hidden_layers"]):
        block = f"rwkv.blocks.{i}."
        norms += [f"{block}ln1", f"{block}ln2"]
        found |= {f"{block}attention.{name}": shape for name, shape in time.items()}
        found |= {f"{block}feed_forward.{name}": shape for name, shape in channel.items()}
    return found | {f"{name}.{part}": (dim,) for name in norms for part in ("weight", "bias")}


_LINEAR = ("key", "value", "receptance", "gate")
MIX_RANK, DECAY_RANK = 3, 5  # of RWKV-6, which no field of a config has
