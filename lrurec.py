# SPDX-License-Identifier: MIT
"""LRURec in NumPy: linear recurrent units for sequential recommendation, gradients by hand.

Read first
    [1] Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024,
        arXiv 2310.02367: the model, and the recursive parallelization (Algorithm 1).
    [2] Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, ICML 2023,
        arXiv 2303.06349: the LRU, the ring of eigenvalues, the gain gamma.

The model
    x = LayerNorm(dropout(E[items]))                             one row per event
    in each block:
        u_n = gamma * (x_n B + b_B)                              real in, complex out
        h_n = lam * h_{n-1} + u_n                                the only line that looks back
        x   = LayerNorm(x + dropout(Re(h C) + b_C))
        x   = LayerNorm(x + dropout(dropout(GELU(x W1 + b1)) W2 + b2))
    logits = x E^T + output_bias                                 E is the input embedding again

Sizes                                                  Symbols
    N  rows, one an event: those of all users in a     E, B, C, W1, W2, b*  parameters
       batch, back to back, without padding            lam    eigenvalues, exp(-exp(nu_log)
    V  items, ids 1..V; id 0 is "nothing yet"                 + i exp(theta_log)), |lam| < 1
    D  model width (64)                                gamma  exp(gamma_log), the input gain
    H  complex state width (2 D)                       u, h   the recurrence's input and state
    F  feed-forward width (4 D)                        g      the adjoint state: dL/dh_n through
    K  blocks (2)                                             row n's output and all later rows

Walls. Where starts[n] is True the state is zero before row n: a new user begins, or a new window
of a long history, or the row after "nothing yet". A wall always stands before row 0.

Gradients. The gradient of `name` is `dname`. For a complex z it is stored as
dL/d(Re z) + i dL/d(Im z), so that dL = Re(conj(dz) * change of z) and z - lr * dz descends.
Two rules follow: through z = a w comes da = dz conj(w), and through y = Re(z) comes dz = dy.

Where the authors' code differs from the text of [1], we follow the code (no feed-through D x; one
LayerNorm after each residual; biases in the projections; a softmax over item 0 too). Beyond that:
GELU in its tanh form, dropout from random bytes, no padding, every training event a target exactly
once. README, "Where we differ", has the whole list.
"""
import json
import math
import os

import numpy as np

# ---------------------------------------------------------------------------------------------
# Array backend: every array below is made by xp, which is NumPy or, on request, CuPy.

xp = np
LOGITS_PER_CHUNK = 2 ** 19        # cross-entropy works on so many logits at once: 2 MB, in cache


def use_device(device):
    """Put all later work on "cpu" (NumPy) or "gpu" (CuPy). Raises RuntimeError if it cannot."""
    global xp, LOGITS_PER_CHUNK
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device must be 'cpu' or 'gpu', not {device!r}")
    if device == "cpu":
        xp, LOGITS_PER_CHUNK = np, 2 ** 19
        return
    try:
        import cupy
        cupy.zeros(1) + 1                          # takes a card, its driver and CUDA's compiler
    except ImportError:
        raise RuntimeError("the GPU needs CuPy, which is not installed: python -m pip install "
                           '"cupy-cuda12x[ctk]" (or cupy-cuda13x, as your driver is)') from None
    except Exception as error:                     # no card, no driver, no compiler: many types
        raise RuntimeError(f"CuPy cannot use an NVIDIA GPU ({' '.join(str(error).split())}): use "
                           "--device cpu, or install a driver and CuPy's [ctk]") from None
    xp, LOGITS_PER_CHUNK = cupy, 2 ** 26           # a GPU wants few, large operations


def to_host(array):
    """The same values as a NumPy array."""
    return array if isinstance(array, (np.ndarray, np.generic)) else array.get()


def real_view(z):
    """The same memory, a complex (..., M) array as real (..., 2M): re, im, re, im, ...; a real
    array as it is."""
    return z.view(z.real.dtype)


_KERNELS = {}


def _gpu_kernels():
    """Two small CUDA kernels (T is the arrays' own type), compiled when first used."""
    if not _KERNELS:
        _KERNELS["scan"] = xp.ElementwiseKernel(   # one thread walks one segment of one channel
            "raw T lam, raw bool starts, int64 N, int64 H", "raw T h", """
            long long row = i / H, c = i % H;
            if (row == 0 || starts[row]) {
                T state = h[row * H + c];
                while (++row < N && !starts[row]) {
                    state = lam[c] * state + h[row * H + c];
                    h[row * H + c] = state;
                }
            }""", "lru_scan")
        _KERNELS["random"] = xp.ElementwiseKernel(  # splitmix64 (Steele et al. 2014) of seed + i
            "uint64 seed", "uint8 out", """
            unsigned long long z = (seed + i + 1) * 0x9E3779B97F4A7C15ULL;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
            out = (z ^ (z >> 31)) >> 56;""", "random_bytes")
    return _KERNELS


def sum_rows(x):
    """x (N, M) -> (M,): the sum over rows, as a product, which is several times faster."""
    return xp.ones(len(x), x.dtype) @ x


# ---------------------------------------------------------------------------------------------
# Layers: each forward returns (out, cache); its backward stands directly below, and returns
# the gradients of the inputs that have one, in their order.

def linear_forward(x, W, b):
    """out = x W + b.    x (N, I), W (I, O), b (O,) -> out (N, O)"""
    out = x @ W
    out += b
    return out, (x, W)


def linear_backward(dout, cache):
    """dout (N, O) -> dx (N, I), dW (I, O), db (O,)
    Derivative: dx = dout W^T, dW = x^T dout, db = sum over rows of dout.
    """
    x, W = cache
    return dout @ W.T, x.T @ dout, sum_rows(dout)


GELU_C = math.sqrt(2 / math.pi)
GELU_A = 0.044715


def gelu_forward(x):
    """out = x s, s = sigmoid(2c (x + a x^3)) = (1 + tanh(c (x + a x^3)))/2.   x (...)

    c = sqrt(2/pi), a = 0.044715: the tanh form of Hendrycks and Gimpel, arXiv 1606.08415.
    """
    s = x * x
    s *= GELU_C * GELU_A
    s += GELU_C
    s *= x
    xp.tanh(s, out=s)
    s += 1
    s *= 0.5
    return x * s, (x, s)


def gelu_backward(dout, cache):
    """dout (...) -> dx (...)
    Derivative: the slope of a sigmoid s is s (1 - s), so
    dx = dout (s + x s (1 - s) 2c (1 + 3a x^2)).
    """
    x, s = cache
    dx = x * x
    dx *= 6 * GELU_A * GELU_C
    dx += 2 * GELU_C
    dx *= x
    dx *= 1 - s
    dx += 1
    dx *= s
    dx *= dout
    return dx


def layer_norm_forward(x, scale, shift, eps=1e-5):
    """out = scale * xhat + shift, xhat = (x - mean) / sqrt(var + eps), mean and var per row.

    x (N, D), scale (D,), shift (D,) -> out (N, D)
    """
    # x @ average is the mean of each row: as a product, since to sum short rows is slow
    average = xp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)
    xhat = x - x @ average
    rstd = 1 / xp.sqrt((xhat * xhat) @ average + eps)             # (N, 1)
    xhat *= rstd
    out = xhat * scale
    out += shift
    return out, (xhat, rstd, scale, average)


def layer_norm_backward(dout, cache):
    """dout (N, D) -> dx (N, D), dscale (D,), dshift (D,)
    Derivative: with dxhat = dout * scale and means taken per row,
    dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat * xhat)); the two means: x acts through
    mean and variance too. dscale = sum of dout * xhat over the rows, dshift = sum of dout.
    """
    xhat, rstd, scale, average = cache
    along = dout * xhat
    dscale = sum_rows(along)
    average = scale[:, None] * average             # dout @ average is now the mean of dxhat
    dx = dout * scale
    dx -= dout @ average
    dx -= xhat * (along @ average)
    dx *= rstd
    return dx, dscale, sum_rows(dout)


def dropout_forward(x, p, rng):
    """out = x * mask, mask 0 with probability p, else 1/(1-p) (inverted dropout).   x (N, D)

    A byte is drawn for each entry: p counts as the nearest of 0/256, ..., 255/256. p = 0 draws
    nothing from rng, a NumPy Generator, and returns x itself.
    """
    if p == 0:
        return x, None
    n_dropped = min(round(p * 256), 255)           # of the 256 values of a byte
    mask = (_random_bytes(x.shape, rng) >= n_dropped).astype(x.dtype)
    mask *= 256 / (256 - n_dropped)
    return x * mask, mask


def dropout_backward(dout, mask):
    """dout (N, D) -> dx (N, D)
    Derivative: dx = dout * mask, the same mask.
    """
    return dout if mask is None else dout * mask


def _random_bytes(shape, rng):
    """Uniform bytes. On the CPU eight from each 64-bit draw: several times faster than floats."""
    size = math.prod(shape)
    if xp is np:
        bits = rng.integers(2 ** 64 - 1, size=-(-size // 8), dtype=np.uint64, endpoint=True)
        return bits.view(np.uint8)[:size].reshape(shape)
    return _gpu_kernels()["random"](int(rng.integers(2 ** 63)), size=size).reshape(shape)


def embedding_forward(E, items):
    """out = E[items].    E (V+1, D), items (N,) int -> out (N, D)"""
    return E[items], (E.shape, items)


def embedding_backward(dout, cache):
    """dout (N, D) -> dE (V+1, D)
    Derivative: row v of dE is the sum of dout over the rows where items = v.
    """
    shape, items = cache
    dE = xp.zeros(math.prod(shape), dout.dtype)    # flat: entry by entry add.at is fastest
    entries = items[:, None] * shape[1] + xp.arange(shape[1])     # (N, D)
    xp.add.at(dE, entries.ravel(), dout.ravel())
    return dE.reshape(shape)


def cross_entropy_forward(logits, targets, weights):
    """loss = sum over rows of weight * (log sum_v exp(logit_v) - logit_target).

    logits (N, V+1), targets (N,) int, weights (N,) -> loss, a scalar. The logits are used up:
    their memory then holds exp(logits - row maximum).
    """
    rows = xp.arange(len(targets))
    logits -= logits.max(1, keepdims=True)
    target_logits = logits[rows, targets]
    exps = xp.exp(logits, out=logits)
    sums = exps @ xp.ones(exps.shape[1], exps.dtype)              # (N,), again faster as a product
    loss = weights @ (xp.log(sums) - target_logits)
    return loss, (exps, sums, rows, targets, weights)


def cross_entropy_backward(dloss, cache):
    """dloss, a scalar -> dlogits (N, V+1), in the memory of the logits
    Derivative: dlogits = dloss * weight * (softmax(logits) - onehot(target)).
    """
    exps, sums, rows, targets, weights = cache
    dlogits = exps
    dlogits *= (dloss * weights / sums)[:, None]
    dlogits[rows, targets] -= dloss * weights
    return dlogits


# ---------------------------------------------------------------------------------------------
# The recurrence h_n = lam * h_{n-1} + u_n, three ways, and its adjoint.

def scan_loop(lam, u, starts):
    """The definition.    lam (H,), u (N, H), starts (N,) bool -> h (N, H)"""
    h = u.copy()
    for n in range(1, len(h)):
        if not starts[n]:
            h[n] += lam * h[n - 1]
    return h


def scan_recursive(lam, u, starts):
    """The paper's recursive parallelization ([1], Algorithm 1): O(N log N) work.

    Solve both halves as if a wall stood between them. Row j = 0, 1, ... of the right half then
    still lacks lam^(j+1) times the left half's last state, unless a wall stands in the right half
    at or before it. Here half by half, to be read; where it runs in parallel, all pairs of a level
    go at once. Shapes as in scan_loop.
    """
    if len(u) <= 1:
        return u.copy()
    half = len(u) // 2
    left = scan_recursive(lam, u[:half], starts[:half])
    right = scan_recursive(lam, u[half:], starts[half:])
    open_rows = xp.cumsum(starts[half:]) == 0                     # no wall yet
    powers = lam ** xp.arange(1, len(right) + 1, dtype=lam.real.dtype)[:, None]  # (rows, H)
    right += xp.where(open_rows[:, None], powers * left[-1], 0)
    return xp.concatenate([left, right])


def scan(lam, u, starts, in_place=False):
    """What the model uses: O(N) work in O(log N) array operations, the prefix tree of Brent and
    Kung (1982). Shapes as in scan_loop; in_place turns u itself into h.

    Count rows from 1. On the way up, at distance d = 1, 2, 4, ..., every multiple of 2d takes
    lam^d times the row d before it: it then sums up the 2d rows that end with it. On the way
    down, at d = ..., 4, 2, 1, every odd multiple of d from 3d on takes lam^d times the row d
    before it, which is final by then. `walled` says for the rows so summed up whether a wall is
    among them: what comes from before a wall is dropped.
    """
    h, N = u if in_place else u.copy(), len(u)
    if xp is not np:                               # launches cost most: one kernel in place of 60
        _gpu_kernels()["scan"](lam, starts, N, h.shape[1], h, size=h.size)
        return h
    walled = starts.copy()
    product = np.empty((N // 2, *h.shape[1:]), h.dtype)

    def take(first, d):                            # rows first, first + 2d, ..., counted from 0
        to = h[first::2 * d]
        p = np.multiply(h[first - d::2 * d][:len(to)], powers[d], out=product[:len(to)])
        p[walled[first::2 * d]] = 0
        to += p

    d, powers = 1, {1: lam}
    while 2 * d <= N and not walled[d - 1::d].all():   # where all are, no state gets so far
        take(2 * d - 1, d)
        walled[2 * d - 1::2 * d] |= walled[d - 1:N - d:2 * d]
        powers[2 * d] = powers[d] ** 2
        d *= 2
    while d > 1:
        d //= 2
        take(3 * d - 1, d)
    return h


def scan_backward(dh, lam, h, starts, in_place=False):
    """dh (N, H): dL/dh_n through row n's own output only; lam (H,), h (N, H), starts (N,)
    -> dlam (H,), du (N, H); in_place turns dh itself into du.
    Derivative: g_n, through all rows, is dh_n + conj(lam) g_{n+1}, the latter unless starts[n+1]:
    the same scan, rows reversed and walls shifted by one. du = g; dlam = sum of conj(h_{n-1}) g_n
    over n >= 1 without a wall.
    """
    g = dh if in_place else dh.copy()
    scan(lam.conj(), g[::-1], xp.roll(starts, -1)[::-1], in_place=True)
    products = h[:-1].conj()
    products *= g[1:]
    products[starts[1:]] = 0
    return sum_rows(real_view(products)).view(g.dtype), g


# ---------------------------------------------------------------------------------------------
# The LRU layer: eigenvalues, the projections into and out of the complex state, all together.

def lam_forward(nu_log, theta_log):
    """lam = exp(-exp(nu_log) + i exp(theta_log)).    (H,) real, (H,) real -> (H,) complex

    |lam| = exp(-exp(nu_log)) < 1 whatever nu_log is: the recurrence is stable ([2], Section 3.3).
    """
    nu, theta = xp.exp(nu_log), xp.exp(theta_log)
    lam = xp.exp(-nu + 1j * theta)
    return lam, (nu, theta, lam)


def lam_backward(dlam, cache):
    """dlam (H,) complex -> dnu_log (H,) real, dtheta_log (H,) real
    Derivative: a change of nu_log changes lam by -nu lam, one of theta_log by i theta lam;
    with dL = Re(conj(dlam) * change): dnu_log = -nu Re(conj(dlam) lam), and
    dtheta_log = -theta Im(conj(dlam) lam).
    """
    nu, theta, lam = cache
    pull = dlam.conj() * lam
    return -nu * pull.real, -theta * pull.imag


def complex_in_forward(x, B, b):
    """out = x B + b, real in, complex out.    x (N, D), B (D, H), b (H,) -> out (N, H)

    One real product: x times the real view of B, real and imaginary columns side by side.
    """
    out, cache = linear_forward(x, real_view(B), real_view(b))    # (N, D) -> (N, 2H)
    return out.view(B.dtype), cache


def complex_in_backward(dout, cache):
    """dout (N, H) complex -> dx (N, D) real, dB (D, H), db (H,) complex
    Derivative: as in linear_backward, on the real views; in complex letters
    dx = Re(dout conj(B)^T), dB = x^T dout, db = sum over rows of dout.
    """
    dx, dB, db = linear_backward(real_view(dout), cache)
    return dx, dB.view(dout.dtype), db.view(dout.dtype)


def complex_out_forward(h, C, b):
    """out = Re(h C) + b, complex in, real out.    h (N, H), C (H, D), b (D,) -> out (N, D)

    Re(h C) = Re h Re C - Im h Im C: one real product, with rows Re C, -Im C taking turns.
    """
    W = xp.stack([C.real, -C.imag], 1).reshape(-1, C.shape[1])    # (2H, D)
    return linear_forward(real_view(h), W, b)      # (N, 2H) -> (N, D)


def complex_out_backward(dout, cache):
    """dout (N, D) real -> dh (N, H), dC (H, D) complex, db (D,) real
    Derivative: as in linear_backward, with dC = dW's rows for Re C - i times those for -Im C; in
    complex letters dh = dout conj(C)^T, dC = conj(h)^T dout, db = sum over rows of dout.
    """
    dh, dW, db = linear_backward(dout, cache)
    dC = dW[0::2] - 1j * dW[1::2]
    return dh.view(dC.dtype), dC, db


def lru_forward(x, nu_log, theta_log, gamma_log, B, b_B, C, b_C, starts):
    """u = gamma * (x B + b_B), h_n = lam * h_{n-1} + u_n, out = Re(h C) + b_C.

    x (N, D), nu_log, theta_log, gamma_log (H,), B (D, H), b_B (H,), C (H, D), b_C (D,),
    starts (N,) -> out (N, D). gamma = exp(gamma_log). cache["h"] holds the states (N, H).
    """
    lam, lam_cache = lam_forward(nu_log, theta_log)
    gamma = xp.exp(gamma_log)
    # gamma scales the columns of B and b_B: D+1 rows to multiply, where u has N
    h, in_cache = complex_in_forward(x, gamma * B, gamma * b_B)
    scan(lam, h, starts, in_place=True)            # from u to h
    out, out_cache = complex_out_forward(h, C, b_C)
    return out, dict(h=h, lam=lam, gamma=gamma, B=B, b_B=b_B, starts=starts,
                     lam_cache=lam_cache, in_cache=in_cache, out_cache=out_cache)


def lru_backward(dout, cache):
    """dout (N, D) -> dx (N, D), dnu_log, dtheta_log, dgamma_log (H,), dB, db_B, dC, db_C
    Derivative: back through projection, scan and projection. With B' = gamma B, b' = gamma b_B:
    dB = gamma dB', db_B = gamma db', and dgamma_log = Re(sum of conj(B') dB' + conj(b') db'),
    since B' and b' change by B' and b' times gamma_log's change.
    """
    gamma, B, b_B = cache["gamma"], cache["B"], cache["b_B"]
    dh, dC, db_C = complex_out_backward(dout, cache["out_cache"])
    dlam, du = scan_backward(dh, cache["lam"], cache["h"], cache["starts"], in_place=True)
    dx, dB, db_B = complex_in_backward(du, cache["in_cache"])
    dB *= gamma                                    # the layer's own B was gamma * B
    db_B *= gamma
    dgamma_log = (B.conj() * dB).real.sum(0) + (b_B.conj() * db_B).real
    dnu_log, dtheta_log = lam_backward(dlam, cache["lam_cache"])
    return dx, dnu_log, dtheta_log, dgamma_log, dB, db_B, dC, db_C


# ---------------------------------------------------------------------------------------------
# The block: an LRU, then a feed-forward network, each with dropout, residual and LayerNorm.

LRU_NAMES = ["nu_log", "theta_log", "gamma_log", "B", "b_B", "C", "b_C"]
BLOCK_NAMES = ["lru." + name for name in LRU_NAMES] + [
    "lru_norm.scale", "lru_norm.shift", "ffn.W1", "ffn.b1", "ffn.W2", "ffn.b2",
    "ffn_norm.scale", "ffn_norm.shift"]


def block_forward(x, p, starts, dropout=0.0, rng=None):
    """x = LayerNorm(x + dropout(LRU(x))); out = LayerNorm(x + dropout(FFN(x))), where
    FFN(x) = dropout(GELU(x W1 + b1)) W2 + b2.

    x (N, D), p the block's parameters by BLOCK_NAMES, starts (N,) -> out (N, D)
    """
    y, lru = lru_forward(x, *(p["lru." + name] for name in LRU_NAMES), starts)
    y, mask1 = dropout_forward(y, dropout, rng)
    y += x
    x, norm1 = layer_norm_forward(y, p["lru_norm.scale"], p["lru_norm.shift"])

    y, linear1 = linear_forward(x, p["ffn.W1"], p["ffn.b1"])      # (N, D) -> (N, F)
    y, gelu = gelu_forward(y)
    y, mask2 = dropout_forward(y, dropout, rng)
    y, linear2 = linear_forward(y, p["ffn.W2"], p["ffn.b2"])      # (N, F) -> (N, D)
    y, mask3 = dropout_forward(y, dropout, rng)
    y += x
    out, norm2 = layer_norm_forward(y, p["ffn_norm.scale"], p["ffn_norm.shift"])
    return out, dict(lru=lru, mask1=mask1, norm1=norm1, linear1=linear1, gelu=gelu,
                     mask2=mask2, linear2=linear2, mask3=mask3, norm2=norm2)


def block_backward(dout, cache):
    """dout (N, D) -> dx (N, D), dp: a dict of gradients by BLOCK_NAMES
    Derivative: the forward's lines, bottom to top. A residual adds: its gradient goes down
    both branches, and where the branches part, the two gradients add up.
    """
    dp = {}
    dx, dp["ffn_norm.scale"], dp["ffn_norm.shift"] = layer_norm_backward(dout, cache["norm2"])
    dy = dropout_backward(dx, cache["mask3"])
    dy, dp["ffn.W2"], dp["ffn.b2"] = linear_backward(dy, cache["linear2"])
    dy = dropout_backward(dy, cache["mask2"])
    dy = gelu_backward(dy, cache["gelu"])
    dy, dp["ffn.W1"], dp["ffn.b1"] = linear_backward(dy, cache["linear1"])
    dx += dy                                       # residual: skip branch + feed-forward branch

    dx, dp["lru_norm.scale"], dp["lru_norm.shift"] = layer_norm_backward(dx, cache["norm1"])
    dy = dropout_backward(dx, cache["mask1"])
    dy, *dlru = lru_backward(dy, cache["lru"])
    dp.update(zip(BLOCK_NAMES, dlru))              # the first names are the LRU's
    dx += dy                                       # residual: skip branch + LRU branch
    return dx, dp


# ---------------------------------------------------------------------------------------------
# The model

def init_params(n_items, d_model=64, d_state=None, d_ff=None, n_blocks=2, rng=None,
                dtype=np.float32, max_phase=1.0):
    """Fresh parameters, a dict of arrays; dtype float64 for checks.

    item_embedding (V+1, D), embedding_norm.scale and .shift (D,), output_bias (V+1,), and in each
    block k, as blocks.k.NAME: lru.nu_log, .theta_log, .gamma_log (H,); complex lru.B (D, H),
    .b_B (H,), .C (H, D); lru.b_C (D,); ffn.W1 (D, F), .b1 (F,), .W2 (F, D), .b2 (D,);
    lru_norm and ffn_norm, each .scale and .shift (D,).
    Eigenvalues uniform on the ring 0.8 <= |lam| <= 0.99 ([2], Section 3.2), of which max_phase is
    the part used: 1 is the full circle, as published; near 0 most channels start much like a moving
    average. gamma^2 = 1 - |lam|^2; everything else but the norms normal(0, 0.02), truncated at
    two standard deviations.
    """
    rng = np.random.default_rng() if rng is None else rng
    D, H, F = d_model, d_state or 2 * d_model, d_ff or 4 * d_model

    def normal(*shape):
        x = rng.normal(size=shape)
        while (outside := abs(x) > 2).any():
            x[outside] = rng.normal(size=outside.sum())
        return 0.02 * x

    params = {"item_embedding": normal(n_items + 1, D),
              "embedding_norm.scale": np.ones(D), "embedding_norm.shift": np.zeros(D)}
    for k in range(n_blocks):
        radius2 = rng.uniform(0.8 ** 2, 0.99 ** 2, H)             # uniform in area
        phase = 2 * math.pi * max_phase * (1 - rng.random(H))     # above 0: log is finite
        values = [np.log(-0.5 * np.log(radius2)), np.log(phase), 0.5 * np.log(1 - radius2),
                  normal(D, H) + 1j * normal(D, H), normal(H) + 1j * normal(H),
                  normal(H, D) + 1j * normal(H, D), normal(D),
                  np.ones(D), np.zeros(D), normal(D, F), normal(F), normal(F, D), normal(D),
                  np.ones(D), np.zeros(D)]
        params.update({f"blocks.{k}.{name}": x for name, x in zip(BLOCK_NAMES, values)})
    params["output_bias"] = normal(n_items + 1)
    ctype = np.result_type(dtype, np.complex64)
    return {name: xp.asarray(x, ctype if np.iscomplexobj(x) else dtype)
            for name, x in params.items()}


def blocks(params):
    """The parameters of each block, as a list of dicts by BLOCK_NAMES."""
    n_blocks = sum(name.endswith("nu_log") for name in params)
    return [{name: params[f"blocks.{k}.{name}"] for name in BLOCK_NAMES} for k in range(n_blocks)]


def forward(params, items, starts, dropout=0.0, rng=None):
    """items (N,), starts (N,) -> hidden (N, D), caches: embedding, dropout, norm, each block"""
    x, embedding = embedding_forward(params["item_embedding"], items)
    x, mask = dropout_forward(x, dropout, rng)
    x, norm = layer_norm_forward(x, params["embedding_norm.scale"], params["embedding_norm.shift"])
    caches = [embedding, mask, norm]
    for p in blocks(params):
        x, cache = block_forward(x, p, starts, dropout, rng)
        caches.append(cache)
    return x, caches


def backward(dhidden, caches):
    """dhidden (N, D), caches as of forward -> grads, all but the output layer's
    Derivative: the forward's lines, bottom to top.
    """
    embedding, mask, norm, *block_caches = caches
    grads, dx = {}, dhidden
    for k in reversed(range(len(block_caches))):
        dx, dp = block_backward(dx, block_caches[k])
        grads.update({f"blocks.{k}.{name}": dp[name] for name in BLOCK_NAMES})
    dx, grads["embedding_norm.scale"], grads["embedding_norm.shift"] = layer_norm_backward(dx, norm)
    dx = dropout_backward(dx, mask)
    grads["item_embedding"] = embedding_backward(dx, embedding)
    return grads


def rows_per_chunk(E):
    return max(16, LOGITS_PER_CHUNK // len(E))


def output_loss(hidden, E, output_bias, targets):
    """Mean cross-entropy of logits = hidden E^T + output_bias over the rows with a target.

    hidden (N, D), E (V+1, D), output_bias (V+1,), targets (N,), 0 for none
    -> loss, dhidden (N, D), dE (V+1, D), doutput_bias (V+1,)
    Forward and backward chunk by chunk: N x V logits never exist at once.
    """
    weights = (targets > 0).astype(hidden.dtype)
    weights /= xp.maximum(weights.sum(), 1)
    # the bias as one more column of E, which meets a 1 in each row: two passes over logits less
    W = xp.concatenate([E, output_bias[:, None]], 1)              # (V+1, D+1)
    x = xp.concatenate([hidden, xp.ones_like(hidden[:, :1])], 1)  # (N, D+1)
    loss, dhidden, dW = 0, xp.empty_like(hidden), xp.zeros_like(W)
    n_rows = rows_per_chunk(E)
    for n in range(0, len(hidden), n_rows):
        rows = slice(n, n + n_rows)
        logits = x[rows] @ W.T                     # (rows, D+1) -> (rows, V+1)
        chunk_loss, cache = cross_entropy_forward(logits, targets[rows], weights[rows])
        loss += chunk_loss
        dlogits = cross_entropy_backward(1, cache)
        dhidden[rows] = dlogits @ E
        dW += dlogits.T @ x[rows]
    return loss, dhidden, dW[:, :-1], dW[:, -1]


def loss_and_grads(params, items, targets, starts, dropout=0.0, rng=None):
    """The training loss and its gradient.

    items (N,) int, targets (N,) int (0: no loss in this row), starts (N,) bool; rng, a NumPy
    Generator, is needed where dropout > 0 -> loss (mean over the rows with a target), grads, a
    dict like params.
    """
    items, targets, starts = xp.asarray(items), xp.asarray(targets), xp.asarray(starts)
    hidden, caches = forward(params, items, starts, dropout, rng)
    loss, dhidden, dE, doutput_bias = output_loss(
        hidden, params["item_embedding"], params["output_bias"], targets)
    grads = backward(dhidden, caches)
    grads["item_embedding"] += dE                  # tied: as input and as output embedding
    grads["output_bias"] = doutput_bias
    return loss, {name: grads[name] for name in params}


def encode(params, items, starts, return_state=False):
    """items (N,), starts (N,) -> hidden (N, D), without dropout

    With return_state also the state (K, segments, H) after each segment's last row, from which
    step goes on. hidden[n] depends on row n and the rows before it, back to its wall.
    """
    items, starts = xp.asarray(items), xp.asarray(starts)
    hidden, (_, _, _, *block_caches) = forward(params, items, starts)
    if not return_state:
        return hidden
    last = xp.append(xp.flatnonzero(starts[1:]), len(starts) - 1)  # the rows before a wall
    return hidden, xp.stack([cache["lru"]["h"][last] for cache in block_caches])


def score(params, hidden):
    """hidden (..., D) -> logits (..., V+1); column 0 is -inf: nobody is recommended "nothing"."""
    logits = hidden @ params["item_embedding"].T + params["output_bias"]
    logits[..., 0] = -xp.inf
    return logits


# ---------------------------------------------------------------------------------------------
# Incremental inference: one event in, one state on. No scan, no history.

def init_state(params, n_users=1):
    """The state of users without events: zeros (K, n_users, H), complex."""
    B = params["blocks.0.lru.B"]
    return xp.zeros((len(blocks(params)), n_users, B.shape[1]), B.dtype)


def step(params, state, items):
    """One more event for each user; the state given is not changed.

    state (K, n_users, H), items (n_users,) -> hidden (n_users, D), state (K, n_users, H)
    """
    x = params["item_embedding"][xp.asarray(items)]
    x, _ = layer_norm_forward(x, params["embedding_norm.scale"], params["embedding_norm.shift"])
    new_state = xp.empty_like(state)
    for k, p in enumerate(blocks(params)):         # block_forward's lines, but the scan's: one row
        lam, _ = lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        u, _ = complex_in_forward(x, p["lru.B"], p["lru.b_B"])
        new_state[k] = lam * state[k] + xp.exp(p["lru.gamma_log"]) * u
        y = (new_state[k] @ p["lru.C"]).real + p["lru.b_C"]
        x, _ = layer_norm_forward(x + y, p["lru_norm.scale"], p["lru_norm.shift"])
        y, _ = linear_forward(x, p["ffn.W1"], p["ffn.b1"])
        y, _ = gelu_forward(y)
        y, _ = linear_forward(y, p["ffn.W2"], p["ffn.b2"])
        x, _ = layer_norm_forward(x + y, p["ffn_norm.scale"], p["ffn_norm.shift"])
    return x, new_state


# ---------------------------------------------------------------------------------------------
# AdamW (Loshchilov and Hutter, arXiv 1711.05101), as PyTorch runs it

# as in the authors' code: eigenvalues and their gain decay too; biases and norms do not
DECAYED = ("item_embedding", "nu_log", "theta_log", "gamma_log", ".B", ".C", ".W1", ".W2")


def adamw_init(params):
    """The optimizer's state: the step count and, per parameter, the moments m and v as reals."""
    zeros = {name: xp.zeros_like(real_view(p)) for name, p in params.items()}
    return {"step": 0, "m": zeros, "v": {name: z.copy() for name, z in zeros.items()}}


def adamw_update(params, grads, opt, lr, weight_decay, betas=(0.9, 0.999), eps=1e-9):
    """One step, in place. m, v: running means of g, g^2; mhat = m / (1 - beta1^t), vhat alike.

        p <- p (1 - lr weight_decay)    where decayed, then    p <- p - lr mhat / (sqrt(vhat) + eps)

    A complex entry is two real ones, each with its own v. eps as in the authors' code.
    """
    opt["step"] += 1
    beta1, beta2 = betas
    correction1 = 1 - beta1 ** opt["step"]
    correction2 = 1 - beta2 ** opt["step"]
    for name in params:
        p, g = real_view(params[name]), real_view(grads[name])
        m, v = opt["m"][name], opt["v"][name]
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * g * g
        if name.endswith(DECAYED):
            p *= 1 - lr * weight_decay
        p -= (lr / correction1) * m / (xp.sqrt(v / correction2) + eps)


def clip_gradients(grads, max_norm):
    """Scale all gradients, in place, by min(1, max_norm / (norm + 1e-6)) -> the norm before.

    norm = sqrt(sum of |g|^2) over all entries of all gradients. max_norm may be inf.
    """
    norm = sum(xp.vdot(g, g).real for g in grads.values()) ** 0.5
    factor = xp.minimum(1, max_norm / (norm + 1e-6))
    for g in grads.values():
        g *= factor
    return norm


# ---------------------------------------------------------------------------------------------
# Files: one .npz, readable without pickle

FORMAT = "lrurec 1"


def save(path, params, **extra):
    """Write params and extra: arrays as they are, anything else as JSON. Whole or not at all:
    raises OSError, which names path, and leaves the file that stood there."""
    entries = {"format": np.array(FORMAT)}
    entries.update({"params/" + name: to_host(p) for name, p in params.items()})
    for name, value in extra.items():
        is_array = isinstance(value, (np.ndarray, xp.ndarray))
        entries["array/" + name if is_array else "json/" + name] = (
            to_host(value) if is_array else np.array(json.dumps(value)))
    temporary = f"{path}.part"                     # what a killed run left is overwritten
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:                       # a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path):
    """-> params, extra, as given to save. Raises OSError where path cannot be opened, ValueError
    where it is no such file."""
    with open(path, "rb") as raw:
        try:
            with np.load(raw, allow_pickle=False) as file:
                entries = dict(file)
        except Exception:                          # what a damaged zip can raise has no end
            raise ValueError(f"{path} is not a model file, or is damaged") from None
    found = str(entries.pop("format", "none"))
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this program reads {FORMAT!r}")
    params, extra = {}, {}
    for key, value in entries.items():
        kind, _, name = key.partition("/")
        if kind == "params":
            params[name] = xp.asarray(value)
        else:
            extra[name] = value if kind == "array" else json.loads(str(value))
    return params, extra
