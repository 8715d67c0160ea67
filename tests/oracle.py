"""The methods once more: NumPy in float64 on one vector, each as its paper's equation.

The problem is a layer of two units, tanh(x W + b), under the mean squared error, whose
gradient is written out. Nothing of samfn or of PyTorch is used here.
"""

import numpy as np

INPUTS, UNITS = 3, 2
SPLIT = INPUTS * UNITS  # The vector holds W, then b.


def loss(w, x, y):
    """Return the loss of each row."""
    p = np.tanh(x @ w[:SPLIT].reshape(INPUTS, UNITS) + w[SPLIT:])
    return ((p - y) ** 2).sum(1)


def slope(w, x, y):
    """Return the gradient of the mean loss."""
    p = np.tanh(x @ w[:SPLIT].reshape(INPUTS, UNITS) + w[SPLIT:])
    d = 2 * (p - y) * (1 - p**2) / len(x)
    return np.concatenate([(x.T @ d).reshape(-1), d.sum(0)])


def unit(v):
    """Return v / ||v||."""
    return v / np.sqrt((v * v).sum())


def orthogonal(v, to):
    """Return what of v is orthogonal to another vector."""
    return v - (v @ to) / (to @ to) * to


# Each takes (w, x, y, rho, memory, number of the step), may change the memory, and returns
# what descends, or that and what descends past the optimizer.


def sam(w, x, y, rho, memory, step):
    return slope(w + rho * unit(slope(w, x, y)), x, y)


def asam(w, x, y, rho, memory, step, eta=0.01):
    g = slope(w, x, y)
    t = np.where(np.arange(len(w)) < SPLIT, np.abs(w) + eta, 1.0)  # "bias" is no weight.
    return slope(w + rho * t * unit(t * g), x, y)


def asam_everywhere(w, x, y, rho, memory, step):
    g, t = slope(w, x, y), np.abs(w)
    return slope(w + rho * t * unit(t * g), x, y)


def fisher_sam(w, x, y, rho, memory, step, eta=0.3):
    g = slope(w, x, y)
    inverse = 1 / (1 + eta * g**2)
    return slope(w + rho * inverse * g / np.sqrt(g @ (inverse * g)), x, y)


def gsam(w, x, y, rho, memory, step, alpha=0.4):
    g, worst = slope(w, x, y), sam(w, x, y, rho, memory, step)
    return worst - alpha * orthogonal(g, worst)


def wsam(w, x, y, rho, memory, step, gamma=0.8):
    g, worst = slope(w, x, y), sam(w, x, y, rho, memory, step)
    return g, gamma / (1 - gamma) * (worst - g)


def ssam(w, x, y, rho, memory, step):
    g, worst = slope(w, x, y), sam(w, x, y, rho, memory, step)
    return np.sqrt(g @ g) * unit(worst)


def awp(w, x, y, rho, memory, step):
    g, matrix = slope(w, x, y), np.arange(len(w)) < SPLIT  # b is no matrix, and stays.
    e = np.sqrt((w * w)[matrix].sum()) * unit(np.where(matrix, g, 0.0))
    return slope(w + rho * e, x, y)


def rwp(w, x, y, rho, memory, step, lam=0.3):
    rows = w[:SPLIT].reshape(INPUTS, UNITS)
    of_weight = np.sqrt((rows**2).sum(1, keepdims=True)) * memory["normal"](*rows.shape)
    of_bias = np.sqrt((w[SPLIT:] ** 2).sum()) * memory["normal"](UNITS)
    z = rho * np.concatenate([of_weight.reshape(-1), of_bias])
    return lam * slope(w + z, x, y) + (1 - lam) * slope(w, x, y)


def s2_sam(w, x, y, rho, memory, step):
    ahead = w + rho * unit(memory["g"]) if step else w
    memory["g"] = slope(ahead, x, y)
    return memory["g"]


def usam(w, x, y, rho, memory, step):
    return slope(w + rho * slope(w, x, y), x, y)


def unified_sam(w, x, y, rho, memory, step, lam=None):
    g = slope(w, x, y)
    lam = 1 - 1 / (step + 1) if lam is None else lam
    return slope(w + rho * (1 - lam + lam / np.sqrt(g @ g)) * g, x, y)


def le_sam(w, x, y, rho, memory, step, rho_max=0.35):
    g = slope(w, x, y)
    memory.setdefault("capped", set()).add(bool(rho / np.sqrt(g @ g) > rho_max))
    return slope(w + min(rho / np.sqrt(g @ g), rho_max) * unit(g), x, y)


def light_sam(w, x, y, rho, memory, step):
    g = slope(w, x, y)
    memory["u"] = memory.get("u", 0.0) + g @ g
    return slope(w + rho * g / np.sqrt(memory["u"]), x, y)


def sagm(w, x, y, rho, memory, step, alpha=0.1):
    g = slope(w, x, y)
    return (g + slope(w - alpha * g + rho * unit(g), x, y)) / 2


def friendly_sam(w, x, y, rho, memory, step, sigma=0.7, decay=0.6):
    g = slope(w, x, y)
    d = g - sigma * memory.get("m", 0.0)
    memory["m"] = decay * memory.get("m", g) + (1 - decay) * g
    return slope(w + rho * unit(d), x, y)


def vasso(w, x, y, rho, memory, step, theta=0.3):
    g = slope(w, x, y)
    memory["d"] = (1 - theta) * memory.get("d", g) + theta * g
    return slope(w + rho * unit(memory["d"]), x, y)


def part(x, y):
    return x[:4], y[:4]


def ascent_on(w, x, y, rho, memory, step):
    return slope(w + rho * unit(slope(w, *part(x, y))), x, y)


def on_loss(w, x, y, rho, memory, step):
    return slope(w, x, y) + sam(w, *part(x, y), rho, memory, step)


def momentum_sam(w, x, y, rho, memory, step, momentum=0.9):
    v = memory.get("v", np.zeros_like(w))
    ahead = w - rho * unit(v) if v.any() else w
    g = slope(ahead, x, y)
    memory["v"] = momentum * v + g
    return g


def looksam(w, x, y, rho, memory, step, k=3, alpha=0.7):
    g = slope(w, x, y)
    if step % k == 0:
        worst = sam(w, x, y, rho, memory, step)
        memory["v"] = orthogonal(worst, g)
        return worst
    v = memory["v"]
    return g + alpha * np.sqrt(g @ g) / np.sqrt(v @ v) * v


def multi_step_sam(w, x, y, rho, memory, step, ascents=3):
    there = w
    for _ in range(ascents):
        there = there + rho / ascents * unit(slope(there, x, y))
    return slope(there, x, y)


def esam(w, x, y, rho, memory, step, gamma=0.4):
    worst = w + rho * unit(slope(w, x, y))
    growth = loss(worst, x, y) - loss(w, x, y)
    rows = np.argsort(-growth)[: int(np.ceil(gamma * len(x)))]
    return slope(worst, x[rows], y[rows])


def ae_sam(w, x, y, rho, memory, step, steps=8, decay=0.9):
    g = slope(w, x, y)
    square = g @ g
    memory["mean"] = decay * memory.get("mean", square) + (1 - decay) * square
    spread = (square - memory["mean"]) ** 2
    memory["variance"] = decay * memory.get("variance", 0.0) + (1 - decay) * spread
    c = 1.0 - 2.0 * step / steps
    sharp = square >= memory["mean"] + c * np.sqrt(memory["variance"])
    memory.setdefault("sharp", []).append(bool(sharp))
    return sam(w, x, y, rho, memory, step) if sharp else g


def functional_sam(w, x, y, rho, memory, step, scaled=False):
    g = slope(w, x, y)
    p = np.tanh(x @ w[:SPLIT].reshape(INPUTS, UNITS) + w[SPLIT:])
    there = w + rho * unit(adam(g, memory, step) if scaled else g)
    q = np.tanh(x @ there[:SPLIT].reshape(INPUTS, UNITS) + there[SPLIT:])
    d = 2 * (p - y) / len(x) * (1 - q**2)  # The slope at w, the Jacobian at w + e.
    return np.concatenate([(x.T @ d).reshape(-1), d.sum(0)])


def preconditioned(w, x, y, rho, memory, step):
    return slope(w + rho * unit(adam(slope(w, x, y), memory, step)), x, y)


def adam(g, memory, step, decay=0.7):
    memory["v"] = decay * memory.get("v", 0.0) + (1 - decay) * g**2
    return g / (np.sqrt(memory["v"] / (1 - decay ** (step + 1))) + 1e-8)


def functional_preconditioned(w, x, y, rho, memory, step):
    return functional_sam(w, x, y, rho, memory, step, scaled=True)


def spectral_sam(w, x, y, rho, memory, step):
    g = slope(w, x, y)
    u, _, v = np.linalg.svd(g[:SPLIT].reshape(INPUTS, UNITS), full_matrices=False)
    return slope(w + rho * np.concatenate([(u @ v).reshape(-1), unit(g[SPLIT:])]), x, y)


def on_weights(w, x, y, rho, memory, step):
    g = slope(w, x, y)
    g[SPLIT:] = 0
    return slope(w + rho * unit(g), x, y)


def every_third(w, x, y, rho, memory, step):
    return slope(w, x, y) if step % 3 else sam(w, x, y, rho, memory, step)


def quarter_ascent(w, x, y, rho, memory, step):
    part = int(np.ceil(len(x) / 4))
    return slope(w + rho * unit(slope(w, x[:part], y[:part])), x, y)


def of_fours(w, x, y, rho, memory, step):
    cuts = [slice(i, i + 4) for i in range(0, len(x), 4)]
    parts = [sam(w, x[c], y[c], rho, memory, step) * len(x[c]) for c in cuts]
    return sum(parts) / len(x)
