# SPDX-License-Identifier: MIT
"""LRURec in NumPy: linear recurrent units for sequential recommendation, gradients by hand.

Read first
    [1] Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024,
        arXiv 2310.02367: the model, and the recursive parallelization (Algorithm 1).
    [2] Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, ICML 2023,
        arXiv 2303.06349: the LRU, the ring of eigenvalues, the input gain gamma.

The model
    x = LayerNorm(dropout(E[items]))                             one row per event
    in each block:
        u_n = gamma * (x_n B + b_B)                              real in, complex out
        h_n = lam * h_{n-1} + u_n                                the only line that looks back
        x   = LayerNorm(x + dropout(Re(h C) + b_C))
        x   = LayerNorm(x + dropout(dropout(GELU(x W1 + b1)) W2 + b2))
    logits = x E^T + output_bias                                 E is the input embedding again

Sizes (defaults)                                    Symbols
    N  rows: the events of all users in a batch,        E, B, C, W1, W2, b*  parameters
       one after another, without padding               lam    eigenvalues, |lam| < 1:
    V  items, ids 1..V; id 0 is "nothing yet"                  exp(-exp(nu_log) + i exp(theta_log))
    D  model width (64)                                 gamma  input gain, exp(gamma_log)
    H  complex state width (2 D)                        u, h   input and state of the recurrence
    F  feed-forward width (4 D)                         dh     gradient of h_n via row n's output
    K  blocks (2)                                       g      dh plus what later rows send back

Walls. Where starts[n] is True, a wall stands before row n: the state there is zero, since a new
user begins, or a new window of a long history, or the row before held id 0. A wall always stands
before row 0, whatever starts[0] says. Rows count from 0.

Gradients. L is the loss, and the gradient of `name` is `dname`. A complex z is two real numbers,
and we store dz = dL/d(Re z) + i dL/d(Im z), as PyTorch's .grad does: z - lr * dz descends, and a
small change c of z changes L by Re(conj(dz) c). With a = p + iq, the product z = a w is a real 2x2
matrix acting on w, and gradients go back through its transpose:

    [Re z]   [p  -q] [Re w]          [Re dw]   [ p  q] [Re dz]
    [Im z] = [q   p] [Im w]          [Im dw] = [-q  p] [Im dz]

The transpose is the matrix of p - iq. Hence the conjugate: dw = conj(a) dz, and da = conj(w) dz.
All entries are plain partial derivatives, so there is no factor 2. y = Re(z) gives dz = dy + 0i.

Where [1] and its authors' code differ, we follow the code: no second GELU after the feed-forward
(eq. 8). D x in its eq. 5, with D the identity, is the x in x + dropout(Re(h C) + b_C). Our own: the
tanh form of GELU, dropout from random bytes, no padding, each event is a target exactly once an
epoch; README, "Where we differ", has the whole list.
"""
import json
import math
import os

import numpy as np

xp = np                           # the array library; use_device, at the end, can make it CuPy


# ---- Layers. Each forward returns (out, cache). Its backward stands directly below and returns the
# gradients of the forward's inputs, in their order. Work is in place only where that pays.

def linear_forward(x, W, b):
    """out = x W + b.    x (N, I), W (I, O), b (O,) -> out (N, O), any I, O; cache = (x, W)"""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dout (N, O) -> dx (N, I), dW (I, O), db (O,)
    Derivative: dx = dout W^T, dW = x^T dout, db = sum over rows of dout.
    """
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(0)


GELU_C = math.sqrt(2 / math.pi)
GELU_A = 0.044715


def gelu_forward(x):
    """out = x s, s = (1 + tanh(y)) / 2, y = c (x + a x^3).    x (...) -> out (...); cache = (x, s)
    c = sqrt(2/pi), a = 0.044715: the tanh form of Hendrycks and Gimpel, arXiv 1606.08415.
    """
    y = x * (GELU_C + GELU_C * GELU_A * (x * x))
    s = 0.5 + 0.5 * xp.tanh(y)
    return x * s, (x, s)


def gelu_backward(dout, cache):
    """dout (...) -> dx (...)
    Derivative: s is the sigmoid of 2y, and a sigmoid's slope is s (1 - s). The slope of 2y in x is
    r = 2c (1 + 3a x^2). So dx = dout (s + x s (1 - s) r) = dout s (1 + x r (1 - s)).
    """
    x, s = cache
    r = 2 * GELU_C + 6 * GELU_C * GELU_A * (x * x)
    return dout * (s * (1 + x * r * (1 - s)))


def row_mean(x):
    """x (N, D) -> (N, 1): x.mean(1, keepdims=True), as a product. By turns in one process, a step
    with x.mean took 2 to 6 % longer on a Xeon, 25 % on another machine."""
    return x @ xp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)


def layer_norm_forward(x, scale, shift, eps=1e-5):
    """out = scale * xhat + shift, where in each row xhat = (x - mean) * rstd and
    rstd = 1 / sqrt(mean of (x - mean)^2 + eps).
    x (N, D), scale (D,), shift (D,) -> out (N, D); cache = (xhat (N, D), rstd (N, 1), scale)
    """
    centered = x - row_mean(x)
    rstd = 1 / xp.sqrt(row_mean(centered * centered) + eps)       # (N, 1)
    xhat = centered * rstd
    return scale * xhat + shift, (xhat, rstd, scale)


def layer_norm_backward(dout, cache):
    """dout (N, D) -> dx (N, D), dscale (D,), dshift (D,)
    Derivative: dscale = sum over rows of dout * xhat, dshift = sum over rows of dout. With
    dxhat = scale * dout, dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat * xhat)), means within
    each row. The last term is due to rstd, which changes by -rstd^2 mean(xhat * change of x).
    """
    xhat, rstd, scale = cache
    dxhat = scale * dout
    dx = dxhat - row_mean(dxhat)                   # x itself, and x in the mean
    dx -= xhat * row_mean(dxhat * xhat)            # x in rstd
    dx *= rstd
    return dx, (dout * xhat).sum(0), dout.sum(0)


def dropout_forward(x, p, rng):
    """out = x * mask, where mask is 0 with probability p, else 1/(1-p) (inverted dropout).
    x (N, D), rng a NumPy Generator -> out (N, D); cache = mask (N, D); for p = 0, out = x and mask
    is None. Each entry draws a random byte, 0 to 255, and is dropped if the byte is below 256 p:
    this rounds p to the nearest of 0/256, 1/256, ..., 255/256.
    """
    if p == 0:
        return x, None
    n_dropped = min(round(256 * p), 255)           # of the 256 values of a byte; 1 is always kept
    mask = (random_bytes(x.shape, rng) >= n_dropped).astype(x.dtype)
    mask *= 256 / (256 - n_dropped)                # 1/(1-p)
    return x * mask, mask


def dropout_backward(dout, mask):
    """dout (N, D), mask the forward's cache -> dx (N, D)
    Derivative: dx = dout * mask, the same mask; dx = dout if it is None.
    """
    return dout if mask is None else dout * mask


def random_bytes(shape, rng):
    """Uniform bytes, eight from each 64-bit draw. By turns in one process, a step with random
    floats took 5 to 13 % longer."""
    size = math.prod(shape)
    bits = rng.integers(2 ** 64 - 1, size=(size + 7) // 8, dtype=np.uint64, endpoint=True)
    return bits.view(np.uint8)[:size].reshape(shape)


# ---- The recurrence and its backward: the definitions, the paper's way, and what the model uses.

def scan_loop(lam, u, starts):
    """The definition: h_n = lam * h_{n-1} + u_n, with 0 for h_{n-1} if a wall stands between.
    lam (H,) complex, u (N, H) complex, starts (N,) bool -> h (N, H) complex
    Example: three rows, a wall before row 2, lam = i/2.  u = 2, 1, 4  gives  h = 2, 1 + i, 4.
    """
    h = u.copy()
    for n in range(1, len(u)):
        if not starts[n]:
            h[n] += lam * h[n - 1]
    return h


def scan_backward_loop(dh, lam, h, starts):
    """The definition: g_n = dh_n + conj(lam) * g_{n+1}, where nothing comes back across a wall.
    dh (N, H) holds the gradients of h_n through row n's own output; g_n adds what comes through
    later rows. lam (H,), h (N, H) of the forward, starts (N,) -> dlam (H,), du (N, H)
    Derivative: h_n = lam h_{n-1} + u_n hands g_n on: all of it to u_n, so du = g; conj(lam) g_n to
    h_{n-1}; and conj(h_{n-1}) g_n to lam: dlam is their sum over the rows n >= 1 without a wall.
    In scan_loop's example dh = 1, 2i, 1 gives g_2 = 1; g_1 = 2i, since the wall keeps g_2 back;
    g_0 = 1 + conj(i/2) 2i = 2 (with lam itself it would be 0); dlam = conj(h_0) g_1 = 4i.
    """
    dlam, g = xp.zeros_like(lam), dh.copy()
    for n in range(len(h) - 1, 0, -1):
        if not starts[n]:
            dlam += h[n - 1].conj() * g[n]
            g[n - 1] += lam.conj() * g[n]
    return dlam, g


def scan_recursive(lam, u, starts):
    """The paper's recursive parallelization ([1], Algorithm 1): O(N log N) work. Shapes as above.
    Solve both halves as if a wall stood between them. Row j of the right half, counted from 0,
    then lacks lam^(j+1) times the left half's last state, unless a wall stands before row j or an
    earlier row of the right half. (A parallel machine solves all halves of one size at once.)
    """
    if len(u) <= 1:
        return u.copy()
    half = len(u) // 2
    left = scan_recursive(lam, u[:half], starts[:half])
    right = scan_recursive(lam, u[half:], starts[half:])
    no_wall_yet = xp.cumsum(starts[half:]) == 0
    powers = lam ** xp.arange(1, len(right) + 1)[:, None]         # (rows, H), in double precision
    right += xp.where(no_wall_yet[:, None], powers * left[-1], 0)
    return xp.concatenate([left, right])


def scan(lam, u, starts):
    """What the model uses: O(N) work in O(log N) array operations. Shapes as in scan_loop.

    Rows 2m and 2m+1 are a pair. Substituting h_{2m} into h_{2m+1} leaves only odd rows:
    h_{2m+1} = lam^2 h_{2m-1} + (lam u_{2m} + u_{2m+1}), the same recurrence at half the length. A
    wall before either row is a wall before the pair; one before row 2m+1 also drops lam u_{2m}.
    Solve it recursively; then one plain step leads from each odd row to the even row after it
    (Brent and Kung, 1982). The recursion ends when no row looks back: at one row, or as soon as
    only walls are left. lam is squared in double precision: each squaring doubles its error.
    """
    if starts[1:].all():
        return u.copy()
    N, a = len(u), lam.astype(u.dtype)             # a: lam, in the precision of u
    pairs = a * u[0:N - 1:2]                       # lam u_{2m}; below, + u_{2m+1}: (N // 2, H)
    pairs[starts[1::2]] = 0
    pairs += u[1::2]
    odd = scan(lam.astype(complex) ** 2, pairs, starts[0:N - 1:2] | starts[1::2])
    h = u.copy()
    h[1::2] = odd                                  # rows 1, 3, ...
    from_odd = a * odd[:(N - 1) // 2]              # for rows 2, 4, ...
    from_odd[starts[2::2]] = 0
    h[2::2] += from_odd
    return h


def scan_backward(dh, lam, h, starts):
    """scan_backward_loop's result, at the cost of scan. dh_n comes from row n's own output alone.
    dh (N, H), lam (H,), h (N, H), starts (N,) -> dlam (H,), du (N, H)
    Derivative: read from the last row to the first, g_n = dh_n + conj(lam) g_{n+1} is a scan with
    conj(lam). Row n takes nothing from row n+1 if starts[n+1] is True: the walls move by one row.
    du = g, and dlam = sum of conj(h_{n-1}) g_n over the rows n >= 1 without a wall.
    """
    next_starts = xp.roll(starts, -1)              # starts[n+1]; for the last row it plays no part
    g = scan(lam.conj(), dh[::-1], next_starts[::-1])[::-1].copy()          # contiguous again
    products = h[:-1].conj() * g[1:]
    products[starts[1:]] = 0
    return products.sum(0), g


# ---- The LRU layer: eigenvalues, the projections into and out of the complex state, all together.

def lam_forward(nu_log, theta_log):
    """lam = exp(-nu + i theta), nu = exp(nu_log), theta = exp(theta_log).
    nu_log (H,), theta_log (H,), real -> lam (H,) complex; cache = (nu, theta, lam)
    |lam| = exp(-nu) < 1, whatever nu_log is: the recurrence is stable (Orvieto et al. 2023, 3.3).
    """
    nu, theta = xp.exp(nu_log), xp.exp(theta_log)
    lam = xp.exp(-nu + 1j * theta)
    return lam, (nu, theta, lam)


def lam_backward(dlam, cache):
    """dlam (H,) complex -> dnu_log (H,) real, dtheta_log (H,) real
    Derivative: lam changes by -nu lam times the change of nu_log, and by i theta lam times that of
    theta_log. L changes by Re(conj(dlam) * change of lam). So dnu_log = -nu Re(conj(dlam) lam) and
    dtheta_log = Re(conj(dlam) i theta lam) = -theta Im(conj(dlam) lam).
    """
    nu, theta, lam = cache
    conj_dlam_lam = dlam.conj() * lam
    return -nu * conj_dlam_lam.real, -theta * conj_dlam_lam.imag


def real_view(z):
    """Complex (..., M) seen as real (..., 2M): re, im, re, im, ...; real z is returned as it is."""
    return z.view(z.real.dtype)


def real_rows(C):
    """C (H, D) complex -> real (2H, D): the rows of Re C and of -Im C, alternating."""
    return xp.stack([C.real, -C.imag], 1).reshape(-1, C.shape[1])


def complex_in_forward(x, B, b):
    """out = x B + b, real in, complex out: one real product, x times the real view of B.
    x (N, D) real, B (D, H), b (H,) complex -> out (N, H) complex; cache = (x, B)
    """
    out, _ = linear_forward(x, real_view(B), real_view(b))        # (N, D) -> (N, 2H)
    return out.view(B.dtype), (x, B)               # (N, H)


def complex_in_backward(dout, cache):
    """dout (N, H) complex -> dx (N, D) real, dB (D, H), db (H,) complex
    Derivative: dx = Re(dout conj(B)^T), dB = x^T dout, db = sum over rows of dout. On the real
    views, this is linear_backward.
    """
    x, B = cache
    dx, dB, db = linear_backward(real_view(dout), (x, real_view(B)))
    return dx, dB.view(B.dtype), db.view(B.dtype)


def complex_out_forward(h, C, b):
    """out = Re(h C) + b, complex in, real out.
    h (N, H), C (H, D) complex, b (D,) real -> out (N, D) real; cache = (h, C)
    Re(h C) = Re h Re C - Im h Im C is one real product: the real view of h times real_rows(C).
    """
    out, _ = linear_forward(real_view(h), real_rows(C), b)        # (N, 2H) -> (N, D)
    return out, (h, C)


def complex_out_backward(dout, cache):
    """dout (N, D) real -> dh (N, H), dC (H, D) complex, db (D,) real
    Derivative: dh = dout conj(C)^T, dC = conj(h)^T dout, db = sum over rows of dout. On the real
    views, dW has the rows of Re(h)^T dout and of Im(h)^T dout, alternating.
    """
    h, C = cache
    dh, dW, db = linear_backward(dout, (real_view(h), real_rows(C)))
    dC = dW[0::2] - 1j * dW[1::2]                  # (2H, D) -> (H, D)
    return dh.view(C.dtype), dC, db


def lru_forward(x, nu_log, theta_log, gamma_log, B, b_B, C, b_C, starts):
    """u = exp(gamma_log) * (x B + b_B), h_n = lam * h_{n-1} + u_n, out = Re(h C) + b_C.
    Real: x (N, D), nu_log, theta_log, gamma_log (H,), b_C (D,); complex: B (D, H), b_B (H,),
    C (H, D); starts (N,)
    -> out (N, D); cache: a dict of u, h, lam, gamma, starts and the caches of the layers inside
    """
    lam, lam_cache = lam_forward(nu_log, theta_log)
    gamma = xp.exp(gamma_log)
    z, in_cache = complex_in_forward(x, B, b_B)    # (N, D) -> (N, H)
    u = gamma * z
    h = scan(lam, u, starts)
    out, out_cache = complex_out_forward(h, C, b_C)               # (N, H) -> (N, D)
    return out, dict(u=u, h=h, lam=lam, gamma=gamma, starts=starts, lam_cache=lam_cache,
                     in_cache=in_cache, out_cache=out_cache)


def lru_backward(dout, cache):
    """dout (N, D) -> dx, dnu_log, dtheta_log, dgamma_log, dB, db_B, dC, db_C, each with the shape
    and dtype of its input
    Derivative: the forward's lines, bottom to top. u = exp(gamma_log) z with z = x B + b_B, so u
    changes by u times the change of gamma_log: dgamma_log = Re(sum over rows of conj(u) du), and
    dz = gamma du.
    """
    dh, dC, db_C = complex_out_backward(dout, cache["out_cache"])
    dlam, du = scan_backward(dh, cache["lam"], cache["h"], cache["starts"])
    dz = cache["gamma"] * du
    dgamma_log = (cache["u"].conj() * du).real.sum(0)
    dx, dB, db_B = complex_in_backward(dz, cache["in_cache"])
    dnu_log, dtheta_log = lam_backward(dlam, cache["lam_cache"])
    return dx, dnu_log, dtheta_log, dgamma_log, dB, db_B, dC, db_C


# ---- The block: an LRU, then a feed-forward network, each with dropout, residual and LayerNorm.

LRU_NAMES = ["lru.nu_log", "lru.theta_log", "lru.gamma_log", "lru.B", "lru.b_B", "lru.C", "lru.b_C"]
BLOCK_NAMES = LRU_NAMES + ["lru_norm.scale", "lru_norm.shift", "ffn.W1", "ffn.b1", "ffn.W2",
                           "ffn.b2", "ffn_norm.scale", "ffn_norm.shift"]


def block_forward(x, p, starts, dropout=0.0, rng=None):
    """x = LayerNorm(x + dropout(LRU(x))); out = LayerNorm(x + dropout(FFN(x))), where
    FFN(x) = dropout(GELU(x W1 + b1)) W2 + b2.
    x (N, D), p the block's parameters by BLOCK_NAMES, starts (N,) -> out (N, D); cache: a dict
    """
    y, lru = lru_forward(x, *(p[name] for name in LRU_NAMES), starts)
    y, mask1 = dropout_forward(y, dropout, rng)
    x, norm1 = layer_norm_forward(x + y, p["lru_norm.scale"], p["lru_norm.shift"])

    y, linear1 = linear_forward(x, p["ffn.W1"], p["ffn.b1"])      # (N, D) -> (N, F)
    y, gelu = gelu_forward(y)
    y, mask2 = dropout_forward(y, dropout, rng)
    y, linear2 = linear_forward(y, p["ffn.W2"], p["ffn.b2"])      # (N, F) -> (N, D)
    y, mask3 = dropout_forward(y, dropout, rng)
    out, norm2 = layer_norm_forward(x + y, p["ffn_norm.scale"], p["ffn_norm.shift"])
    return out, dict(lru=lru, mask1=mask1, norm1=norm1, linear1=linear1, gelu=gelu,
                     mask2=mask2, linear2=linear2, mask3=mask3, norm2=norm2)


def block_backward(dout, cache):
    """dout (N, D) -> dx (N, D), dp: a dict of gradients by BLOCK_NAMES
    Derivative: the forward's lines, bottom to top. A residual x + f(x) hands its gradient to both
    branches: dx = that gradient + what comes back through f.
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
    dp.update(zip(LRU_NAMES, dlru))
    dx += dy                                       # residual: skip branch + LRU branch
    return dx, dp


# ---- The loss: cross-entropy over all items, in chunks of rows.

def cross_entropy_forward(logits, targets, weights):
    """loss = sum over rows of weight * (log sum_v exp(logit_v) - logit_target).
    logits (N, V+1), targets (N,) int, weights (N,) -> loss, a scalar
    cache = (exps (N, V+1), sums (N,), targets, weights), with exps = exp(logit - row maximum) and
    sums = their sum in each row. logits is overwritten: exps takes its memory.
    """
    logits -= logits.max(1, keepdims=True)         # the loss stays the same, and exp <= 1
    target_logits = logits[xp.arange(len(targets)), targets]
    exps = xp.exp(logits, out=logits)              # in place: 2 to 5 % of a step
    sums = exps.sum(1)
    loss = weights @ (xp.log(sums) - target_logits)
    return loss, (exps, sums, targets, weights)


def cross_entropy_backward(dloss, cache):
    """dloss, a scalar -> dlogits (N, V+1), in the memory of exps
    Derivative: dlogits = dloss * weight * (softmax(logits) - onehot(target)).
    """
    dlogits, sums, targets, weights = cache        # still exps here; softmax = exps / sums
    dlogits *= (dloss * weights / sums)[:, None]
    dlogits[xp.arange(len(targets)), targets] -= dloss * weights
    return dlogits


ROWS_PER_CHUNK = 256              # of logits: enough for fast products; in cache on ML-100K
LOGITS_PER_CHUNK = 2 ** 26        # fewer rows if there are very many items: 256 MB of float32


def output_loss(hidden, E, output_bias, targets):
    """Mean cross-entropy of logits = hidden E^T + output_bias over the rows with a target.
    hidden (N, D), E (V+1, D), output_bias (V+1,), targets (N,), 0 for none
    -> loss, dhidden (N, D), dE (V+1, D), doutput_bias (V+1,)
    Forward and backward chunk by chunk, so that N x V logits never exist at once.
    """
    weights = (targets > 0).astype(hidden.dtype)
    weights /= xp.maximum(weights.sum(), 1)        # 1: where no row has a target
    loss, dhidden = 0, xp.empty_like(hidden)
    dE, doutput_bias = xp.zeros_like(E), xp.zeros_like(output_bias)
    n_rows = max(1, min(ROWS_PER_CHUNK, LOGITS_PER_CHUNK // len(E)))
    for n in range(0, len(hidden), n_rows):
        rows = slice(n, n + n_rows)
        logits = hidden[rows] @ E.T                # (rows, D) -> (rows, V+1)
        logits += output_bias
        chunk_loss, cache = cross_entropy_forward(logits, targets[rows], weights[rows])
        loss += chunk_loss
        dlogits = cross_entropy_backward(1, cache)
        dhidden[rows] = dlogits @ E                # linear_backward, with W = E^T
        dE += dlogits.T @ hidden[rows]
        doutput_bias += dlogits.sum(0)
    return loss, dhidden, dE, doutput_bias


# ---- The model

def init_params(n_items, d_model=64, d_state=None, d_ff=None, n_blocks=2, rng=None,
                dtype=np.float32, max_phase=1.0):
    """Fresh parameters, a dict of arrays. d_state None: 2 d_model; d_ff None: 4 d_model.
    Eigenvalues are uniform on the ring 0.8 <= |lam| <= 0.99 ([2], Section 3.2). max_phase is the
    fraction of the circle that is used: 1 is all of it, as published; near 0 most entries of h
    start out much like moving averages. gamma^2 = 1 - |lam|^2. Norms start with scale 1, shift 0.
    """
    rng = np.random.default_rng() if rng is None else rng
    D, H, F = d_model, d_state or 2 * d_model, d_ff or 4 * d_model

    def normal(*shape):                            # of deviation 0.02, truncated at +-0.04
        x = rng.normal(size=shape)
        while (outside := abs(x) > 2).any():
            x[outside] = rng.normal(size=outside.sum())
        return 0.02 * x

    params = {"item_embedding": normal(n_items + 1, D),
              "embedding_norm.scale": np.ones(D), "embedding_norm.shift": np.zeros(D)}
    for k in range(n_blocks):
        radius2 = rng.uniform(0.8 ** 2, 0.99 ** 2, H)             # |lam|^2: uniform in area
        phase = 2 * math.pi * max_phase * (1 - rng.random(H))     # not 0: its log is finite
        block = {
            "lru.nu_log": np.log(-0.5 * np.log(radius2)),         # |lam| = exp(-exp(nu_log))
            "lru.theta_log": np.log(phase),
            "lru.gamma_log": 0.5 * np.log(1 - radius2),
            "lru.B": normal(D, H) + 1j * normal(D, H), "lru.b_B": normal(H) + 1j * normal(H),
            "lru.C": normal(H, D) + 1j * normal(H, D), "lru.b_C": normal(D),
            "lru_norm.scale": np.ones(D), "lru_norm.shift": np.zeros(D),
            "ffn.W1": normal(D, F), "ffn.b1": normal(F),
            "ffn.W2": normal(F, D), "ffn.b2": normal(D),
            "ffn_norm.scale": np.ones(D), "ffn_norm.shift": np.zeros(D)}
        params.update({f"blocks.{k}.{name}": value for name, value in block.items()})
    params["output_bias"] = normal(n_items + 1)
    ctype = np.result_type(dtype, np.complex64)
    return {name: xp.asarray(value, ctype if np.iscomplexobj(value) else dtype)
            for name, value in params.items()}


def blocks(params):
    """A list of one dict per block: params["blocks.k.NAME"] as NAME, for NAME in BLOCK_NAMES."""
    n_blocks = sum(name.endswith(".nu_log") for name in params)
    return [{name: params[f"blocks.{k}.{name}"] for name in BLOCK_NAMES} for k in range(n_blocks)]


def as_ids(params, ids):
    """ids (N,) as an integer array of xp. Raises ValueError for an id outside 0..V, or no ids."""
    ids, V = np.atleast_1d(to_host(ids)), len(params["item_embedding"]) - 1
    if not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > V:
        raise ValueError(f"items must be integers in 0..{V}, one or more (0 is an empty history)")
    return xp.asarray(ids)


def forward(params, items, starts, dropout=0.0, rng=None):
    """items (N,), starts (N,) -> hidden (N, D), caches: [items, dropout mask, norm, *blocks]"""
    x = params["item_embedding"][items]            # (N,) -> (N, D)
    x, mask = dropout_forward(x, dropout, rng)
    x, norm = layer_norm_forward(x, params["embedding_norm.scale"], params["embedding_norm.shift"])
    caches = [items, mask, norm]
    for p in blocks(params):
        x, cache = block_forward(x, p, starts, dropout, rng)
        caches.append(cache)
    return x, caches


def backward(dhidden, caches, E):
    """dhidden (N, D), caches from forward, E (V+1, D) the item embedding -> grads by name, without
    the output layer's share; those of block k are "blocks.k.NAME" for NAME in BLOCK_NAMES
    Derivative: the forward's lines, bottom to top. Row v of dE is the sum of dx over the rows
    where items = v.
    """
    items, mask, norm, *block_caches = caches
    grads, dx = {}, dhidden
    for k in reversed(range(len(block_caches))):
        dx, dp = block_backward(dx, block_caches[k])
        grads.update({f"blocks.{k}.{name}": gradient for name, gradient in dp.items()})
    dx, grads["embedding_norm.scale"], grads["embedding_norm.shift"] = layer_norm_backward(dx, norm)
    dx = dropout_backward(dx, mask)
    dE = grads["item_embedding"] = xp.zeros_like(E)
    xp.add.at(dE, items, dx)                       # dE[items] += dx would lose repeated items
    return grads


def loss_and_grads(params, items, targets, starts, dropout=0.0, rng=None):
    """items (N,) int, targets (N,) int (0: no loss in this row), starts (N,) bool, rng a NumPy
    Generator if dropout > 0 -> loss (mean over the rows with a target), grads like params
    Raises ValueError for an item or a target outside 0..V.
    """
    items = as_ids(params, items)
    targets = as_ids(params, targets).reshape(items.shape)        # ValueError for another length
    starts = xp.asarray(starts, bool).reshape(items.shape)
    E = params["item_embedding"]
    hidden, caches = forward(params, items, starts, dropout, rng)
    loss, dhidden, dE, doutput_bias = output_loss(hidden, E, params["output_bias"], targets)
    grads = backward(dhidden, caches, E)
    grads["item_embedding"] += dE                  # tied: the input's share + the output's
    grads["output_bias"] = doutput_bias
    return loss, {name: grads[name] for name in params}


def encode(params, items, starts, return_state=False):
    """items (N,) in 0..V, starts (N,) -> hidden (N, D), without dropout
    With return_state also the state (K, segments, H) after the last row of each segment (the rows
    from one wall to the next); step continues from there.
    """
    items = as_ids(params, items)
    starts = xp.asarray(starts, bool).reshape(items.shape)
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


# ---- Incremental inference: one event at a time. No scan, no history.

def init_state(params, n_users=1):
    """The state of users without events: zeros (K, n_users, H), complex."""
    B = params["blocks.0.lru.B"]
    return xp.zeros((len(blocks(params)), n_users, B.shape[1]), B.dtype)


def step(params, state, items):
    """One more event for each user; the state given is not changed.
    state (K, n_users, H), items (n_users,) -> hidden (n_users, D), state (K, n_users, H)
    Raises ValueError for an item outside 0..V.
    """
    x = params["item_embedding"][as_ids(params, items).reshape(state.shape[1])]
    x, _ = layer_norm_forward(x, params["embedding_norm.scale"], params["embedding_norm.shift"])
    new_state = xp.empty_like(state)
    for k, p in enumerate(blocks(params)):         # block_forward with one row in place of the scan
        lam, _ = lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        z, _ = complex_in_forward(x, p["lru.B"], p["lru.b_B"])
        new_state[k] = lam * state[k] + xp.exp(p["lru.gamma_log"]) * z
        y = (new_state[k] @ p["lru.C"]).real + p["lru.b_C"]
        x, _ = layer_norm_forward(x + y, p["lru_norm.scale"], p["lru_norm.shift"])
        y, _ = linear_forward(x, p["ffn.W1"], p["ffn.b1"])
        y, _ = gelu_forward(y)
        y, _ = linear_forward(y, p["ffn.W2"], p["ffn.b2"])
        x, _ = layer_norm_forward(x + y, p["ffn_norm.scale"], p["ffn_norm.shift"])
    return x, new_state


# ---- AdamW (Loshchilov and Hutter, arXiv 1711.05101), as PyTorch runs it. As in the authors' code,
# nu_log, theta_log and gamma_log decay too; biases and norms do not.
DECAYED = ("item_embedding", "nu_log", "theta_log", "gamma_log", ".B", ".C", ".W1", ".W2")


def adamw_init(params):
    """The optimizer's state: the number of steps so far and, for each parameter, m and v, the
    running means of its gradient and of the gradient's square, both real."""
    zeros = {name: xp.zeros_like(real_view(p)) for name, p in params.items()}
    return {"step": 0, "m": zeros, "v": {name: z.copy() for name, z in zeros.items()}}


def adamw_update(params, grads, opt, lr, weight_decay, betas=(0.9, 0.999), eps=1e-9):
    """Step t = 1, 2, ..., in place. m, v: running means of g, g^2; mhat, vhat: bias-corrected.
        p <- p (1 - lr weight_decay)                 if its name ends with one of DECAYED
        p <- p - lr mhat / (sqrt(vhat) + eps)        eps as in the authors' code
    A complex entry is two real ones, each with its own m and v.
    """
    opt["step"] += 1
    t = opt["step"]
    beta1, beta2 = betas
    for name in params:
        p, g = real_view(params[name]), real_view(grads[name])
        m, v = opt["m"][name], opt["v"][name]
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * g * g
        mhat = m / (1 - beta1 ** t)
        vhat = v / (1 - beta2 ** t)
        if name.endswith(DECAYED):
            p *= 1 - lr * weight_decay
        p -= lr * mhat / (xp.sqrt(vhat) + eps)


def clip_gradients(grads, max_norm):
    """Scale all gradients, in place, by min(1, max_norm / (norm + 1e-6)) -> norm, which is
    sqrt(sum of |g|^2) over all entries of all gradients, before. max_norm may be inf."""
    norm = sum(xp.vdot(g, g).real for g in grads.values()) ** 0.5
    factor = xp.minimum(1, max_norm / (norm + 1e-6))
    for g in grads.values():
        g *= factor
    return norm


# ---- Files: one .npz, readable without pickle

def save(path, params, **extra):
    """Write params, a dict of arrays, and extra, anything that JSON can hold. The file is written
    as path.part, which then takes the place of path: a killed save leaves the old file whole."""
    arrays = {name: to_host(p) for name, p in params.items()}
    with open(f"{path}.part", "wb") as file:       # given a name, np.savez would append .npz
        np.savez(file, extra=np.array(json.dumps(extra)), **arrays)
    os.replace(f"{path}.part", path)


def load(path):
    """-> params, extra, as given to save. Raises OSError, or ValueError for any other file."""
    with open(path, "rb") as file:
        try:
            arrays = dict(np.load(file, allow_pickle=False))
            extra = json.loads(str(arrays.pop("extra")))
        except Exception:                          # a damaged file can raise many types
            raise ValueError(f"{path} is not a model file, or it is damaged") from None
    return {name: xp.asarray(array) for name, array in arrays.items()}, extra


# ---- The array backend: CuPy in place of NumPy, on request. All of the above runs on either.

CPU = np, scan, random_bytes, ROWS_PER_CHUNK       # what use_device("cpu") puts back


def use_device(device):
    """Compute on "cpu" (NumPy) or "gpu" (CuPy) from now on: xp, scan, random_bytes and
    ROWS_PER_CHUNK become those of the device. On a device that is in use already nothing happens.
    Raises RuntimeError without a GPU."""
    global xp, scan, random_bytes, ROWS_PER_CHUNK
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device must be 'cpu' or 'gpu', not {device!r}")
    in_use = "cpu" if xp is np else "gpu"
    if device != in_use:
        xp, scan, random_bytes, ROWS_PER_CHUNK = CPU if device == "cpu" else gpu()


def gpu():
    """What use_device("gpu") puts in the place of CPU. Raises RuntimeError."""
    try:
        import cupy
        cupy.zeros(1) + 1                          # needs a GPU, its driver and CUDA's compiler
    except Exception as error:                     # which fail with many types of exceptions
        raise RuntimeError(f"CuPy cannot use an NVIDIA GPU ({' '.join(str(error).split())}): use "
                           "--device cpu, or install a driver and CuPy: python -m pip install "
                           '"cupy-cuda12x[ctk]" (cupy-cuda13x for CUDA 13)') from None
    # Thread i is for row i / H and channel i % H. On the first row of a segment it walks all of the
    # segment; elsewhere it does nothing. h holds u at first
    scan_kernel = cupy.ElementwiseKernel(
        "raw T lam, raw bool starts, int64 N, int64 H", "raw T h", """
        long long row = i / H, c = i % H;
        if (row == 0 || starts[row]) {
            T state = h[row * H + c];
            while (++row < N && !starts[row]) {
                state = lam[c] * state + h[row * H + c];
                h[row * H + c] = state;
            }
        }""", "lru_scan")
    bytes_kernel = cupy.ElementwiseKernel(         # splitmix64 (Steele et al. 2014) of seed + i
        "uint64 seed", "uint8 out", """
        unsigned long long z = (seed + i + 1) * 0x9E3779B97F4A7C15ULL;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
        out = (z ^ (z >> 31)) >> 56;""", "random_bytes")

    def gpu_scan(lam, u, starts):
        h = u.copy()
        scan_kernel(lam, starts, *h.shape, h, size=h.size)
        return h

    def gpu_random_bytes(shape, rng):
        seed = int(rng.integers(2 ** 63))
        return bytes_kernel(seed, size=math.prod(shape)).reshape(shape)

    return cupy, gpu_scan, gpu_random_bytes, 2 ** 26              # a GPU wants few, large products


def to_host(array):
    """The same values as a NumPy array; what is not on a GPU is returned as it is."""
    return array.get() if xp is not np and isinstance(array, xp.ndarray) else array
