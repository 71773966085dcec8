# SPDX-License-Identifier: MIT
"""The exercises and their grader first, then the tests: every derivative against central
differences, the fast against the plain, the program from end to end.

    python -m pytest -q                          the tests
    python test_lrurec.py                        the exercises, easy to hard
    python test_lrurec.py gelu > gelu.py         one of them: fill in the empty body
    python test_lrurec.py gelu --hint            its derivative, in letters
    python test_lrurec.py gelu.py scan.py        grade one file or several
    python test_lrurec.py train *.py             train a small model with your functions
    python test_lrurec.py pytorch                agreement and speed beside PyTorch

Offline, and nothing but NumPy and pytest. float64 throughout, where nothing else is said.
"""
import copy
import functools
import importlib.util
import inspect
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # small products: threads only wait

import numpy as np  # noqa: E402

import lrurec  # noqa: E402

# ---------------------------------------------------------------------------------------------
# Numbers to work on: generic, since zeros, squares and symmetry hide mistakes

def real(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def compl(*shape, seed=1):
    return real(*shape, seed=seed) + 1j * real(*shape, seed=seed + 100)


STARTS = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0], bool)
NO_WALLS = np.zeros(11, bool)


def lam_of(H, radius=0.9):
    return radius * np.exp(1j * np.linspace(0.4, 5.1, H))         # generic phases


def tiny_params(n_items=7, n_blocks=2):
    params = lrurec.init_params(n_items, 4, 5, 6, n_blocks, np.random.default_rng(1), np.float64)
    for seed, p in enumerate(params.values()):
        p += 0.3 * (compl if np.iscomplexobj(p) else real)(*p.shape, seed=seed)
    return params


def relative_error(a, n):
    scale = np.linalg.norm(a) + np.linalg.norm(n)
    return np.linalg.norm(a - n) / scale if scale > 1e-12 else np.linalg.norm(a - n)


def numeric_gradient(loss, z, delta=1e-5):
    """Central differences of loss() along every entry of z, which is changed in place and put
    back: along 1, and for a complex z along 1j too. Stored as dL/dRe + i dL/dIm."""
    grad = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        for direction in (1, 1j) if np.iscomplexobj(z) else (1,):
            old = z[index]
            z[index] = old + delta * direction
            up = loss()
            z[index] = old - delta * direction
            down = loss()
            z[index] = old
            grad[index] += direction * (up - down) / (2 * delta)
    return grad


# ---------------------------------------------------------------------------------------------
# The grader: what an answer returns beside what is expected, tensor by tensor

class Wrong(AssertionError):
    """What the grader found, in the learner's terms."""


def same(a, n, tolerance=1e-5):
    return (isinstance(a, np.ndarray) and a.shape == n.shape and a.dtype == n.dtype
            and relative_error(a, n) < tolerance)         # nan is not


def by_name(name, result, outputs):
    """What `name` returned, as a dict of tensors; a dict in it counts as its entries."""
    values = (result,) if len(outputs) == 1 else result
    if not isinstance(values, tuple) or len(values) != len(outputs):
        returned = "nothing" if result is None else f"one {type(result).__name__}"
        if isinstance(result, (tuple, list)):
            returned = f"a {type(result).__name__} of {len(result)}"
        raise Wrong(f"your {name} returned {returned}, it should return a tuple of "
                    f"{len(outputs)}: {', '.join(outputs)}")
    tensors = {}
    for key, value in zip(outputs, values):
        tensors.update(value if isinstance(value, dict) else {key: value})
    return tensors


def compare(given, expected, mistakes=(), tolerance=1e-6, note=""):
    """Raise Wrong, with a table and a hint for the first wrong tensor, where given is not as
    expected: tensors by name, in the order of the computation.

    mistakes: (hint, tensors) pairs, what usual mistakes would give, the most special first.
    """
    if given.keys() != expected.keys():
        raise Wrong(f"gradients by name. Missing: {sorted(expected.keys() - given.keys())}; "
                    f"not wanted: {sorted(given.keys() - expected.keys())}")
    wrong = [name for name, n in expected.items() if not same(given[name], n, tolerance)]
    if not wrong:
        return
    rows = [note, f"  {'tensor':26} {'shape':8} {'error':>8}"]
    for name, n in expected.items():
        a, error, verdict = given[name], "", "WRONG" if name in wrong else "ok"
        if isinstance(a, np.ndarray) and a.shape == n.shape and a.dtype == n.dtype:
            error = f"{relative_error(a, n):.1e}"
            if name in wrong:
                worst = np.unravel_index(np.argmax(abs(a - n)), n.shape)
                verdict += (f"  at {list(map(int, worst))}: yours {a[worst]:.8g}, "
                            f"expected {n[worst]:.8g}")
        rows.append(f"  {name:26} {str(n.shape):8} {error:>8}  {verdict}")
    rows.append(f"  first wrong: {wrong[0]}; what comes after may rest on it")
    rows.append(f"  hint: {hint(wrong[0], given, expected, mistakes)}")
    raise Wrong("\n".join(rows))


def hint(name, given, expected, mistakes):
    """What the difference between a tensor and what is expected looks like."""
    a, n = given[name], expected[name]
    if not isinstance(a, np.ndarray):
        return f"it should be an array; it is {'missing' if a is None else type(a).__name__}"
    general = [("it is right to 5 digits only: do not compute in float32", n)]
    general += [(f"the order: this is {other}", m) for other, m in expected.items()]
    general += [("the sign is flipped", -n), ("it is transposed", n.T),
                ("a missing conjugate: this is the conjugate of the gradient", n.conj())]
    for text, m in general:
        if same(a, m):
            return text
    if a.dtype != n.dtype:
        return f"its dtype is {a.dtype}; it should be {n.dtype}"
    if not np.isfinite(a).all():
        return "it is not finite: nan or inf"
    if not a.any():
        return "it is all zeros"
    if a.shape != n.shape:
        return f"its shape is {a.shape}; it should be {n.shape}"
    for text, tensors in mistakes:
        if same(a, tensors[name]) and not same(n, tensors[name]):
            return text
    factor = np.vdot(n, a).real / np.vdot(n, n).real
    if same(a, factor * n):
        return f"a constant factor: it is {factor:.6g} times what it should be"
    right = np.isclose(a, n, 1e-5).reshape(len(n), -1).all(1)
    return (f"no known pattern; wrong in rows {np.flatnonzero(~right).tolist()} of {len(n)}: "
            "check each term of the formula for this tensor alone")


def check(name, function, arguments, expected, outputs=None, may_change=(), note="",
          tolerance=1e-6, observed=lambda function: function):
    """Grade one call of an answer. Raises Wrong.

    outputs: what it returns, in order. observed(function): returns what function changed.
    """
    given, ours = copy.deepcopy(arguments), getattr(lrurec, name)
    before = [pickle.dumps(argument) for argument in given]
    try:
        with np.errstate(all="ignore"):
            result = observed(function)(*given)
    except Exception as error:
        raise Wrong(f"your {name} raised an error {note}") from error
    for argument, old, new in zip(inspect.signature(ours).parameters, before, given):
        if argument not in may_change and pickle.dumps(new) != old:
            raise Wrong(f"your {name} changed its argument {argument}: work on a copy")

    def tensors(result):
        return by_name(name, result, outputs or list(expected))

    def usual():
        rows = len(np.atleast_1d(given[0]))
        yield "a mean over the rows in place of their sum", {
            key: n / rows for key, n in expected.items()}
        for text, wrong in mistakes(name, arguments):
            with np.errstate(all="ignore"):
                yield text, tensors(observed(wrong)(*copy.deepcopy(arguments)))

    compare(tensors(result), expected, usual(), tolerance, note)


# ---------------------------------------------------------------------------------------------
# The usual mistakes, as wrong versions of our functions: what one of them returns gets its hint

FACTORS = [  # what may be wrong with any array that a function gets, and what it becomes by that
    ("{} is missing: this is what 1 in its place gives", np.ones_like),
    ("a missing conjugate: conj({0}) and {0} are exchanged", np.conj),
    ("the imaginary part of {} is missing", lambda z: z.real + 0 * z),
    ("the sign: this is what -{} in its place gives", np.negative)]
WALLS = [  # with starts
    ("the walls are ignored", np.zeros_like),
    ("the recurrence is missing", np.ones_like),
    ("the walls are shifted by a row", lambda starts: np.roll(starts, 1)),
    ("the walls are shifted by a row", lambda starts: np.roll(starts, -1))]
CACHES = {  # the names of what a cache holds that is no dict
    "linear_backward": ["x", "W"], "gelu_backward": ["x", "s"],
    "layer_norm_backward": ["xhat", "rstd", "scale"], "lam_backward": ["nu", "theta", "lam"],
    "cross_entropy_backward": ["exps", "sums", "targets", "weights"],
    "backward": ["items", "the dropout mask", "norm"]}


def altered(label, value, names):
    """(hint, value) pairs: value with one of the arrays in it altered in one of these ways.
    names: of the entries of a tuple or list, by its label."""
    if isinstance(value, dict):
        for key in value:
            for text, entry in altered(key, value[key], names):
                yield text, {**value, key: entry}
    elif isinstance(value, (tuple, list)):
        for i, old in enumerate(value):
            key = names[label][i] if i < len(names.get(label, [])) else f"{label}[{i}]"
            for text, entry in altered(key, old, names):
                yield text, (*value[:i], entry, *value[i + 1:])
    elif np.asarray(value).dtype.kind in "bfc":
        for text, change in WALLS if np.asarray(value).dtype == bool else FACTORS:
            yield text.format(label), change(value)


def mistakes(name, arguments):
    """(hint, wrong version of lrurec's `name`) pairs, the most special first."""
    ours = getattr(lrurec, name)
    for text, wrong in MISTAKES.get(name, []):
        yield text, functools.partial(wrong, ours)
    parameters = list(inspect.signature(ours).parameters)
    names = {"": parameters, parameters[1]: CACHES.get(name, [])}
    for text, others in altered("", arguments, names):
        yield text, lambda *_, others=others: ours(*copy.deepcopy(others))


def gelu_with(slope):
    """dx = dout (s + x slope(s) r), r the slope of s's argument."""
    def wrong(ours, dout, cache):
        x, s = cache
        r = 2 * lrurec.GELU_C * (1 + 3 * lrurec.GELU_A * x * x)
        return dout * (s + x * slope(s, r))
    return wrong


def norm_with(factor1, factor2, axis=1):
    """dx with a factor for each of its two means, taken along an axis."""
    def wrong(ours, dout, cache):
        xhat, rstd, scale = cache
        d = dout * scale
        first, second = d.mean(axis, keepdims=True), (d * xhat).mean(axis, keepdims=True)
        return rstd * (d - factor1 * first - factor2 * xhat * second), *ours(dout, cache)[1:]
    return wrong


def dlam_ignores_walls(ours, dh, lam, h, starts):
    _, g = ours(dh, lam, h, starts)
    return (h[:-1].conj() * g[1:]).sum(0), g


def with_cache(**changes):
    """Ours, given other entries in its cache, a dict; each a function of the cache."""
    def wrong(ours, dout, cache):
        return ours(dout, {**cache, **{key: change(cache) for key, change in changes.items()}})
    return wrong


def cut_ffn(cache, factor=0):
    x, W1 = cache["linear1"]
    return x, factor * W1                          # 0: nothing comes back through this branch


def cut_lru(cache, factor=0):
    x, B = cache["lru"]["in_cache"]
    return {**cache["lru"], "in_cache": (x, factor * B)}


HUGE = 1e9                        # times a branch: what is added to it no longer counts


def only_branch(**huge):
    """Below a branch, what comes back through the branch alone."""
    def wrong(ours, dout, cache):
        dx, dp = ours(dout, cache)
        huge_dx, huge_dp = with_cache(**huge)(ours, dout, cache)
        below = [name for name in dp if not same(dp[name], huge_dp[name])]
        return huge_dx / HUGE, {**dp, **{name: huge_dp[name] / HUGE for name in below}}
    return wrong


def step_with(change, *names):
    """Ours, with some parameters changed."""
    def wrong(ours, params, state, items):
        changed = {name: change(p) if name.endswith(names) else p for name, p in params.items()}
        return ours(changed, state, items)
    return wrong


def eps_in_root(ours, params, grads, opt, lr, weight_decay, betas, eps):
    ours(params, grads, opt, 0, weight_decay, betas, eps)         # the moments alone
    for name, p in params.items():
        if name.endswith(lrurec.DECAYED):
            p *= 1 - lr * weight_decay
        mhat, vhat = (opt[key][name] / (1 - beta ** opt["step"]) for key, beta in zip("mv", betas))
        p -= (lr * mhat / np.sqrt(vhat + eps)).view(p.dtype)


def adamw_at(step_of):
    """Ours, with another t."""
    def wrong(ours, params, grads, opt, *rest):
        ours(params, grads, {**opt, "step": step_of(opt["step"])}, *rest)
        opt["step"] += 1
    return wrong


def first_to_last(ours, dhidden, caches, E):
    """The two blocks go backward in the order of the forward."""
    grads = ours(dhidden, [*caches[:3], caches[4], caches[3]], E)
    for name in lrurec.BLOCK_NAMES:
        first, last = f"blocks.0.{name}", f"blocks.1.{name}"
        grads[first], grads[last] = grads[last], grads[first]
    return grads


def lost_items(ours, dhidden, caches, E):
    grads = ours(dhidden, caches, E)
    dx = ours(dhidden, [np.arange(len(dhidden)), *caches[1:]], dhidden)["item_embedding"]
    grads["item_embedding"][caches[0]] = dx        # row by row: the last one stays
    return grads


MISTAKES = {  # function -> (hint, wrong version, which is given ours first), most special first
    "gelu_backward": [
        ("the slope of s is s (1 - s), not 1 - s^2: s is a sigmoid, no tanh",
         gelu_with(lambda s, r: (1 - s * s) * r)),
        ("s is not constant: x times its slope is missing", gelu_with(lambda s, r: 0)),
        ("the product rule's other term, s itself, is missing",
         lambda ours, dout, cache: ours(dout, cache) - dout * cache[1]),
        ("the chain rule: the slope of the sigmoid's argument is missing",
         gelu_with(lambda s, r: s * (1 - s))),
        ("a factor 2: s is the sigmoid of 2y, not of y",
         gelu_with(lambda s, r: s * (1 - s) * r / 2))],
    "layer_norm_backward": [
        ("both means are missing", norm_with(0, 0)),
        ("the first mean is missing: x moves the mean too", norm_with(0, 1)),
        ("the second mean is missing: x moves rstd too", norm_with(1, 0)),
        ("sums in place of means", norm_with(6, 6)),
        ("the means go along each row (axis 1), not over the rows", norm_with(1, 1, axis=0))],
    "cross_entropy_backward": [
        ("the one-hot target is missing",
         lambda ours, dloss, cache: dloss * (cache[3] / cache[1])[:, None] * cache[0])],
    "lam_backward": [
        ("real and imaginary part are exchanged",
         lambda ours, dlam, cache: ours(1j * dlam, cache))],
    "scan_backward": [
        ("the walls are ignored in dlam", dlam_ignores_walls),
        ("dlam takes h of the row before, h_{n-1}", lambda ours, dh, lam, h, starts:
            ours(dh, lam, np.roll(h, -1, 0), starts))],
    "lru_backward": [
        ("the factor gamma is missing: the gradient is by gamma_log",
         with_cache(u=lambda cache: cache["u"] / cache["gamma"])),
        ("gamma counts twice: du belongs here, not dz",
         with_cache(u=lambda cache: cache["u"] * cache["gamma"])),
        ("u belongs here, not h", with_cache(u=lambda cache: cache["h"]))],
    "block_backward": [
        ("gelu_backward is missing", with_cache(gelu=lambda cache: (0, 1))),
        ("a residual: what comes back through the feed-forward branch is missing",
         with_cache(linear1=cut_ffn)),
        ("a residual: what passes by the feed-forward branch is missing",
         only_branch(linear1=lambda cache: cut_ffn(cache, HUGE))),
        ("a residual: what comes back through the LRU branch is missing", with_cache(lru=cut_lru)),
        ("a residual: what passes by the LRU branch is missing",
         only_branch(lru=lambda cache: cut_lru(cache, HUGE)))],
    "adamw_update": [
        ("this is not changed in place: p -= ..., not p = ...", lambda ours, *arguments: None),
        ("this parameter should decay", lambda ours, p, grads, opt, lr, weight_decay, *rest:
            ours(p, grads, opt, lr, 0, *rest)),
        ("the argument eps is not used", lambda ours, p, grads, opt, lr, weight_decay, betas, eps:
            ours(p, grads, opt, lr, weight_decay, betas)),
        ("t is counted late: it is 1 in the first step", adamw_at(lambda t: t - 1)),
        ("the bias correction is missing", adamw_at(lambda t: 10 ** 9)),
        ("eps stands outside the root: sqrt(vhat) + eps", eps_in_root)],
    "step": [
        ("the old state is missing", lambda ours, p, state, items: ours(p, 0 * state, items)),
        ("gamma is missing", step_with(np.zeros_like, "gamma_log")),
        ("a residual: x is missing beside what the LRU gives",
         step_with(lambda p: HUGE * p, ".C", ".b_C")),
        ("a residual: x is missing beside what the feed-forward gives",
         step_with(lambda p: HUGE * p, ".W2", ".b2"))],
    "backward": [
        ("the blocks go backward from the last to the first", first_to_last),
        ("an item that occurs twice gets the sum of its rows' gradients; dE[items] += dx keeps "
         "one of them", lost_items)],
}


# ---------------------------------------------------------------------------------------------
# One grader for each function that is asked for; it raises Wrong

def grade_backward(name, forward, inputs, function, more=(), **options):
    """Grade by central differences of a random projection of forward() -> out, cache.

    inputs: arrays, which forward works on, by their gradients' names; more: arguments.
    """
    out, cache = forward()
    dout = (compl if np.iscomplexobj(out) else real)(*np.shape(out), seed=9)

    def loss():
        return np.sum(np.conj(dout) * forward()[0]).real

    expected = {key: numeric_gradient(loss, z) for key, z in inputs.items()}
    check(name, function, (dout, cache, *more), expected, **options)


def layer(name, **inputs):
    """The grader of a layer's backward function."""
    forward = getattr(lrurec, name.replace("backward", "forward"))
    return functools.partial(grade_backward, name, lambda: forward(*inputs.values()),
                             {"d" + key: z for key, z in inputs.items()})


def grade_dropout(function):
    for p in (0.4, 0):
        x = real(5, 6)

        def forward():
            return lrurec.dropout_forward(x, p, np.random.default_rng(3))
        grade_backward("dropout_backward", forward, {"dx": x}, function,
                       note=f"for p = {p}; with p = 0 the mask is None")


def grade_cross_entropy(function):
    targets, weights = np.array([1, 4, 0, 2, 3]), np.array([0.5, 0.2, 0.0, 0.3, 0.7])
    logits = 3 * real(5, 6)

    def forward():
        return lrurec.cross_entropy_forward(logits.copy(), targets, weights)
    grade_backward("cross_entropy_backward", forward, {"dlogits": logits}, function,
                   may_change=["cache"])


def walls_of(starts):
    return f"walls before rows {np.flatnonzero(starts).tolist()} of {len(starts)}"


def grade_scan(function):
    """Any N, any walls, any |lam|."""
    for N in (11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 100, 700):
        for p_wall, radius in itertools.product((0.3, 0, 1), (0.9, 0.3, 0.9999)):
            starts = np.random.default_rng(N).random(N) < p_wall
            lam, u = lam_of(5, radius), compl(N, 5)
            check("scan", function, (lam, u, starts), {"h": lrurec.scan_loop(lam, u, starts)},
                  note=f"for |lam| = {radius}, {walls_of(starts)}", tolerance=1e-12)
    grade_speed("scan", function, lrurec.scan_loop,
                (lam_of(1), compl(20_000, 1), np.zeros(20_000, bool)))


def grade_speed(name, function, loop, arguments):
    """O(log N) array operations take a fiftieth of the loop's time."""
    def seconds(function):
        begin = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - begin

    yours, slow = min(seconds(function) for _ in range(3)), seconds(loop)
    if yours > slow / 4:
        raise Wrong(f"your {name} gives the right values, but it is as slow as a loop over the "
                    f"rows: {1000 * yours:.0f} ms for N = 20,000, where the loop takes "
                    f"{1000 * slow:.0f} ms. The exercise asks for O(log N) array operations")


def grade_scan_backward(function):
    lam = lam_of(4)
    for N in (11, 1, 2, 64):
        starts = STARTS if N == 11 else np.random.default_rng(N).random(N) < 0.3
        dh, h = compl(N, 4), lrurec.scan_loop(lam, compl(N, 4, seed=2), starts)
        dlam, du = lrurec.scan_backward_loop(dh, lam, h, starts)
        check("scan_backward", function, (dh, lam, h, starts), {"du": du, "dlam": dlam},
              ["dlam", "du"], note=walls_of(starts), tolerance=1e-12)
    grade_speed("scan_backward", function, lrurec.scan_backward_loop,
                (compl(20_000, 1), lam_of(1), compl(20_000, 1), np.zeros(20_000, bool)))


def grade_lru(function):
    D, H = 3, 4
    inputs = {"dx": real(11, D), "dnu_log": real(H) - 1, "dtheta_log": real(H, seed=3),
              "dgamma_log": real(H, seed=4), "dB": compl(D, H), "db_B": compl(H),
              "dC": compl(H, D), "db_C": real(D)}
    order = ["dC", "db_C", "dgamma_log", "dB", "db_B", "dx", "dnu_log", "dtheta_log"]
    grade_backward("lru_backward", lambda: lrurec.lru_forward(*inputs.values(), STARTS),
                   {key: inputs[key] for key in order}, function, outputs=list(inputs),
                   note=walls_of(STARTS))


BLOCK_ORDER = ["ffn_norm.scale", "ffn_norm.shift", "ffn.W2", "ffn.b2", "ffn.W1", "ffn.b1",
               "lru_norm.scale", "lru_norm.shift", "lru.C", "lru.b_C", "lru.gamma_log", "lru.B",
               "lru.b_B", "lru.nu_log", "lru.theta_log"]          # of the backward pass


def grade_block(function):
    p, x = lrurec.blocks(tiny_params(n_blocks=1))[0], real(11, 4)
    inputs = {name: p[name] for name in BLOCK_ORDER}
    for dropout in (0.3, 0.0):
        def forward():
            return lrurec.block_forward(x, p, STARTS, dropout, np.random.default_rng(2))
        grade_backward("block_backward", forward, {**inputs, "dx": x}, function,
                       outputs=["dx", "dp"], note=f"with dropout {dropout}")


def grade_model(function):
    params, items = tiny_params(), np.random.default_rng(4).integers(0, 8, 11)
    order = [f"blocks.{k}.{name}" for k in (1, 0) for name in BLOCK_ORDER]
    order += ["embedding_norm.scale", "embedding_norm.shift", "item_embedding"]
    for dropout in (0.3, 0.0):
        def forward():
            return lrurec.forward(params, items, STARTS, dropout, np.random.default_rng(6))
        grade_backward("backward", forward, {name: params[name] for name in order}, function,
                       [params["item_embedding"]], outputs=["grads"],
                       note=f"with dropout {dropout}, items {items.tolist()}")


def adamw_observed(function):
    """function, returning what it should have changed: the arrays that it was given."""
    def update(params, grads, opt, *rest):
        tensors = {**{f"m: {name}": m for name, m in opt["m"].items()},
                   **{f"v: {name}": v for name, v in opt["v"].items()}, **params}
        function(params, grads, opt, *rest)
        return {"step": np.array([opt["step"]]), **tensors}
    return update


def grade_adamw(function):
    """A later step and the first one, with an eps and betas that are not the usual ones."""
    for steps_before in (2, 0):
        params = {"output_bias": real(2), "item_embedding": real(2, 2), "blocks.0.lru.b_B":
                  compl(2), "blocks.0.lru.B": compl(1, 2)}
        grads = {name: p[::-1] + 1 for name, p in params.items()}
        opt = lrurec.adamw_init(params)
        arguments = (params, grads, opt, 0.1, 0.5, (0.8, 0.95), 0.1)
        for _ in range(steps_before):
            lrurec.adamw_update(*arguments)
            grads.update({name: 2 * g * g for name, g in grads.items()})
        expected = adamw_observed(lrurec.adamw_update)(*copy.deepcopy(arguments))
        check("adamw_update", function, arguments, expected, ["params"], ["params", "opt"],
              f"in step {steps_before + 1}", 1e-12, adamw_observed)


def grade_step(function):
    """One event at a time, for two users, gives what encode gives for their histories."""
    params, items = tiny_params(), np.random.default_rng(2).integers(0, 8, (11, 2))
    state = lrurec.init_state(params, 2)
    for n in range(11):
        users = [lrurec.encode(params, items[:n + 1, user], NO_WALLS[:n + 1], return_state=True)
                 for user in (0, 1)]
        hidden = np.stack([rows[-1] for rows, _ in users])
        new_state = np.concatenate([last for _, last in users], 1)
        check("step", function, (params, state, items[n]), {"state": new_state, "hidden": hidden},
              ["hidden", "state"], note=f"at event {n} of two users")
        state = new_state


GRADERS = {  # function -> its grader, which takes an answer
    "linear_backward": layer("linear_backward", x=real(5, 3), W=real(3, 4), b=real(4)),
    "gelu_backward": layer("gelu_backward", x=2 * real(6, 5)),
    "layer_norm_backward": layer("layer_norm_backward", x=real(5, 6), scale=real(6),
                                 shift=real(6, seed=2)),
    "dropout_backward": grade_dropout,
    "cross_entropy_backward": grade_cross_entropy,
    "complex_in_backward": layer("complex_in_backward", x=real(5, 3), B=compl(3, 4), b=compl(4)),
    "complex_out_backward": layer("complex_out_backward", h=compl(5, 4), C=compl(4, 3), b=real(3)),
    "lam_backward": layer("lam_backward", nu_log=real(5), theta_log=real(5, seed=2)),
    "scan": grade_scan, "scan_backward": grade_scan_backward, "lru_backward": grade_lru,
    "block_backward": grade_block, "adamw_update": grade_adamw, "step": grade_step,
    "backward": grade_model}

# ---------------------------------------------------------------------------------------------
# The exercises

def layers(*names):
    return [name + end for name in names for end in ("_forward", "_backward")]


EXERCISES = {  # easy to hard: name -> functions shown whole, functions to write, what these may use
    "linear": (["linear_forward"], ["linear_backward"], []),
    "gelu": (["gelu_forward"], ["gelu_backward"], ["GELU_C", "GELU_A"]),
    "layer_norm": (["layer_norm_forward"], ["layer_norm_backward"], ["row_mean"]),
    "dropout": (["dropout_forward"], ["dropout_backward"], ["_random_bytes"]),
    "cross_entropy": (["cross_entropy_forward"], ["cross_entropy_backward"], []),
    "complex_linear": (["complex_in_forward", "complex_out_forward"],
                       ["complex_in_backward", "complex_out_backward"],
                       ["real_view", *layers("linear")]),
    "lam": (["lam_forward"], ["lam_backward"], []),
    "scan": (["scan_loop"], ["scan"], []),
    "scan_backward": (["scan_loop"], ["scan_backward"], ["scan"]),
    "lru": (["lru_forward"], ["lru_backward"],
            [*layers("lam", "complex_in", "complex_out"), "scan", "scan_backward"]),
    "block": (["block_forward"], ["block_backward"],
              ["LRU_NAMES", "BLOCK_NAMES",
               *layers("linear", "gelu", "layer_norm", "dropout", "lru")]),
    "adamw": (["adamw_init"], ["adamw_update"], ["real_view", "DECAYED"]),
    "step": (["lru_forward", "block_forward", "init_state"], ["step"],
             ["blocks", "as_ids", "LRU_NAMES", "lam_forward", "complex_in_forward", "scan",
              "complex_out_forward", "linear_forward", "gelu_forward", "dropout_forward",
              "layer_norm_forward"]),
    "model": (["forward"], ["backward"],
              ["blocks", "BLOCK_NAMES", *layers("block", "layer_norm", "dropout")]),
}

NOTES = """Sizes: N rows of a batch, V items, D model width, H complex state width, F feed-forward
width, K blocks. dname is the gradient of the loss L by name. Rows count from 0. xp is NumPy (or
CuPy): use it or np, as you like.

Walls: the rows of all users stand one after another, and where starts[n] is True the state is
zero before row n. A wall always stands before row 0, whatever starts[0] says.

Complex numbers: dz = dL/d(Re z) + i dL/d(Im z) for a complex z; no factor 2. Where z changes by a
small c, L changes by Re(conj(dz) c). So z = a w gives dw = conj(a) dz. The gradient of a real array
is real.
"""
IDEAS = {  # the hints that are no "Derivative:" in lrurec's docstrings
    "adamw_update": """With t = 1 in the first step, for each parameter p and its gradient g:
m <- beta1 m + (1 - beta1) g         mhat = m / (1 - beta1^t)
v <- beta2 v + (1 - beta2) g^2       vhat = v / (1 - beta2^t)
p <- p (1 - lr weight_decay) where its name ends with one of DECAYED, then
p <- p - lr mhat / (sqrt(vhat) + eps)""",
    "step": """The lines of forward and block_forward, for one row of each user, without dropout.
Only the scan looks at other rows: in its place stands one step of the recurrence,
new_state[k] = lam * state[k] + u, and the new state is the h of the lines after it."""}


def split_docstring(name):
    """The docstring of lrurec's `name` -> what a learner is told, what a hint tells."""
    doc = inspect.getdoc(getattr(lrurec, name))
    told, _, withheld = doc.partition("\n\n" if name == "scan" else "\nDerivative: ")
    return told.strip(), IDEAS.get(name, withheld)


def signature(name):
    return f"{name}{inspect.signature(getattr(lrurec, name))}"


def described(name):
    """A name of lrurec as a comment: what it takes and returns, or its value."""
    value = getattr(lrurec, name)
    text = textwrap.fill(f"{name} = {value!r}", 96, subsequent_indent="    ")
    if inspect.isfunction(value):
        text = f"{signature(name)}\n" + textwrap.indent(split_docstring(name)[0], "    ")
    return textwrap.indent(text, "# ", lambda line: True)


def write_exercise(exercise):
    """The text of an exercise file."""
    shown, asked, helpers = EXERCISES[exercise]
    parts = [f'"""Exercise {exercise}: write {" and ".join(asked)}.\n\n'
             f"    python test_lrurec.py {exercise}.py          grades it\n"
             f"    python test_lrurec.py {exercise} --hint      shows how, in letters\n\n"
             f'{NOTES}"""\nimport math\n\nimport numpy as np\n\nxp = np']
    for name in helpers:
        parts.append(f"from lrurec import {name}\n{described(name)}")
    for name in shown:
        parts.append("\n" + inspect.getsource(getattr(lrurec, name)).rstrip())
    for name in asked:
        doc = textwrap.indent(split_docstring(name)[0], "    ").strip()
        parts.append(f'\ndef {signature(name)}:\n    """{doc}\n    """\n    # your lines here\n')
    return "\n\n".join(parts)


def write_hint(exercise):
    return "".join(f"{name}: {split_docstring(name)[1]}\n\n" for name in EXERCISES[exercise][1])


# ---------------------------------------------------------------------------------------------
# Files of answers, and the commands

TIME_LIMIT = 60                   # seconds for one file
RIGHT, WRONG = 40, 41             # exit codes that neither a crash nor a sys.exit(0) gives


def import_file(name, path):
    """A module of its own: of lrurec a copy, whose functions can be replaced in it alone."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_answers(path):
    """The functions in a file that exercises ask for, by name."""
    module, answers = import_file("answers", path), {}
    for name in GRADERS:
        value = getattr(module, name, None)
        if value is not getattr(lrurec, name):
            if callable(value):
                answers[name] = value
        elif f"\ndef {name}(" in inspect.getsource(module):
            raise Wrong(f"your {name} is replaced by an import of {name} that stands below it: "
                        "remove that import")
    if not answers:
        raise Wrong("no function of an exercise; python test_lrurec.py lists them")
    return answers


def describe(error, paths):
    """What was found, or what was raised, with the last line in the learner's files."""
    text, absolute = f"{type(error).__name__}: {error}", [os.path.abspath(path) for path in paths]
    if isinstance(error, Wrong):
        return f"{error}\n  {describe(error.__cause__, paths)}" if error.__cause__ else str(error)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.abspath(frame.filename) in absolute:
            where = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
            return f"{where}: {frame.line}\n  {text}"
    return text                                    # a SyntaxError names its line itself


def grade_here(path):
    """Grade every answer in a file, in this process -> RIGHT or WRONG."""
    code = RIGHT
    try:
        answers = load_answers(path)
    except (Exception, SystemExit) as error:
        print(f"{path}: {describe(error, [path])}")
        return WRONG
    for name, function in answers.items():
        try:
            GRADERS[name](function)
            found = "right"
        except (Exception, SystemExit) as error:
            code, found = WRONG, f"WRONG: {describe(error, [path])}"
        print(f"{path}: {name}: {found}")
    return code


def grade_file(path):
    """Grade a file in a process of its own, which nothing in the file can keep from ending ->
    whether all is right."""
    try:
        done = subprocess.run([sys.executable, __file__, "--here", path], timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        print(f"{path}: did not end within {TIME_LIMIT} seconds: is there a loop without an end?")
        return False
    if done.returncode not in (RIGHT, WRONG):
        print(f"{path}: ended Python itself (exit code {done.returncode}), so it was not graded")
    return done.returncode == RIGHT


RECALL, N_ITEMS = 3, 5            # the task: which of 5 items came 3 steps ago


def recall_batch(rng, users=32, length=32):
    items = rng.integers(1, N_ITEMS + 1, (users, length))
    targets = np.zeros_like(items)                 # 0: nothing to recall yet
    targets[:, RECALL:] = items[:, :-RECALL]
    starts = np.arange(items.size) % length == 0
    return items.ravel(), targets.ravel(), starts


def train_recall(L, steps=90):
    """Train a small model with the functions of L, and print what it learns."""
    import train
    rng = np.random.default_rng(0)
    params = L.init_params(N_ITEMS, 16, n_blocks=1, rng=rng, dtype=np.float64)
    opt, disks = L.adamw_init(params), []
    print(f"Recall the item of {RECALL} steps ago, one of {N_ITEMS}. A model without memory cannot "
          f"get below log {N_ITEMS} = {np.log(N_ITEMS):.3f}.\n\nstep    loss")
    for n in range(steps + 1):
        if n in (0, steps):
            p = L.blocks(params)[0]
            disks.append(train.disk(L.lam_forward(p["lru.nu_log"], p["lru.theta_log"])[0]))
        loss, grads = L.loss_and_grads(params, *recall_batch(rng), 0.0, rng)
        L.clip_gradients(grads, 5.0)
        L.adamw_update(params, grads, opt, 1e-2, 0.01)
        if n % 10 == 0:
            print(f"{n:4d}  {loss:6.3f}  {'#' * round(20 * float(loss))}", flush=True)
    print(f"\n{'eigenvalues before':44}and after")
    for before, after in zip(*disks):
        print(f"{before:44}{after}")
    items, targets, _ = recall_batch(rng, users=1, length=100 + RECALL)
    state, right = L.init_state(params), 0
    for item, target in zip(items, targets):
        hidden, state = L.step(params, state, np.array([item]))
        right += target > 0 and L.score(params, hidden).argmax() == target
    print(f"\nOne event at a time, with step: {right} of 100 recalled")


def train_with(paths):
    """The reward: train_recall with the answers of all files in place of lrurec's functions."""
    L, answers = import_file("lrurec_with_answers", lrurec.__file__), {}
    try:
        for path in paths:
            answers.update(load_answers(path))
        for name, function in answers.items():
            setattr(L, name, function)
            for other in answers.keys() & function.__globals__.keys():
                function.__globals__[other] = answers[other]      # answers call one another
        print(f"Your functions: {', '.join(answers) or 'none, these are ours'}\n")
        train_recall(L)
    except (Exception, SystemExit) as error:
        print(describe(error, paths), file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------------------------------------
# For those who know PyTorch: the same model, forward only, in the same letters

def torch_loss(params, items, targets, starts, scan, dropout=0.0):
    """params, items, targets, starts as torch tensors -> logits (N, V+1), loss"""
    import torch
    import torch.nn.functional as F

    def norm(x, name):
        return F.layer_norm(x, x.shape[1:], params[name + ".scale"], params[name + ".shift"])

    x = norm(F.dropout(params["item_embedding"][items], dropout), "embedding_norm")
    for k in range(sum(name.endswith("nu_log") for name in params)):
        nu_log, theta_log, gamma_log, B, b_B, C, b_C, _, _, W1, b1, W2, b2, _, _ = (
            params[f"blocks.{k}.{name}"] for name in lrurec.BLOCK_NAMES)
        lam = torch.exp(torch.complex(-torch.exp(nu_log), torch.exp(theta_log)))
        # x B and Re(h C), as real products: faster than complex ones
        z = (x @ torch.view_as_real(B).flatten(1)).unflatten(1, (-1, 2))
        u = torch.exp(gamma_log) * (torch.view_as_complex(z) + b_B)
        h = scan(lam, u, starts)
        C = torch.stack([C.real, -C.imag], 1).flatten(0, 1)
        y = torch.view_as_real(h).flatten(1) @ C + b_C
        x = norm(x + F.dropout(y, dropout), f"blocks.{k}.lru_norm")
        y = F.dropout(F.gelu(x @ W1 + b1, approximate="tanh"), dropout) @ W2 + b2
        x = norm(x + F.dropout(y, dropout), f"blocks.{k}.ffn_norm")
    logits = x @ params["item_embedding"].T + params["output_bias"]
    return logits, F.cross_entropy(logits, targets, ignore_index=0)


def torch_scan_loop(lam, u, starts):
    import torch
    h = [u[0]]
    for n in range(1, len(u)):
        h.append(u[n] if starts[n] else lam * h[-1] + u[n])
    return torch.stack(h)


def torch_scan():
    """lrurec's scan and scan_backward as a function of torch.autograd, on the same memory."""
    import torch

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lam, u, starts):
            h = torch.from_numpy(lrurec.scan(lam.numpy(), u.numpy(), starts.numpy()))
            ctx.save_for_backward(lam, h, starts)
            return h

        @staticmethod
        def backward(ctx, dh):
            lam, h, starts = (z.numpy() for z in ctx.saved_tensors)
            dlam, du = lrurec.scan_backward(dh.resolve_conj().numpy(), lam, h, starts)
            return torch.from_numpy(dlam), torch.from_numpy(du), None

    return Scan.apply


def torch_differences(scan):
    """{name: relative difference} of logits, loss and every gradient, in float64."""
    import torch
    params, rng = tiny_params(), np.random.default_rng(4)
    items, targets = rng.integers(0, 8, 11), rng.integers(0, 8, 11)
    tensors = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    logits, loss = torch_loss(tensors, *map(torch.tensor, (items, targets, STARTS)), scan)
    loss.backward()
    our_loss, grads = lrurec.loss_and_grads(params, items, targets, STARTS)
    our_logits = lrurec.score(params, lrurec.encode(params, items, STARTS))
    pairs = {"logits": (our_logits[:, 1:], logits.detach().numpy()[:, 1:]),
             "loss": (our_loss, loss.item())}
    pairs |= {f"gradient of {name}": (g, tensors[name].grad.numpy()) for name, g in grads.items()}
    return {name: relative_error(ours, theirs) for name, (ours, theirs) in pairs.items()}


def median_ms(take_step, batches):
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        take_step(*batch)
        seconds.append(time.perf_counter() - begin)
    return 1000 * np.median(seconds[1:])           # the first one warms up


def numpy_step(params):
    import train
    opt, config = lrurec.adamw_init(params), {**train.DEFAULTS, "dropout": 0.2, "seed": 0}
    pool = ThreadPoolExecutor(config["threads"])

    def take_step(*batch):
        _, grads = train.gradients(pool, params, batch, config, opt["step"])
        lrurec.clip_gradients(grads, 5.0)
        lrurec.adamw_update(params, grads, opt, 1e-3, 0.01)
    return take_step


def torch_step(params):
    import torch
    params = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.01, eps=1e-9)
    scan = torch_scan()

    def take_step(*batch):
        optimizer.zero_grad()
        torch_loss(params, *map(torch.tensor, batch), scan, dropout=0.2)[1].backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 5.0)
        optimizer.step()
    return take_step


def compare_with_pytorch():
    """Print how well lrurec and PyTorch agree, and the time of a step of each."""
    if not importlib.util.find_spec("torch"):
        print("PyTorch is not installed: python -m pip install torch")
        return 1
    import torch
    import data as reader
    import train
    print(f"PyTorch {torch.__version__}, NumPy {np.__version__}, float64: relative differences")
    for name, difference in torch_differences(torch_scan_loop).items():
        print(f"  {name:40} {difference:.1e}")
    threads, rng = train.DEFAULTS["threads"], np.random.default_rng(0)
    torch.set_num_threads(threads)
    dataset = reader.load_dataset("ml-100k")
    params = lrurec.init_params(len(dataset.item_ids) - 1, rng=rng)
    batches = list(reader.batches(reader.training_rows(dataset, 200), 128, rng))[:7]
    print(f"\nML-100K, batches of 128 windows of 200, dropout 0.2, float32, {threads} threads: "
          "ms a step\n  NumPy  PyTorch  ratio")
    for _ in range(3):                             # by turns: other programs disturb both
        ours = median_ms(numpy_step(copy.deepcopy(params)), batches)
        theirs = median_ms(torch_step(params), batches)
        print(f"  {ours:5.0f}  {theirs:7.0f}  {theirs / ours:5.2f}", flush=True)
    return 0


def exercise_main(arguments):
    """Run a command of this file -> exit code."""
    command, *rest = arguments or ["list"]
    if command == "list":
        print("Exercises, easy to hard. python test_lrurec.py gelu > gelu.py writes one, and\n"
              "python test_lrurec.py gelu.py grades it.\n")
        for name, (_, asked, _) in EXERCISES.items():
            print(f"  {name:15} {', '.join(asked)}")
        return 0
    if command == "pytorch":
        return compare_with_pytorch()
    if command == "--here":
        return grade_here(rest[0])
    if command in EXERCISES and rest in ([], ["--hint"]):
        print(write_hint(command) if rest else write_exercise(command), end="")
        return 0
    files = rest if command == "train" else arguments
    for path in files:
        if not (path.endswith(".py") and os.path.isfile(path)):
            print(f"test_lrurec.py: {path!r} is neither an exercise nor a .py file; the exercises: "
                  f"{', '.join(EXERCISES)}", file=sys.stderr)
            return 2
    if command == "train":
        return train_with(files)
    return int(not all([grade_file(path) for path in files]))


if __name__ == "__main__":
    sys.exit(exercise_main(sys.argv[1:]))

# ---------------------------------------------------------------------------------------------
# Below are the tests; the exercises above need neither pytest nor the other files

import errno  # noqa: E402
import gzip  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import tracemalloc  # noqa: E402
import zipfile  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

import data as reader  # noqa: E402
import train  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))


def run(*arguments):
    return train.main([str(a) for a in arguments])


@pytest.fixture
def refused(capsys):
    """As run, where the program is to refuse: exit code 2 -> the one line that it says."""
    def run_refused(*arguments):
        capsys.readouterr()
        code, error = run(*arguments), capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error[:-1].isprintable(), (code, error)
        return error
    return run_refused


def python(*arguments):
    """What subprocess needs to run one of our programs."""
    return {"args": [sys.executable, *map(str, arguments)], "cwd": HERE}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


TINY = ["--d-model", "8", "--batch-size", "8", "--lr", "0.02", "--dropout", "0.1", "--seed", "3"]


def tiny_run(folder, users=30, items=14):
    """Flags of a run that takes a tenth of a second. Its users walk round a ring of items: the
    next item is the one after, most of the time."""
    rng, lines = np.random.default_rng(0), ["user,item,time"]
    for u in range(users):
        item = rng.integers(items)
        for t in range(12):
            item = (item + (1 if rng.random() < 0.9 else 5)) % items
            lines.append(f"u{u},i{item},{t}")
    return ["--data", write(folder / "toy.csv", "\n".join(lines)), *TINY]


@pytest.fixture
def tiny(tmp_path):
    return tiny_run(tmp_path)


def report_in(folder):
    return json.loads((folder / "metrics.json").read_text())


def zip_of(files):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive


def dataset(items, offsets, V):
    ids, users = ["", *map(str, range(1, V + 1))], [str(u) for u in range(len(offsets) - 1)]
    return reader.Dataset("toy", np.array(items), np.array(offsets), users, ids, ids, "digest")


def scrambled(content, rng):
    """Some bytes changed, lost or new; at times without its end."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        k = rng.integers(len(content))
        content[k:k + rng.integers(0, 3)] = rng.bytes(int(rng.integers(0, 4)))
    return bytes(content[:rng.integers(len(content)) if rng.random() < 0.2 else None])


# ---------------------------------------------------------------------------------------------
# Derivatives, and the grader itself

@pytest.mark.parametrize("name", GRADERS)
def test_graded(name):
    GRADERS[name](getattr(lrurec, name))


def test_the_backward_loop_is_the_gradient_of_the_loop():
    lam, u, dh = lam_of(4), compl(11, 4), compl(11, 4, seed=5)
    expected = [numeric_gradient(
        lambda: np.sum(dh.conj() * lrurec.scan_loop(lam, u, STARTS)).real, z) for z in (lam, u)]
    given = lrurec.scan_backward_loop(dh, lam, lrurec.scan_loop(lam, u, STARTS), STARTS)
    compare(dict(enumerate(given)), dict(enumerate(expected)))


@pytest.mark.parametrize("rows", [1, 10, 256])
def test_the_loss_in_chunks(rows, monkeypatch):
    inputs = {"hidden": real(37, 3), "E": real(6, 3), "output_bias": real(6)}
    targets = np.random.default_rng(0).integers(0, 6, 37)
    monkeypatch.setattr(lrurec, "ROWS_PER_CHUNK", rows)
    _, *given = lrurec.output_loss(*inputs.values(), targets)
    expected = {name: numeric_gradient(
        lambda: lrurec.output_loss(*inputs.values(), targets)[0], z) for name, z in inputs.items()}
    compare(dict(zip(inputs, given)), expected)


def test_adamw_by_hand():
    params = {"item_embedding": real(3), "output_bias": real(3), "blocks.0.lru.b_B": compl(2)}
    expected = {name: lrurec.real_view(p).copy() for name, p in params.items()}
    opt, m, v = lrurec.adamw_init(params), dict.fromkeys(params, 0), dict.fromkeys(params, 0)
    for t in range(1, 21):
        grads = {name: np.cos(t * p) for name, p in params.items()}
        lrurec.adamw_update(params, grads, opt, 0.1, 0.5)
        for name in params:
            g = lrurec.real_view(grads[name])      # a complex number is two real ones
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g ** 2
            root = np.sqrt(v[name] / (1 - 0.999 ** t)) + 1e-9
            kept = 0.95 if name == "item_embedding" else 1
            expected[name] = kept * expected[name] - 0.1 * m[name] / (1 - 0.9 ** t) / root
        compare({name: lrurec.real_view(p) for name, p in params.items()}, expected,
                tolerance=1e-12)


def double_first(ours, *arguments):
    arguments[0].__imul__(2)
    return ours(*arguments)


def with_mistake(text):
    """Ours, with one of the usual mistakes."""
    def wrong(ours, *arguments):
        return dict(mistakes(ours.__name__, arguments))[text](*arguments)
    return wrong


LINEAR, BLOCK = "linear_backward", "block_backward"
WRONG_VERSIONS = [  # function, a wrong version of it, which is given ours first, part of the hint
    (LINEAR, lambda ours, *a: None, "returned nothing, it should return a tuple of 3: dx, dW, db"),
    (LINEAR, lambda ours, *a: ours(*a)[:2], "returned a tuple of 2, it should return a tuple of 3"),
    (LINEAR, lambda ours, *a: list(ours(*a)), "returned a list of 3, it should return a tuple"),
    (LINEAR, lambda ours, d, c: (*ours(d, c)[:2], d.sum(0)[:, None]), "its shape is (4, 1)"),
    (LINEAR, lambda ours, d, c: (ours(d, c)[0], d.T @ c[0], d.sum(0)), "it is transposed"),
    (LINEAR, lambda ours, d, c: (ours(d, c)[1], d @ c[1].T, d.sum(0)), "the order: this is dW"),
    (LINEAR, lambda ours, d, c: (*ours(d, c)[:2], None), "it is missing"),
    (LINEAR, lambda ours, d, c: (*ours(d, c)[:2], d.mean(0)), "a mean over the rows in place of"),
    (LINEAR, lambda ours, d, c: ours(-d, c), "the sign is flipped"),
    (LINEAR, lambda ours, d, c: ours(0 * d, c), "all zeros"),
    (LINEAR, lambda ours, d, c: ours(d * np.nan, c), "not finite: nan or inf"),
    (LINEAR, lambda ours, d, c: (*ours(d, c)[:2], d.sum(0).astype("f4")), "its dtype is float32"),
    (LINEAR, double_first, "changed its argument dout"),
    (LINEAR, lambda ours, d, c: ours(d, (c[0], c[1] ** 2)), "pattern; wrong in rows [0, 1, 2, 3"),
    ("gelu_backward", lambda ours, d, c: ours(d, c) * 3, "3 times what it should be"),
    ("gelu_backward", lambda ours, d, c: (ours(d, c),), "it should be an array; it is tuple"),
    ("dropout_backward", lambda ours, d, mask: d * mask, "with p = 0 the mask is None"),
    ("complex_in_backward", lambda ours, d, c: (ours(d, c)[0] + 0j, *ours(d, c)[1:]),
     "its dtype is complex128; it should be float64"),
    ("complex_in_backward", lambda ours, d, c: (ours(d, c)[0], *ours(d.conj(), c)[1:]),
     "first wrong: dB; what comes after may rest on it\n  hint: a missing conjugate"),
    ("complex_out_backward", lambda ours, d, c: (ours(d, c)[0].conj(), *ours(d, c)[1:]),
     "a missing conjugate"),
    ("lam_backward", lambda ours, dlam, c: ours(dlam, c)[::-1], "the order: this is dtheta_log"),
    ("scan", lambda ours, *a: lrurec.scan_loop(*a), "right values, but it is as slow as a loop"),
    ("scan", lambda ours, *a: lrurec.scan_recursive(*a), "but it is as slow as a loop"),
    ("scan", lambda ours, lam, u, s: ours(lam, u[:8], s), "raised an error for |lam| = 0.9, walls"),
    ("scan_backward", lambda ours, *a: ours(*a)[0], "one ndarray, it should return a tuple of 2"),
    ("scan_backward", lambda ours, *a: lrurec.scan_backward_loop(*a), "as slow as a loop"),
    (BLOCK, lambda ours, *a: (ours(*a)[0], {}), "Missing: ['ffn.W1', "),
    (BLOCK, lambda ours, *a: (ours(*a)[0], []), "not wanted: ['dp']"),
    (BLOCK, with_cache(mask3=lambda c: 1), "first wrong: ffn.W2; what comes after may rest on it"),
    ("step", lambda ours, *a: ours(*a)[::-1], "the order: this is hidden"),
    ("step", step_with(lambda p: 2 * p, "W1"), "first wrong: state; what comes after"),
]
WRONG_VERSIONS += [(name, wrong, text) for name, pairs in MISTAKES.items() for text, wrong in pairs]
MISSING, CONJUGATE = FACTORS[0][0], FACTORS[1][0]
for name, form, labels in [
        ("gelu_backward", MISSING, ["dout"]), ("dropout_backward", MISSING, ["mask"]),
        ("layer_norm_backward", MISSING, ["xhat", "rstd", "scale"]),
        ("cross_entropy_backward", MISSING, ["dloss", "weights", "sums"]),
        ("complex_in_backward", CONJUGATE, ["dout"]), ("lam_backward", MISSING, ["nu", "theta"]),
        ("lam_backward", CONJUGATE, ["dlam"]), ("scan", CONJUGATE, ["lam"]),
        ("scan_backward", CONJUGATE, ["lam", "h"]), ("lru_backward", CONJUGATE, ["lam", "h", "u"]),
        ("lru_backward", MISSING, ["gamma"]), (BLOCK, MISSING, ["mask1", "mask2", "mask3"])]:
    hints = [form.format(label) for label in labels]
    WRONG_VERSIONS += [(name, with_mistake(text), text) for text in hints]
for name in ("scan", "scan_backward", "lru_backward"):
    WRONG_VERSIONS += [(name, with_mistake(text), text) for text, _ in WALLS]


@pytest.mark.parametrize("case", range(len(WRONG_VERSIONS)))
def test_a_wrong_version_is_refused_with_the_right_hint(case):
    name, wrong, part = WRONG_VERSIONS[case]
    with pytest.raises(Wrong) as error:
        GRADERS[name](lambda *arguments: wrong(getattr(lrurec, name), *arguments))
    assert part in str(error.value), str(error.value)


def test_the_exercises_from_end_to_end(tmp_path, capfd):
    paths = []
    for exercise, (_, asked, _) in EXERCISES.items():
        text = write_exercise(exercise)
        hidden = [split_docstring(name)[1] for name in asked] + ["Derivative:"]
        assert all(part and part not in text for part in hidden), exercise
        for name in asked:                         # its answer is to call ours
            arguments = ", ".join(inspect.signature(getattr(lrurec, name)).parameters)
            text = text.replace("# your lines here", f"return lrurec.{name}({arguments})", 1)
        paths.append(str(tmp_path / f"{exercise}.py"))
        (tmp_path / f"{exercise}.py").write_text(text + "\nimport lrurec\n")
    assert all(grade_here(path) == RIGHT for path in paths)
    assert capfd.readouterr().out.count(": right\n") == len(GRADERS)
    assert exercise_main(paths[:2]) == 0           # each in its own process
    assert capfd.readouterr().out.count(": right\n") == 2
    assert exercise_main(["train", *paths]) == 0
    out = capfd.readouterr().out
    assert "Your functions: linear_backward, " in out and "100 of 100 recalled" in out


@pytest.mark.parametrize("lines, message", [
    ("return dout * maks", "gelu.py, line LINE: return dout * maks\n  NameError: name 'maks'"),
    ("return dout *", "SyntaxError: invalid syntax (gelu.py, line LINE)"),
    ("return exit(0)", "SystemExit: 0"),
    ("pass\nimport sys; sys.exit(0)", "import sys; sys.exit(0)\n  SystemExit: 0"),
    ("pass\nimport os; os._exit(0)", "ended Python itself (exit code 0), so it was not graded"),
    ("pass\nwhile True: pass", "did not end within 2 seconds"),
    ("pass\nfrom lrurec import gelu_backward", "your gelu_backward is replaced by an import"),
    ("pass\ndel gelu_backward", "no function of an exercise"),
])
def test_a_file_cannot_stop_or_fool_the_grader(lines, message, tmp_path, capfd, monkeypatch):
    if "while" in lines:
        monkeypatch.setattr(sys.modules[exercise_main.__module__], "TIME_LIMIT", 2)
    before = write_exercise("gelu").split("# your lines here")[0]
    (tmp_path / "gelu.py").write_text(before + lines)
    assert exercise_main([str(tmp_path / "gelu.py")]) == 1
    assert message.replace("LINE", str(before.count("\n") + 1)) in capfd.readouterr().out


def test_lists_hints_and_a_wrong_name(capsys):
    for arguments, code, part in [([], 0, "complex_in_backward, complex_out_backward"),
                                  (["gelu", "--hint"], 0, "a sigmoid's slope is s (1 - s)"),
                                  (["step", "--hint"], 0, "one step of the recurrence"),
                                  (["no_such"], 2, "neither an exercise nor a .py file")]:
        assert exercise_main(arguments) == code
        captured = capsys.readouterr()
        assert part in captured.out + captured.err


def test_pytorch_gives_the_same_logits_loss_and_gradients():
    pytest.importorskip("torch")
    for scan in (torch_scan_loop, torch_scan()):
        differences = torch_differences(scan)
        assert max(differences.values()) < 1e-12, differences


# ---------------------------------------------------------------------------------------------
# The model

def test_the_worked_example_in_the_docstrings():
    lam, u, starts = np.array([0.5j]), np.array([[2], [1], [4 + 0j]]), np.array([0, 0, 1], bool)
    h = lrurec.scan_loop(lam, u, starts)
    assert h.ravel().tolist() == [2, 1 + 1j, 4]
    dlam, du = lrurec.scan_backward_loop(np.array([[1], [2j], [1]]), lam, h, starts)
    assert du.ravel().tolist() == [2, 2j, 1] and dlam.tolist() == [4j]


def test_all_scans_agree_with_the_loops_for_any_length_and_walls():
    lam, rng = lam_of(3), np.random.default_rng(0)
    for N, share in [(N, share) for N in (*range(1, 35), 127, 128, 129) for share in (0, 0.3, 1)]:
        u, dh, starts = compl(N, 3), compl(N, 3, seed=2), rng.random(N) < share
        h = lrurec.scan_loop(lam, u, starts)
        for scan in (lrurec.scan, lrurec.scan_recursive):
            assert relative_error(scan(lam, u, starts), h) < 1e-12, (scan.__name__, N)
        expected = lrurec.scan_backward_loop(dh, lam, h, starts)
        for name, a, b in zip(("dlam", "du"), lrurec.scan_backward(dh, lam, h, starts), expected):
            assert a.shape == b.shape and relative_error(a, b) < 1e-12, (name, N)


def test_float32_stays_exact_over_a_very_long_history():
    N = 200_000
    lam = lam_of(2, 0.99999).astype(np.complex64)
    u, dh, starts = compl(N, 2), compl(N, 2, seed=2), np.zeros(N, bool)
    h = lrurec.scan_loop(lam.astype(complex), u, starts)
    dlam, du = lrurec.scan_backward_loop(dh, lam.astype(complex), h, starts)
    h32 = lrurec.scan(lam, u.astype(lam.dtype), starts)
    dlam32, du32 = lrurec.scan_backward(dh.astype(lam.dtype), lam, h32, starts)
    for name, a, b, most in (("h", h32, h, 1e-6), ("du", du32, du, 1e-6),
                             ("dlam", dlam32, dlam, 2e-5)):       # a float32 sum of all rows
        assert a.dtype == np.complex64 and relative_error(a, b) < most, name


def test_nothing_passes_a_wall_and_the_future_never_reaches_the_past():
    params, items = tiny_params(), np.array([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4])
    hidden = lrurec.encode(params, items, STARTS)
    for n in range(11):
        changed = items.copy()
        changed[n] = items[n] % 7 + 1
        moved = (lrurec.encode(params, changed, STARTS) != hidden).any(1)
        end = next((m for m in range(n + 1, 11) if STARTS[m]), 11)
        assert moved[n:end].all() and not moved[:n].any() and not moved[end:].any(), n


@pytest.mark.parametrize("max_phase", [1, 0.2])
def test_initial_values(max_phase):
    params = lrurec.init_params(50, 32, 2000, rng=np.random.default_rng(0), max_phase=max_phase)
    for p in lrurec.blocks(params):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        for part, low, high in ((abs(lam) ** 2, 0.8 ** 2, 0.99 ** 2),      # uniform in area
                                (np.angle(lam) % (2 * math.pi), 0, 2 * math.pi * max_phase)):
            quantiles = (np.quantile(part, [0, 0.25, 0.5, 0.75, 1]) - low) / (high - low)
            assert quantiles[1:4] == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
            assert -1e-5 < quantiles[0] < 0.01 and 0.99 < quantiles[4] < 1 + 1e-5
        gamma = np.exp(p["lru.gamma_log"].astype(float))
        np.testing.assert_allclose(gamma ** 2, 1 - abs(lam) ** 2, rtol=1e-3)
    for name, p in params.items():
        parts = lrurec.real_view(p)
        if "norm" in name:
            assert (parts == (1 if name.endswith("scale") else 0)).all()
        elif "_log" not in name:                   # normal(0, 0.02) cut at two standard deviations
            error = 0.03 if parts.size > 2000 else 0.25
            assert abs(parts).max() <= 0.04 and parts.std() == pytest.approx(0.0176, rel=error)
    assert not (params["blocks.0.lru.B"] == params["blocks.1.lru.B"]).any()


def test_the_names_shapes_and_types_that_the_contract_names():
    params, (D, H, F) = lrurec.init_params(7, 4, rng=np.random.default_rng(0)), (4, 8, 16)
    names = ("nu_log", "theta_log", "gamma_log", "B", "b_B", "C", "b_C")
    shapes = {"lru." + name: shape for name, shape in zip(names, (
        (H,), (H,), (H,), (D, H), (H,), (H, D), (D,)))}
    shapes.update({"lru_norm.scale": (D,), "lru_norm.shift": (D,), "ffn.W1": (D, F), "ffn.b1": (F,),
                   "ffn.W2": (F, D), "ffn.b2": (D,), "ffn_norm.scale": (D,),
                   "ffn_norm.shift": (D,)})
    shapes = {f"blocks.{k}.{name}": shape for k in (0, 1) for name, shape in shapes.items()}
    shapes.update({"item_embedding": (8, D), "embedding_norm.scale": (D,),
                   "embedding_norm.shift": (D,), "output_bias": (8,)})
    assert {name: p.shape for name, p in params.items()} == shapes
    for name, p in params.items():
        is_complex = name.endswith((".B", ".b_B", ".C"))
        assert p.dtype == (np.complex64 if is_complex else np.float32), name
    assert lrurec.init_params(7, 4, 3, 5)["blocks.1.ffn.W1"].shape == (4, 5)
    assert lrurec.init_params(7)["item_embedding"].shape == (8, 64)


def test_gelu_layer_norm_and_score_against_their_definitions():
    x = np.linspace(-6, 6, 241)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert abs(lrurec.gelu_forward(x)[0] - exact).max() < 5e-4    # the tanh form's own error
    x, scale, shift = 0.01 * real(5, 6), real(6), real(6, seed=2)
    expected = scale * (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert relative_error(lrurec.layer_norm_forward(x, scale, shift)[0], expected + shift) < 1e-12
    params, hidden = tiny_params(), real(2, 3, 4)
    scores = lrurec.score(params, hidden)
    logits = np.einsum("ijd,vd->ijv", hidden, params["item_embedding"]) + params["output_bias"]
    assert (scores[..., 0] == -np.inf).all() and scores.shape == (2, 3, 8)
    assert relative_error(scores[..., 1:], logits[..., 1:]) < 1e-12


@pytest.mark.parametrize("ids", [[], [-1], [8], [1.0], [True]])
def test_ids_that_are_no_items_are_refused_with_a_sentence(ids):
    params, ids = tiny_params(), np.array(ids)
    starts, good = np.zeros(len(ids), bool), np.ones(len(ids), int)
    for use in (lambda: lrurec.encode(params, ids, starts),
                lambda: lrurec.step(params, lrurec.init_state(params, len(ids)), ids),
                lambda: lrurec.loss_and_grads(params, good, ids, starts),
                lambda: lrurec.loss_and_grads(params, ids, good, starts)):
        with pytest.raises(ValueError, match=r"integers in 0\.\.7, one or more"):
            use()
    lrurec.encode(params, [0, 7], np.zeros(2, bool))              # both ends are ids


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e4, 0), (1e4, -1e6)])
def test_the_loss_against_its_definition_whatever_the_size_of_the_logits(scale, shift):
    hidden, E, bias = scale * real(9, 4), real(8, 4, seed=2), scale * real(8, seed=3) + shift
    targets = np.array([1, 0, 7, 3, 3, 0, 2, 5, 6])
    n = np.flatnonzero(targets)                    # the other rows carry no loss
    logits = hidden[n] @ E.T + bias
    by_hand = (np.logaddexp.reduce(logits, 1) - logits[np.arange(7), targets[n]]).mean()
    loss, *grads = lrurec.output_loss(hidden, E, bias, targets)
    assert loss == pytest.approx(by_hand, rel=1e-12)
    assert all(np.isfinite(g).all() for g in grads)
    items, starts = np.array([1, 2, 3, 4]), np.zeros(4, bool)
    loss, grads = lrurec.loss_and_grads(tiny_params(), items, 0 * items, starts)
    assert loss == 0 and not any(g.any() for g in grads.values())


def test_a_chunk_of_logits_holds_256_rows_within_a_bound_on_its_memory(monkeypatch):
    hidden, E, bias = real(600, 4), real(8, 4, seed=2), real(8, seed=3)
    targets, shapes, forward = np.arange(600) % 8, [], lrurec.cross_entropy_forward

    def spied(logits, *rest):
        shapes.append(logits.shape)
        return forward(logits, *rest)

    monkeypatch.setattr(lrurec, "cross_entropy_forward", spied)
    whole = lrurec.output_loss(hidden, E, bias, targets)
    assert shapes == [(256, 8), (256, 8), (88, 8)]
    assert 2 ** 24 <= lrurec.LOGITS_PER_CHUNK <= 2 ** 27, "a million items train in 6 GB"
    for bound, most in ((400, 51), (1, 1)):
        monkeypatch.setattr(lrurec, "LOGITS_PER_CHUNK", bound)
        shapes.clear()
        parts = lrurec.output_loss(hidden, E, bias, targets)
        assert max(shapes)[0] <= most and sum(shape[0] for shape in shapes) == 600
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(parts, whole))


def test_dropout_keeps_the_expectation():
    x = np.ones((400, 500))
    out, _ = lrurec.dropout_forward(x, 0.3, np.random.default_rng(0))
    assert set(np.unique(out)) == {0, 256 / (256 - 77)}           # 77/256 is the nearest to 0.3
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.005)
    assert lrurec.dropout_forward(x, 0, None)[0] is x

    class EveryDraw:                               # each of the 256 possible draws, once
        def integers(self, *args, **options):
            return np.arange(256, dtype=np.uint8).view(np.uint64)
    for p, n_dropped in ((0.25, 64), (0.3, 77), (0.001, 0), (0.9999, 255)):
        out, _ = lrurec.dropout_forward(np.ones((16, 16)), p, EveryDraw())
        assert (out == 0).sum() == n_dropped and out.sum() == pytest.approx(256)


def everything(params, items, targets, starts, dropout=0.0):
    """All that the model's functions return for a batch."""
    rng = np.random.default_rng(1)
    loss, grads = lrurec.loss_and_grads(params, items, targets, starts, dropout, rng)
    hidden, state = lrurec.encode(params, items, starts, return_state=True)
    x, stepped = lrurec.step(params, state, np.arange(1, 1 + state.shape[1]))
    return [loss, *grads.values(), hidden, state, x, stepped, lrurec.score(params, x)[:, 1:]]


def batch_of(N, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 41, N), rng.integers(0, 41, N), rng.random(N) < 0.1


def test_float32_agrees_with_float64():
    params = tiny_params(n_items=40)
    single = {name: p.astype(np.complex64 if np.iscomplexobj(p) else np.float32)
              for name, p in params.items()}
    for a, b in zip(everything(single, *batch_of(200)), everything(params, *batch_of(200))):
        assert a.dtype == (np.complex64 if np.iscomplexobj(b) else np.float32)
        assert relative_error(a, b) < 1e-4


def test_what_a_function_returned_is_not_changed_by_a_later_call():
    params = tiny_params(n_items=40)
    results = everything(params, *batch_of(20), dropout=0.2)
    copies = [r.copy() for r in results]
    everything(params, *batch_of(20, seed=1), dropout=0.2)
    assert all((r == c).all() for r, c in zip(results, copies))


def test_the_recurrence_learns_what_no_memoryless_model_can():
    items, place = np.random.default_rng(0).integers(1, 6, 1600), np.arange(1600) % 16
    targets = np.where(place < 3, 0, np.roll(items, 3))           # the item 3 steps ago
    for starts, low, high in ((place == 0, 0, 0.5), (place >= 0, math.log(5) - 0.1, 2)):
        params = lrurec.init_params(5, 16, n_blocks=1, rng=np.random.default_rng(0))
        opt = lrurec.adamw_init(params)
        for _ in range(80):
            loss, grads = lrurec.loss_and_grads(params, items, targets, starts)
            lrurec.adamw_update(params, grads, opt, 0.02, 0)
        assert low < loss < high


# ---------------------------------------------------------------------------------------------
# The optimizer and the files

def test_decay_groups_and_clipping():
    params = tiny_params()
    before, opt = {name: p.copy() for name, p in params.items()}, lrurec.adamw_init(params)
    lrurec.adamw_update(params, {n: np.zeros_like(p) for n, p in params.items()}, opt, 0.1, 0.5)
    shrunk = {name.split(".", 2)[-1] for name in params if (params[name] != before[name]).any()}
    assert shrunk == {"item_embedding", "lru.nu_log", "lru.theta_log", "lru.gamma_log", "lru.B",
                      "lru.C", "ffn.W1", "ffn.W2"}
    grads = {"a": np.array([3.0, 0]), "b": np.array([4j])}
    assert lrurec.clip_gradients(grads, 10) == pytest.approx(5)
    assert grads["a"][0] == 3 and grads["b"][0] == 4j
    assert lrurec.clip_gradients(grads, 1) == pytest.approx(5)
    assert grads["a"][0] == pytest.approx(3 / (5 + 1e-6)) and grads["b"][0].imag < 0.8


def test_save_and_load(tmp_path):
    params = tiny_params()
    lrurec.save(tmp_path / "m.npz", params, note={"a": [1, 2.5, "ü"]}, none=None)
    again, extra = lrurec.load(tmp_path / "m.npz")
    assert list(again) == list(params) and os.listdir(tmp_path) == ["m.npz"]
    assert all((again[name] == params[name]).all() for name in params)
    assert extra == {"note": {"a": [1, 2.5, "ü"]}, "none": None}


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    write(path, "old")
    write(tmp_path / "f.part", "what a killed run left, longer than new")
    for error, caught in ((ValueError("no"), "no"), (OSError(errno.ENOSPC, "full"), str(path))):
        with pytest.raises(type(error), match=caught), lrurec.whole_file(path) as file:
            file.write(b"ne")
            raise error
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with lrurec.whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", extra=np.array("{}"), zeros=np.zeros(2 ** 23))
    tracemalloc.start()
    with pytest.raises(ValueError, match="m.npz is not a model file"):
        lrurec.load(tmp_path / "m.npz")
    assert tracemalloc.get_traced_memory()[1] < 2 ** 20
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------
# Data

# Every right file says: user 1 saw 10 at 100 s and 11 at 200 s, user 2 saw 10 at 50 s
PLAIN = "user,item,time\n1,11,200\n1,10,100\n2,10,50\n"
ROWS = [("1", "11", "200"), ("1", "10", "100"), ("2", "10", "50")]


def table(user="user", item="item", when="time", delimiter=",", rows=ROWS):
    return "\n".join(delimiter.join(row) for row in [(user, item, when), *rows]) + "\n"


def dated(times, when="date"):
    return table(when=when, rows=[(u, i, t) for (u, i, _), t in zip(ROWS, times)])


ISO_TIMES = [  # in the order of ROWS
    ["2024-05-01", "2024-04-30", "2024-03-02"],
    ["2024-05-01 12:30:00", "2024-05-01 12:29:59", "2024-05-01 12:00"],
    ["2024-05-01T12:30:00.5Z", "2024-05-01T12:30:00.25Z", "2024-05-01T12:30:00Z"],
    ["2024-05-01 12:30:00 UTC", "2024-05-01 12:29:00 UTC", "2024-05-01 12:28:00 UTC"],
    ["2024-05-01T12:00:00-02:00", "2024-05-01T12:30:00+0100", "2024-05-01T12:30:00+09"]]
USERS = "user user_id USER-ID uid reviewerID visitorid customer_id session_id SessionId".split()
ITEMS = "item item_id iid movieId video_id sid product_id asin parent_asin Item-Id".split()
TIMES = ("time_ms timestamp_ms timestamp unixReviewTime unix_time datetime date_time event_time "
         "created_at rated_at time ts date").split()
FILES = {  # what the file is: its content, and the columns where they are given
    **{f"user column {name}": [table(user=name)] for name in USERS},
    **{f"item column {name}": [table(item=name)] for name in ITEMS},
    **{f"time column {name}": [table(when=name)] for name in TIMES},
    **{f"finest time {name}": ["user,item," + ",".join(TIMES[:k:-1] + [name]) + "\n" + "".join(
        f"{u},{i},{'8,' * (len(TIMES) - 1 - k)}{t}\n" for u, i, t in ROWS)]
       for k, name in enumerate(TIMES)},
    "a header with a space": [table("User Id", "Item Id", "Date Time")],
    **{f"delimiter {d!r}": [table(delimiter=d)] for d in ["\t", "::", ",", ";", "|", " "]},
    **{f"times as {times[0]}": [dated(times)] for times in ISO_TIMES},
    "u.data": ["1\t11\t3\t200\n1\t10\t5\t100\n2\t10\t1\t50\n"],
    "ratings.dat": ["1::11::3::200\n1::10::5::100\n2::10::1::50\n"],
    "RecBole": [table("user_id:token", "item_id:token", "timestamp:float", "\t")],
    "three columns": ["1,11,200\n1,10,100\n2,10,50\n"],
    "gzip": [gzip.compress(PLAIN.encode())],
    "mark, CRLF, blank lines, spaces, quotes":
        ["\ufeff\r\n" + PLAIN.replace("\n", "\r\n\r\n").replace("11", ' "11"')],
    "fractions": [PLAIN.replace("200", "2e2").replace("100", "100.5")],
    "delimiters at the end": [PLAIN.replace("\n", ",\n")],
    "spaces at the end": [PLAIN.replace(",", " ").replace("\n", " \n")],
    "a delimiter in quotes": ['"user;x;y;z",item,user,time\n"a;b;c;d",11,1,200\n,10,1,100\n'
                              '"e,f",10,2,50\n'],
    "a line break in quotes": ['review,user,item,time\n"a\nb",1,11,200\n,1,10,100\n,2,10,50'],
    "decimal commas": ["1;11;3,5;200\n1;10;4,0;100\n2;10;1,5;50\n"],
    "a user and a session": ["session_id,user_id,item,ts\n5,1,11,200\n6,1,10,100\n7,2,10,50\n"],
    "KuaiRand": ["user_id,video_id,date,hourmin,time_ms,is_click\n1,11,20220408,1200,200,1\n"
                 "1,10,20220409,1100,100,0\n2,10,20220408,900,50,1\n"],
    "columns by number": ["200;11;1\n100;10;1\n50;10;2\n", ["3", "2", "1"]],
    "columns by number, known header": ["time;item;user\n200;11;1\n100;10;1\n50;10;2\n",
                                        ["3", "2", "1"]],
    "columns by number, other header": ["a;b;c\n200;11;1\n100;10;1\n50;10;2\n", list("321")],
    "columns by name": ["a1,b,user\n200,11,1\n100,10,1\n50,10,2\n", ["user", "b", "a1"]],
}


@pytest.mark.parametrize("name", FILES)
def test_every_right_file_gives_the_plain_file_s_data(name, tmp_path):
    content, *columns = FILES[name]
    plain = reader.load_dataset(write(tmp_path / "plain", PLAIN), 0)
    data = reader.load_dataset(write(tmp_path / "f", content), 0, "item", 0, *columns)
    assert (data.user_ids, data.item_ids) == (["1", "2"], ["", "10", "11"])
    assert data.items.tolist() == [1, 2, 1] and data.offsets.tolist() == [0, 2, 3]
    assert data.digest == plain.digest


ZIP, XLSX = zip_of({"a.csv": ""}).getvalue(), zip_of({"xl/a.xml": ""}).getvalue()
REFUSED = [  # content, what the message says, and the columns where they are given
    ("", "is empty"), (" \n\n", "is empty"), ("user,item\n", "header but no events"),
    ("\n1,2,3\n1,2\n", "line 3: 2 columns where the first line has 3"),
    ("1,2,3\n1,Rock, The,3\n", "line 2: 4 columns where the first"),
    ("1 2 3 4 5 6\n2 3 4\n", "line 1: .*not a user's whole sequence"),
    ("1,2,3\n1,2,x\n", "line 2: .*'x'.*seconds or milliseconds.*ISO 8601"),
    ("1,2,nan\n", "line 1: 'nan' is not a finite"), (f"1,2,{2 ** 63}\n", "below 2\\^63"),
    ("1,2,3\n1,2,inf\n", "line 2: 'inf' is not a finite"),
    ("1,2,3\n1,2,2024-05-01\n", "line 2: .*2024-05-01.*times all as"),
    ("1,2,2024-05-01\n1,3,4\n", "line 2: '4' is not ISO 8601"),
    ("1,2,2024-05-01\n1,3,2024-05-32\n", "line 2: "),           # no such day
    ("1,,3\n", "line 1: user '1', item '' cannot be ids"),
    ("1,2,3\n , 2,3\n", "line 2: user '', item '2' cannot be ids"),
    (b"1,2,3\n1,\x002,3\n", "line 2: "), ("1,2,3\n1,\x1b[3,3\n", "line 2: user '1', item '.x1b"),
    (b"1,2,3\n1,Caf\xe9,3\n", "line 2: user '1', item 'Caf.udce9'"),
    (b"\x89PNG\r\n\x1a\n", "line 1: no delimiter"), ("alone \n", "no delimiter in 'alone'"),
    ('"a,b"\n', "no delimiter"), ('1,2,3\n1,"2"x,3\n', "line 2: .*quotes"),
    ('1,2,3\n1,"2,3\n1,2,3\n', "line 2: .*quotes"),
    ("who,what,when\n1,2,3\n", "line 1: unknown header.*who.*--columns"),
    ("a1,b,c,d,e\n", "line 1: unknown header.*a1, b.*--columns"),
    ("1,2,3\n1," + "2" * 2 ** 20, "line 2: over 1048576 characters"),
    ("1,2,3\n", "named .gz but is not gzip"), (b"\x1f\x8b junk", "cannot be read.*gzip"),
    (gzip.compress(b"1,2,3\n" * 99)[:-9], "cannot be read.*gzip"),
    ("1,2\n".encode("utf-16"), "is UTF-16.*UTF-8"), (ZIP, "is a zip archive.*unpack"),
    (b"PAR1\x15\x04\x15", "is Parquet.*pandas.read_parquet"), (XLSX, "is xlsx.*pandas.read_excel"),
    (b"BZh91AY&SY", "is compressed with bz2.*bunzip2"),
    (b"\x80\x04\x95", "is a pickle.*trust.*pandas.read_pickle"),
    ('{"user": 1, "item": 2}\n', r"is JSON.*read_json\('FILE', lines=True"),
    ("{'user': 1, 'item': 2}\n", "is JSON.*pandas.read_json"),
    (gzip.compress(b' {"user": 1}\n'), "is JSON.*pandas.read_json"),
    (PLAIN, "no column 'x'.* user, item, time", ["user", "x"]),
    (PLAIN, "no column '0'", ["0", "1"]), (PLAIN, "no column '4'.*1 to 3", ["1", "4"]),
    ("1,2,3\n1,4,5\n", "nobody is left.*--min-count"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_every_wrong_file_is_refused_with_its_place_and_what_to_do(case, tmp_path):
    content, message, *columns = REFUSED[case]
    path = write(tmp_path / ("f.gz" if "gzip" in message else "f"), content)
    with pytest.raises(reader.DataError) as error:
        reader.load_dataset(path, 5, "item", 0, *columns)
    assert re.search(message, str(error.value)) and path in str(error.value)
    assert str(error.value).isprintable(), "one line without control characters"
    for code in re.findall('python -c "(.*)"', str(error.value)):
        compile(code, "the advice", "exec")


def test_the_reader_survives_random_edits(tmp_path):
    rng, text = np.random.default_rng(0), b'user,item,time\nu1,"i,1",1\nu2,i2,3.5\nu,i,2024-05-01\n'
    for n in range(400):
        path = write(tmp_path / "f", scrambled(text * 2 if n % 5 else rng.bytes(80), rng))
        try:
            reader.load_dataset(path, 0)
        except reader.DataError as error:
            assert path in str(error) and str(error).isprintable()


def test_a_wrong_value_or_path_is_refused_with_a_sentence(tmp_path):
    for options, message in (({"ties": "foo"}, "'item', 'file' or 'random'.*'foo'"),
                             *[({"columns": [*n]}, "USER,ITEM") for n in ("1", "121", "1234")]):
        with pytest.raises(ValueError, match=message):
            reader.load_dataset(write(tmp_path / "f", PLAIN), **options)
    for path in (tmp_path / "none", tmp_path, "no\x1b[2J.csv"):
        with pytest.raises(reader.DataError, match="cannot be read.*check the path") as error:
            reader.load_dataset(path)
        assert reader.printable(str(path)) in str(error.value)
    assert reader.printable("a\n\x1b[2J\x9bé用\ud800") == r"a\n\x1b[2J\x9bé用\ud800"


def test_the_layout_says_by_name_what_was_read_and_what_is_unused(tmp_path, capfd):
    for content, layout in [
            (FILES["KuaiRand"][0], "user from user_id, item from video_id, time from time_ms; "
                                   "other columns (date, hourmin, is_click) unused"),
            ("user,item,time,title\n1,2,3,\x1b[2J\n", "user from user, item from item, time from "
                                                      "time; other columns (title) unused"),
            ("user,item\n1,2\n", "user from user, item from item"),
            ("1,2\n", "no header: columns 1, 2 are user, item"),
            ("1,2,3\n", "no header: columns 1, 2, 3 are user, item, time"),
            ("1,2,5,3\n", "no header: columns 1, 2, 4 are user, item, time; ratings unused")]:
        assert reader.load_dataset(write(tmp_path / "f", content), 0).layout == layout
    assert capfd.readouterr() == ("", "")
    data = reader.load_dataset(write(tmp_path / "f", "user,item,wh\x1ben,stars\n1,2,3,4\n"), 0)
    err = capfd.readouterr().err                   # a header without a known time: one warning
    assert err.startswith("train.py: warning: ") and err.count("\n") == 1 and err[:-1].isprintable()
    assert r"f, line 1: no known time column in user, item, wh\x1ben, stars: events are" in err
    assert "--columns" in err and data.layout.isprintable()
    reader.load_dataset(tmp_path / "f", 0, columns=["user", "item"])
    assert capfd.readouterr().err == "", "who names the columns is not warned"


def test_ids_are_any_text_ordered_as_numbers_where_all_are_and_times_are_exact(tmp_path):
    for raw, expected in ((["10", "9", "1"], ["1", "9", "10"]),
                          (["b", "10", "9"], ["10", "9", "b"]), (["01", "1"], ["01", "1"]),
                          (["10.0", "9.5", "1"], ["1", "9.5", "10.0"])):
        n = np.arange(len(raw))
        data = reader.prepare(reader.Events(n, n, n, raw, raw), "toy", min_count=0)
        assert data.item_ids[1:] == data.user_ids == expected
    for text, users, items, times in (
            ('user,item,time\nJosé,"a, b",1700000000000000001\n用户,c::d,1700000000000000002\n',
             ["José", "用户"], ["a, b", "c::d"], [1700000000000000001, 1700000000000000002]),
            ("1,x\n2,y\n", ["1", "2"], ["x", "y"], [0, 1]),      # no time: the file's order
            (dated(ISO_TIMES[2]), ["1", "2"], ["11", "10"],
             [1714566600500000, 1714566600250000, 1714566600000000])):
        events = reader.read_file(write(tmp_path / "f", text))
        assert (events.user_ids, events.item_ids) == (users, items)
        assert events.times.tolist() == times


def test_the_digest_is_of_items_offsets_and_item_ids():
    def digest(users, items, ids="abc"):
        events = reader.Events(np.array(users), np.array(items), np.arange(4), [*"xyz"], [*ids])
        return reader.prepare(events, "toy", 0, "file").digest
    base = digest([0, 0, 1, 1], [0, 1, 2, 1])
    others = {digest([0, 0, 1, 1], [0, 2, 1, 1]), digest([0, 0, 0, 1], [0, 1, 2, 1]),
              digest([0, 0, 1, 1], [0, 1, 2, 1], "abd")}
    assert base[:16] == "242eb7bf6636e4a5" and len(others - {base}) == 3


@pytest.mark.parametrize("content", [
    "movieId,title,genres\n10,\"Rock, The\",Action\n12,Other,\n", "title;item_id\nRock, The;10\n",
    *[f"{name}\titem\nRock, The\t10\n" for name in
      "title movie_title itemTitle product_title Name item_name".split()],
    "10\tRock, The\n", b"10::Rock, The::Action|Drama\n9::Caf\xe9::\n", "10|Rock, The||\n11|||\n"])
def test_titles_come_from_a_file_and_ids_without_one_keep_their_id(content, tmp_path):
    titles = write(tmp_path / "titles", content)
    data = reader.load_dataset(write(tmp_path / "f", PLAIN), 0, titles=titles)
    assert data.titles == ["", "Rock, The", "11"]


def test_titles_are_latin_1_where_they_are_not_utf_8_and_wrong_files_are_refused(tmp_path):
    titles, file = tmp_path / "titles", write(tmp_path / "f", PLAIN)
    write(titles, "1::Café::x\n".encode("latin-1") + "2::用::x\n".encode())
    assert reader.read_titles(titles) == {"1": "Café", "2": "用"}
    for content, message in (("10,Rock\n10\n", "line 2: 1 columns"), ("", "is empty"),
                             ("10,Rock\n11,Rock, The\n", "line 2: 3 columns.*in quotes"),
                             ("movie,name\n7,x\n", "no id of an item of")):
        with pytest.raises(reader.DataError, match=message):
            reader.load_dataset(file, 0, titles=write(titles, content))


@pytest.mark.parametrize("content", [
    b"1,2,3\n" + b"x" * 10_000_000, b'1,2\n1,"' + b"xxxxxxxxx\n" * 10 ** 6, b"\n" * 200_000,
    b"1," * 100_000, b"user,item," + b"t," * 100_000,
    b"".join(b"%d,7,%d\n" % (n, n) for n in range(20_000))], ids=str.split(
        "line field blank columns header users"))
def test_hostile_text_is_refused_in_little_time_and_memory(content, tmp_path, capfd):
    path = write(tmp_path / "f", content)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(reader.DataError) as error:
        reader.load_dataset(path)
    seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2 ** 20 and seconds < 4
    assert len(str(error.value)) < 900 + len(path) and len(capfd.readouterr().err) < 600 + len(path)


def test_filtering_and_order():
    # item 3 has one event; then user 2 has one; the repeat of (0, 1) is dropped first
    users, items, times = np.array([(0, 1, 5), (0, 1, 5), (0, 2, 4), (1, 2, 1), (1, 1, 1),
                                    (2, 3, 1), (2, 1, 9)]).T
    events = reader.Events(users, items, times, list("012"), list("0123"))
    data = reader.prepare(events, "toy", min_count=2)
    assert data.item_ids == ["", "1", "2"] and data.user_ids == ["0", "1"]
    assert data.items.tolist() == [2, 1, 1, 2] and data.offsets.tolist() == [0, 2, 4]
    by_file = reader.prepare(events, "toy", min_count=2, ties="file")
    assert by_file.items.tolist() == [2, 1, 2, 1]
    five = reader.Events(users[[0, 2] * 5], items[[0, 2] * 5], np.arange(10), *events[3:])
    assert len(reader.prepare(five, "toy").items) == 10, "five events are enough"
    drawn = {tuple(reader.prepare(events, "toy", 2, "random", seed).items) for seed in range(9)}
    assert drawn == {(2, 1, 1, 2), (2, 1, 2, 1)}


def test_windows_and_histories_by_hand():
    data = dataset(range(1, 15), [0, 7, 9, 12, 14], 14)
    rows = reader.training_rows(data, max_len=2)
    assert rows.targets.tolist() == [1, 2, 3, 4, 5, 8, 9, 10, 13, 14]
    assert rows.items.tolist() == [0, 1, 2, 3, 4, 0, 8, 0, 0, 13]
    assert rows.starts.tolist() == [1, 1, 0, 1, 0, 1, 1, 1, 1, 1]
    assert rows.windows.tolist() == [0, 1, 3, 5, 7, 8, 10]
    assert reader.training_rows(data).windows.tolist() == [0, 5, 7, 8, 10]
    for split, max_len, histories, true in (("test", 3, [[4, 5, 6], [10, 11]], [7, 12]),
                                            ("validation", None, [[1, 2, 3, 4, 5], [10]], [6, 11])):
        seen, truth = reader.histories(data, split, max_len)
        assert [s.tolist() for s in seen] == histories and truth.tolist() == true
    full = reader.full_histories(data, max_len=2)
    assert [s.tolist() for s in full] == [[6, 7], [8, 9], [11, 12], [13, 14]]
    assert [len(s) for s in reader.full_histories(data)] == [7, 2, 3, 2]
    parts = list(reader.batches(rows, 4, np.random.default_rng(0)))
    assert [part[2].dtype for part in parts] == [bool, bool], "two batches, of 4 and 2 windows"
    items, targets, _ = (np.concatenate(part) for part in zip(*parts))
    assert sorted(targets) == sorted(rows.targets) and targets.tolist() != rows.targets.tolist()
    assert dict(zip(targets, items)) == dict(zip(rows.targets, rows.items))


def test_ml_100k_sources(tmp_path, monkeypatch):
    """GroupLens is asked twice, then the wheel; a wrong archive is refused and not kept."""
    asked, grouplens = [], "https://files.grouplens.org/datasets/movielens/ml-100k.zip"

    def failing(url="the wheel", timeout=0):
        asked.append(url)
        raise OSError("no \x1broute")

    monkeypatch.setattr(reader, "recbole_wheel", failing)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LRUREC_CACHE", raising=False)
    for name, folder in (("USERPROFILE", None), ("HOME", ".cache/lrurec"),
                         ("XDG_CACHE_HOME", "lrurec"), ("LRUREC_CACHE", "")):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
        if folder is not None:
            asked.clear()
            with pytest.raises(reader.DataError, match="by hand and put it at ") as error:
                reader.fetch_movielens("ml-100k", opener=failing)
            place = str(tmp_path / "cache" / folder / "ml-100k.zip")
            assert str(error.value).endswith(place) and grouplens in str(error.value)
    with pytest.raises(reader.DataError, match="ml-1m cannot be fetched"):
        reader.fetch_movielens("ml-1m", opener=failing)
    assert asked == [grouplens, grouplens, "the wheel", *2 * [grouplens.replace("100k", "1m")]]

    archive = zip_of({"ml-100k/u.data": "1\t2\t3\t4\n", "ml-100k/u.item": "2|Fargo|"})
    serve = lambda url, timeout: io.BytesIO(archive.getvalue())   # noqa: E731
    with pytest.raises(reader.DataError, match="100,000 events"):
        reader.fetch_movielens("ml-100k", opener=serve)
    assert os.listdir(tmp_path) == []
    digest = reader.hashlib.sha256(np.array([1, 2, 4], "<i8").tobytes()).hexdigest()
    monkeypatch.setattr(reader, "ML_100K_EVENTS", digest)
    path = reader.fetch_movielens("ml-100k", opener=serve)
    assert reader.parse_archive("ml-100k", path, path).titles == {"2": "Fargo"}
    assert os.listdir(tmp_path / "cache") == ["ml-100k.zip"]
    assert reader.fetch_movielens("ml-100k", opener=failing) == path, "the cache serves"
    assert reader.load_dataset("ml-100k", 0).titles == ["", "Fargo"]


def test_the_wheel_comes_through_this_interpreter_s_pip(monkeypatch):
    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "recbole==1.2.1" and "--no-deps" in command
        for content in wheel:
            write(Path(command[command.index("--dest") + 1]) / "r.whl", content)
        return subprocess.CompletedProcess(command, not wheel, "", "first\nsecond\nno network\n")

    monkeypatch.setattr(subprocess, "run", pip)
    wheel = [b"content"]
    assert reader.recbole_wheel() == wheel[0]
    wheel = []
    with pytest.raises(OSError, match="^no network$"):
        reader.recbole_wheel()


@pytest.mark.parametrize("name, ratings, titles", [
    ("ml-100k", ("ml-100k/u.data", "1\t2\t3\t4\n"),
     ("ml-100k/u.item", b"1|unknown||\n2|Caf\xe9 (1990)|1-Jan-1990|\n")),
    ("ml-100k", (reader.RECBOLE_FOLDER + ".inter", "user_id:token\titem_id:token\t"
                 "rating:float\ttimestamp:float\n1\t2\t3\t4\n"),
     (reader.RECBOLE_FOLDER + ".item", "item_id:token\tmovie_title:token_seq\trelease_year:token"
                                       "\tclass\n1\tunkonwn\t\t\n2\tCafé\t1990\t\n")),
    ("ml-1m", ("ml-1m/ratings.dat", "1::2::3::4\n"),
     ("ml-1m/movies.dat", b"1::unknown::x\n2::Caf\xe9 (1990)::y\n"))])
def test_archives_give_events_and_titles_or_one_clear_line(name, ratings, titles, monkeypatch):
    digest = reader.hashlib.sha256(np.array([1, 2, 4], "<i8").tobytes()).hexdigest()
    monkeypatch.setattr(reader, "ML_100K_EVENTS", digest)
    events = reader.parse_archive(name, zip_of(dict([ratings, titles])), "a.zip")
    assert (events.user_ids, events.item_ids, events.times.tolist()) == (["1"], ["2"], [4])
    assert events.titles["1"] == "unknown" and events.titles["2"] == "Café (1990)"
    assert events.layout == ""
    for damaged in ({}, {ratings[0]: "a\tb\tc\td\n"}, {titles[0]: "x\n1"}):
        archive = zip_of({**dict([ratings, titles]), **damaged} if damaged else {})
        with pytest.raises(reader.DataError, match="a.zip is not an archive of " + name):
            reader.parse_archive(name, archive, "a.zip")


# ---------------------------------------------------------------------------------------------
# Evaluation

def test_metrics_against_a_brute_force_ranking():
    rng, expected = np.random.default_rng(0), []
    scores = rng.integers(0, 30, (200, 70)).astype(float)         # many ties
    seen, truth = [rng.integers(1, 70, 3) for _ in range(200)], rng.integers(1, 70, 200)
    for s, history, true in zip(scores, seen, truth):
        better = [v for v in range(1, 70) if v not in history and v != true and s[v] >= s[true]]
        expected.append(math.inf if true in history else len(better))
    rank = train.ranks(scores.copy(), seen, truth)
    table = {"MRR": np.mean([1 / (r + 1) for r in expected])}
    for k in (1, 5, 10, 20, 50):
        table[f"Recall@{k}"] = np.mean([r < k for r in expected])
        table[f"NDCG@{k}"] = np.mean([1 / math.log2(r + 2) if r < k else 0 for r in expected])
    assert rank.tolist() == expected and train.metrics(rank) == pytest.approx(table)


def test_evaluation_in_groups_is_the_evaluation_of_each_user_alone(monkeypatch):
    params, rng, rank = tiny_params(n_items=20), np.random.default_rng(0), []
    data = dataset(rng.integers(1, 21, 60), range(0, 61, 6), 20)
    monkeypatch.setattr(train, "GROUP_ROWS", 10)
    monkeypatch.setattr(train, "GROUP_SCORES", 40)
    for u in range(10):
        *before, true = data.items[6 * u:6 * u + 6]
        state = lrurec.init_state(params)
        for item in before[-4:]:
            x, state = lrurec.step(params, state, np.array([item]))
        rank.append(train.ranks(lrurec.score(params, x), [before[-4:]], np.array([true]))[0])
    for threads in (1, 3):
        table = train.evaluate(train.model_scorer(params), data, "test", 4, threads)
        assert table == pytest.approx(train.metrics(np.array(rank)))
    seen = [[1] * n for n in (4, 6, 1, 99, 5, 5, 1, 1, 1, 1, 1)]
    for V, sizes in ((1, [2, 1, 1, 2, 5]), (9, [2, 1, 1, 2, 4, 1]), (99, 11 * [1])):
        groups = list(train.groups(seen, V))       # as many rows and scores as allowed
        assert [group.stop - group.start for group in groups] == sizes
        assert [user for group in groups for user in range(11)[group]] == list(range(11))


def test_markov_and_popularity_by_hand():
    data = dataset([1, 2, 3, 1, 1] + [2, 3, 2, 1, 1], [0, 5, 10], 3)
    scorers = train.baseline_scorers(data)
    assert scorers["popularity"]([[2]])[0].tolist() == [0, 1, 3, 2]
    markov = scorers["markov"]([[2], [3], [1], [1, 2]])
    assert markov[0] == pytest.approx([0, 1 / 7, 3 / 7, 2 + 2 / 7])
    assert markov[1].argmax() == 2 and markov[2].argmax() == 2 and (markov[3] == markov[0]).all()


# ---------------------------------------------------------------------------------------------
# Training

DEFAULTS = {"data": "ml-100k", "epochs": 50, "patience": 15, "seed": 42, "batch_size": None,
            "max_len": 200, "dropout": 0.5, "lr": 2e-3, "schedule": "constant",
            "weight_decay": 0.01, "average": 0.0, "d_model": 64, "n_blocks": 2, "max_phase": 0.01,
            "min_count": 5, "ties": "item", "columns": None, "titles": None,
            "threads": os.cpu_count() or 1, "device": "cpu"}
SHOWN = "Recall@5 Recall@10 Recall@20 NDCG@5 NDCG@10 NDCG@20 MRR".split()


def test_a_whole_tiny_run(tiny, tmp_path, refused, capsys):
    out, data = tmp_path / "run", reader.load_dataset(tiny[1])
    assert run(*tiny, "--out", out, "--epochs", 12, "--max-len", 4) == 0
    printed, report = capsys.readouterr(), report_in(out)
    assert printed.err == "", "progress stays out of a pipe"
    assert list(report) == ["data", "config", "epoch", "seconds", "history", "validation", "test",
                            "baselines"]
    assert report["data"] == {"name": tiny[1], "users": 30, "items": 14, "events": 360,
                              "digest": data.digest}
    assert train.DEFAULTS == DEFAULTS and report["config"] == {
        **DEFAULTS, "data": tiny[1], "out": str(out), "epochs": 12, "max_len": 4, "d_model": 8,
        "batch_size": 8, "lr": 0.02, "dropout": 0.1, "seed": 3}
    history = report["history"]
    assert [list(h) for h in history] == 12 * [["epoch", "loss", "Recall@10", "NDCG@10", "seconds"]]
    assert [h["epoch"] for h in history] == list(range(1, 13))
    assert history[-1]["loss"] < history[0]["loss"] - 0.5 and min(h["seconds"] for h in history) > 0
    assert report["seconds"] == pytest.approx(sum(h["seconds"] for h in history))
    best, recalls = history[report["epoch"] - 1], [h["Recall@10"] for h in history]
    assert report["validation"]["Recall@10"] == best["Recall@10"] == max(recalls)
    assert report["validation"]["NDCG@10"] == best["NDCG@10"] < best["Recall@10"]
    params, _ = train.read_model(out / "model.npz")
    scorers = {"LRURec": train.model_scorer(params), **train.baseline_scorers(data)}
    tests = {"LRURec": report["test"], **report["baselines"]}
    for name, scorer in scorers.items():           # windows of 4 in every place
        assert tests[name] == train.evaluate(scorer, data, "test", 4), name
        assert tests[name] != train.evaluate(scorer, data, "test"), name
    assert report["validation"] == train.evaluate(scorers["LRURec"], data, "validation", 4)
    assert lrurec.load(out / "last.npz")[1]["step"] == 12 * 12, "30 users, 3 windows each, in 8s"
    assert sorted(os.listdir(out)) == ["last.npz", "metrics.json", "model.npz"]
    lines = printed.out.splitlines()
    assert lines[0] == (f"{tiny[1]}: 30 users, 14 items, 360 events; user from user, item from "
                        f"item, time from time; ties by item; run in {out}")
    for n, h in enumerate(history):
        mark = "*" if h["Recall@10"] > max([0, *recalls[:n]]) else " "
        assert re.fullmatch(rf"epoch {n + 1:3d}  loss {h['loss']:.4f}  validation Recall@10 "
                            rf"{recalls[n]:.4f} [{mark}]  \d+\.\d s", lines[n + 1])
    row = {name: "".join(f"{tests[name][metric]:11.4f}" for metric in SHOWN) for name in tests}
    assert lines[-5].startswith(f"test, best epoch {report['epoch']}, trained for ")
    assert lines[-4].split() == SHOWN and lines[-3:] == [
        "popularity  " + row["popularity"], "Markov chain" + row["markov"],
        "LRURec      " + row["LRURec"]]
    assert run("evaluate", out / "model.npz") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "validation" + "".join(f"{report['validation'][metric]:11.4f}" for metric in SHOWN),
        "test      " + row["LRURec"]]
    assert f"{out} holds a run or a model: choose another --out" in refused(*tiny, "--out", out)


def test_every_flag_of_the_data_reaches_the_reader(tmp_path, capsys):
    text = "who,what,when\n" + "".join(f"u{u},i{(u + t) % 5},{t // 3}\n"
                                       for u in range(9) for t in range(9)) + "u9,i9,0\n" * 2
    file, titles = write(tmp_path / "f", text), write(tmp_path / "t", "i1,The One\ni2,Two\n")
    assert run("--data", file, "--columns", "who,what,when", "--ties", "random", "--min-count", 1,
               "--titles", titles, "--out", tmp_path / "r", "--epochs", 1, *TINY) == 0
    used, model = [file, 1, "random", 3, ["who", "what", "when"]], tmp_path / "r" / "model.npz"
    expected, (_, extra) = reader.load_dataset(*used, titles), train.read_model(model)
    assert extra["titles"] == expected.titles and "The One" in extra["titles"]
    assert extra["item_ids"] == expected.item_ids
    assert report_in(tmp_path / "r")["data"]["digest"] == extra["digest"] == expected.digest
    for place, other in ((1, 3), (2, "item"), (3, 4)):
        others = reader.load_dataset(*used[:place], other, *used[place + 1:])
        assert others.digest != extra["digest"]
    os.remove(titles)                              # the model holds them
    for command in (["evaluate"], ["recommend", "--user", "u3"], ["recommend", "the one"]):
        assert run(command[0], model, *command[1:]) == 0
    assert "ties by random" in capsys.readouterr().out


@pytest.mark.parametrize("n_rows, n_parts", [(1500, 2), (2900, 2), (7500, 2), (11500, 4),
                                             (20000, 6)])
def test_shards_are_cut_at_the_walls_nearest_to_equal_parts(n_rows, n_parts, monkeypatch):
    monkeypatch.setattr(train, "SHARD_ROWS", 3000)
    rng = np.random.default_rng(n_rows)
    batch = np.arange(n_rows), rng.integers(9, size=n_rows), np.zeros(n_rows, bool)
    batch[2][np.append(0, rng.choice(n_rows, n_rows // 50))] = True
    parts, walls = train.shards(*batch), np.flatnonzero(batch[2])
    assert all((np.concatenate(cut) == whole).all() for whole, *cut in zip(batch, *parts))
    assert all(part[2][0] for part in parts) and len(parts) == n_parts
    ends = np.cumsum([len(part[0]) for part in parts])[:-1]
    wanted = n_rows / n_parts * np.arange(1, n_parts)
    assert all(abs(end - w) == abs(walls - w).min() for end, w in zip(ends, wanted))
    assert len(train.shards(*batch[:2], np.arange(n_rows) == 0)) == 1


def test_shards_take_time_in_proportion_to_their_rows():
    batch, begin = 3 * [np.ones(400_000, bool)], time.process_time()
    tracemalloc.start()
    assert len(train.shards(*batch)) > 99
    assert tracemalloc.get_traced_memory()[1] < 2 ** 25 and time.process_time() - begin < 1
    tracemalloc.stop()


def test_the_gradients_of_the_shards_add_up_to_those_of_the_batch(monkeypatch):
    monkeypatch.setattr(train, "SHARD_ROWS", 9)
    params, batch = tiny_params(n_items=40), batch_of(60)
    batch[1][:20] = 0                              # a shard counts by its targets
    expected, whole = lrurec.loss_and_grads(params, *batch)
    for threads in (1, 2):
        config = {**DEFAULTS, "dropout": 0.0, "threads": threads}
        with ThreadPoolExecutor(threads) as pool:
            loss, grads = train.gradients(pool, params, batch, config, 0)
        assert loss == pytest.approx(expected, rel=1e-12)
        assert all(relative_error(grads[name], whole[name]) < 1e-10 for name in params)


def end_of(folder):
    """All that came out of a run, but the seconds it took: arrays, numbers."""
    (last, extra), (model, _) = (lrurec.load(folder / name) for name in ("last.npz", "model.npz"))
    report = report_in(folder)
    losses = [[h["loss"], h["Recall@10"], h["NDCG@10"]] for h in report["history"]]
    numbers = [extra["step"], report["epoch"], report["validation"], report["test"], losses]
    return {**last, **{"model/" + name: p for name, p in model.items()}}, numbers


def assert_same_end(folder, expected_folder):
    (arrays, numbers), (expected, expected_numbers) = end_of(folder), end_of(expected_folder)
    assert numbers == expected_numbers and arrays.keys() == expected.keys()
    assert [name for name in arrays if (arrays[name] != expected[name]).any()] == []


@pytest.mark.parametrize("average", [0, 0.9])
def test_threads_and_resume_change_nothing(average, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD_ROWS", 20)
    monkeypatch.setattr(train, "GROUP_ROWS", 40)
    start = [*tiny_run(tmp_path, items=60), "--average", average]
    for name, threads in (("one", 1), ("three", 3)):
        assert run(*start, "--out", tmp_path / name, "--epochs", 3, "--threads", threads) == 0
    assert run(*start, "--out", tmp_path / "two", "--epochs", 2) == 0
    assert run("--resume", "--out", tmp_path / "two", "--epochs", 3) == 0
    for name in ("three", "two"):
        assert_same_end(tmp_path / name, tmp_path / "one")
    report = report_in(tmp_path / "two")
    assert 0 < report["test"]["MRR"] < 1 and report["config"]["epochs"] == 3
    assert report["seconds"] == pytest.approx(sum(h["seconds"] for h in report["history"]))


def test_the_mean_of_the_weights_is_what_is_validated_tested_and_saved(tiny, tmp_path,
                                                                       monkeypatch):
    after, real_update = [], lrurec.adamw_update

    def update(params, *rest):
        if not after:                              # what the run begins with
            after.append({name: p.copy() for name, p in params.items()})
        real_update(params, *rest)
        after.append({name: p.copy() for name, p in params.items()})

    monkeypatch.setattr(lrurec, "adamw_update", update)
    out, data = tmp_path / "r", reader.load_dataset(tiny[1])
    assert run(*tiny, "--average", 0.4, "--epochs", 3, "--patience", 9, "--out", out) == 0
    report, (last, _), (params, _) = report_in(out), *map(lrurec.load, (
        out / "last.npz", out / "model.npz"))
    means = after[:1]
    for n, new in enumerate(after[1:], 1):         # d = min(D, (1 + n) / (10 + n)): 2/11, 3/12, ...
        d = min(0.4, (1 + n) / (10 + n))
        means.append({name: m + (1 - d) * (new[name] - m) for name, m in means[-1].items()})
    assert len(after) == 13
    for name, p in params.items():
        assert relative_error(p, means[4 * report["epoch"]][name]) < 1e-6, name
        assert relative_error(last["mean/" + name], means[-1][name]) < 1e-6, name
        assert (last[name] == after[-1][name]).all() and (last["mean/" + name] != last[name]).any()
    for split in ("validation", "test"):
        assert report[split] == train.evaluate(train.model_scorer(params), data, split, 200)


def test_each_run_epoch_and_shard_has_random_numbers_of_its_own(tiny, tmp_path, monkeypatch):
    drawn, real_batches, real_loss_and_grads = [[], []], reader.batches, lrurec.loss_and_grads

    def batches(rows, batch_size, rng):
        drawn[0].append(rng.bit_generator.state["state"]["state"])
        return real_batches(rows, batch_size, rng)

    def loss_and_grads(params, items, targets, starts, dropout, rng):
        drawn[1].append(rng.bit_generator.state["state"]["state"])
        assert dropout == 0.1
        return real_loss_and_grads(params, items, targets, starts, dropout, rng)

    monkeypatch.setattr(train, "SHARD_ROWS", 40)
    monkeypatch.setattr(reader, "batches", batches)
    monkeypatch.setattr(lrurec, "loss_and_grads", loss_and_grads)
    for seed in (5, 6):
        assert run(*tiny, "--out", tmp_path / str(seed), "--epochs", 2, "--lr", 0, "--seed", seed,
                   "--n-blocks", 3, "--max-phase", 0.5) == 0
        params, _ = lrurec.load(tmp_path / str(seed) / "model.npz")
        expected = lrurec.init_params(14, 8, n_blocks=3, rng=np.random.default_rng(seed),
                                      max_phase=0.5)
        assert list(params) == list(expected)
        assert all((params[name] == expected[name]).all() for name in expected)
    assert [len(set(states)) for states in drawn] == [4, 32], "runs, epochs, batches, shards"


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [0.02] * 8), ("cosine", 0.01 + 0.01 * np.cos(np.pi * np.arange(8) / 8))])
def test_step_size_decay_and_clipping_at_every_step(schedule, expected, tiny, tmp_path,
                                                    monkeypatch):
    used, real_update = [], lrurec.adamw_update

    def update(params, grads, opt, lr, weight_decay):
        assert weight_decay == 0.3
        assert lrurec.clip_gradients(grads, np.inf) == pytest.approx(5, rel=1e-3)
        used.append(lr)
        real_update(params, grads, opt, lr, weight_decay)

    monkeypatch.setattr(lrurec, "loss_and_grads", lambda params, *rest: (
        1.0, {name: np.full_like(p, 9) for name, p in params.items()}))
    monkeypatch.setattr(lrurec, "adamw_update", update)
    assert run(*tiny, "--out", tmp_path / "r", "--epochs", 2, "--schedule", schedule,
               "--weight-decay", 0.3) == 0
    assert used == pytest.approx(expected)


def raising(error):
    def function(*arguments, **options):
        raise error
    return function


def not_a_number(params, *rest):
    for p in params.values():
        p += np.nan


ENDS = [  # what happens within an epoch: where, the exit code, what the line says
    (reader, "batches", raising(KeyboardInterrupt()), 130, "train.py train --resume --out '"),
    (reader, "batches", raising(MemoryError()), 2, "out of memory: lower --d-model"),
    (lrurec, "clip_gradients", not_a_number, 2, "not finite in epoch 2: lower --lr"),
    (lrurec, "adamw_update", not_a_number, 2, "not finite in epoch 2: lower --lr"),
    (train, "gradients", lambda pool, params, *rest: (np.inf, {
        name: 0 * p for name, p in params.items()}), 2, "not finite in epoch 2: lower --lr"),
    (os, "fsync", raising(OSError(errno.ENOSPC, "full")), 2, ".npz: full: check the path")]


def test_a_run_that_ends_amid_an_epoch_keeps_those_before(tmp_path, capsys, monkeypatch):
    start, real_batches = [*tiny_run(tmp_path, items=60), "--epochs", 2], reader.batches
    assert run(*start, "--out", tmp_path / "whole") == 0
    assert report_in(tmp_path / "whole")["epoch"] == 2
    for case, (module, name, happens, code, message) in enumerate(ENDS):
        for epoch, out in ((1, tmp_path / "none"), (2, tmp_path / f"run {case}")):
            begun = []

            def batches(*arguments):
                begun.append(1)
                if len(begun) == epoch:
                    patch.setattr(module, name, happens)
                    if name == "batches":
                        happens()
                return real_batches(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(reader, "batches", batches)
                assert run(*start, "--out", out) == code, (name, epoch)
            error, expected = capsys.readouterr().err.strip(), message.replace("2:", f"{epoch}:")
            if code == 130 and epoch == 1:
                expected = "nothing was saved yet"
            assert expected in error and error.isprintable(), error
            assert not (tmp_path / "none").exists(), "a run that saved nothing leaves nothing"
        assert sorted(os.listdir(out)) == ["last.npz", "model.npz"]
        if code == 130:                            # as a kill between its two files leaves it
            shutil.copy(tmp_path / "whole" / "model.npz", out)
        assert run("--resume", "--out", out) == 0
        assert_same_end(out, tmp_path / "whole")
        capsys.readouterr()


def test_patience_ends_a_run_and_resume_keeps_it(tiny, tmp_path, refused):
    out = tmp_path / "r"
    assert run(*tiny, "--out", out, "--epochs", 40, "--patience", 2) == 0
    report = report_in(out)
    recalls = [h["Recall@10"] for h in report["history"]]
    assert report["epoch"] == 1 + np.argmax(recalls) == len(recalls) - 2 > 0
    assert run("--resume", "--out", out) == 0 and report_in(out) == report
    for flag, value in (("--lr", 1), ("--seed", 9), ("--average", 0.5), ("--d-model", 4)):
        assert f"{flag}: the run in" in refused("--resume", "--out", out, flag, value)


def test_without_anybody_to_validate_on_the_last_epoch_is_kept(tmp_path, capsys):
    file = write(tmp_path / "f", "".join(f"{u},{i}\n" for u in range(9) for i in (u % 3, 5)))
    assert run("--data", file, "--out", tmp_path / "r", "--min-count", 0, "--epochs", 3,
               "--patience", 1, *TINY) == 0
    report, out = report_in(tmp_path / "r"), capsys.readouterr().out
    assert report["epoch"] == 3 and report["validation"] is None and report["test"] is None
    assert report["history"][2]["Recall@10"] is None and report["history"][2]["NDCG@10"] is None
    assert out.count("no user to validate on *") == 3 and out.count("no user to evaluate") == 3


def test_from_python(tmp_path):
    for users, events, size in ((5, 3, 1400), (7, 3002, 1), (40, 12, 140)):
        data = dataset(np.arange(users * events) % 7 + 1, range(0, users * events + 1, events), 7)
        folder, config = tmp_path / f"new{size}" / "folder", {"epochs": 2, "d_model": 2,
                                                              "max_len": None}
        state = train.fit(data, config, folder)
        params, extra = train.read_model(folder / "model.npz")
        assert state["epoch"] == 2 and state["mean"].keys() == params.keys()
        assert extra["config"] == {**DEFAULTS, **config, "batch_size": size}, (
            "as many windows as hold about 1,400 training events")
    assert train.full_config({}) == DEFAULTS
    for config, message in (({"epohcs": 3}, "no setting 'epohcs': choose from .*epochs"),
                            ({"epochs": "x"}, "--epochs: must be an integer from 1 .*'x'"),
                            ({"epochs": 2.5}, "--epochs"), ({"ties": "foo"}, "--ties: .*foo")):
        with pytest.raises(reader.DataError, match=message):
            train.fit(data, config, tmp_path / "no")
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------
# A run's files

def test_two_runs_never_share_a_folder_and_resume_takes_the_last_written(tiny, tmp_path, refused,
                                                                         monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no run in runs/" in refused("--resume")
    codes, real_load, chosen = [], reader.load_dataset, ["--out", "both"]

    def load(*arguments):                          # the first run begins another amid its start
        if not codes:
            codes.append("begun")
            codes.append(run(*tiny, "--epochs", 1, *chosen))
        return real_load(*arguments)

    monkeypatch.setattr(reader, "load_dataset", load)
    assert run(*tiny, "--epochs", 2, *chosen) == 0
    assert codes == ["begun", 2] and "both holds a run" in capsys.readouterr().err
    assert len(report_in(tmp_path / "both")["history"]) == 2
    codes, chosen = [], []
    assert run(*tiny, "--epochs", 2) == 0 and codes == ["begun", 0]
    assert run(*tiny, "--epochs", 1) == 0 and run(*tiny, "--epochs", 1) == 0
    lengths = {path.name: len(report_in(path)["history"]) for path in Path("runs").iterdir()}
    assert lengths == {"toy": 2, "toy-2": 1, "toy-3": 1, "toy-4": 1}
    for name, seconds in (("toy", 8), ("toy-2", 9), ("toy-3", 7), ("toy-4", 6)):
        os.utime(Path("runs", name, "last.npz"), (seconds, seconds))
    assert run("--resume", "--epochs", 2) == 0
    assert f"run in {Path('runs', 'toy-2')}" in capsys.readouterr().out


def test_what_is_in_a_folder_is_never_overwritten(tiny, tmp_path, refused):
    write(tmp_path / "model.npz", "mine")          # a model without a run
    assert f"{tmp_path} holds a run or a model" in refused(*tiny, "--out", tmp_path)
    assert "nowhere" in refused("--data", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert (tmp_path / "model.npz").read_text() == "mine" and not (tmp_path / "new").exists()


def test_what_resume_says_and_does(tiny, tmp_path, refused):
    out, moved = tmp_path / "r", tmp_path / "moved.csv"
    assert "no epoch saved yet" in refused("--resume", "--out", out)
    os.mkdir(out)
    write(out / "last.npz", "")                    # as a kill in the first epoch leaves it
    assert "no epoch saved yet" in refused("--resume", "--out", out)
    assert "holds a run" in refused(*tiny, "--out", out)
    os.remove(out / "last.npz")                    # an empty folder will do
    assert run(*tiny, "--out", out, "--epochs", 1) == 0
    os.rename(tiny[1], moved)
    assert "toy.csv cannot be read" in refused("--resume", "--out", out)
    assert run("--resume", "--out", out, "--data", moved, "--epochs", 2) == 0
    report = report_in(out)
    assert len(report["history"]) == 2 and report["config"]["data"] == str(moved)
    assert run("evaluate", out / "model.npz", "--data", moved) == 0
    for change in (lambda a, e: a.pop("m/output_bias"), lambda a, e: e.pop("history"),
                   lambda a, e: e.update(step=-1), lambda a, e: a.update({"v/output_bias": 1}),
                   lambda a, e: e.update(history=[7]), lambda a, e: a.pop("output_bias")):
        edited(shutil.copy(out / "last.npz", tmp_path), out / "last.npz", change)
        error = refused("--resume", "--out", out, "--data", moved, "--epochs", 3)
        assert "last.npz holds no run to resume" in error
        shutil.copy(tmp_path / "last.npz", out)
    with open(moved, "a", encoding="utf-8") as file:
        file.write("\nu0,i0,99")
    for command in (["--resume", "--out", out], ["evaluate", out / "model.npz"]):
        assert "trained on other data" in refused(*command, "--data", moved)
    os.remove(out / "model.npz")
    assert "model.npz" in refused("--resume", "--out", out, "--data", moved)
    os.remove(out / "last.npz")                    # what a kill in the first epoch leaves
    assert "no epoch saved yet" in refused("--resume", "--out", out)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(tmp_path):
    out, start = tmp_path / "killed", [*tiny_run(tmp_path, items=60), "--epochs", 12, "--patience",
                                       99, "--threads", 2, "--average", 0.9]
    assert run(*start, "--out", tmp_path / "whole") == 0
    for epochs_before in (1, 6):                   # kill -9, somewhere in the epoch after these
        program = python("train.py", *(["--resume"] if out.exists() else start), "--out", out)
        with subprocess.Popen(**program, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("epoch") and int(line.split()[1]) > epochs_before:
                    process.kill()
                    break
        for name in ("model.npz", "last.npz"):
            lrurec.load(out / name)                # the old one or the new one, never half of one
    assert run("--resume", "--out", out) == 0
    assert_same_end(out, tmp_path / "whole")


unix = pytest.mark.skipif(os.name == "nt", reason="signals and shells of Unix")


@unix
@pytest.mark.parametrize("delay", [0, 0.02, 0.05])
def test_ctrl_c_at_any_moment_ends_with_130_and_at_most_two_lines(delay, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job ignores it
    program = python("train.py", *tiny_run(tmp_path), "--epochs", 100_000, "--patience", 100_000,
                     "--threads", 2, "--out", tmp_path / "r")
    with subprocess.Popen(**program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        while not process.stdout.readline().startswith("epoch   2"):
            pass                                   # the first epoch is saved by then
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=10)
    assert process.returncode == 130 and error.count("\n") <= 2, error
    assert "--resume --out" in error and lrurec.load(tmp_path / "r" / "last.npz")


@unix
@pytest.mark.parametrize("redirected, code, said", [
    ("2>&-", 0, 0), (">&-", 0, 1), ("<&-", 0, 0), (">&- 2>&-", 0, 0),
    pytest.param(">/dev/full", 2, 1, marks=pytest.mark.skipif(
        not os.path.exists("/dev/full"), reason="of Linux"))])
def test_closed_and_full_streams_lose_nothing_in_silence(redirected, code, said, tmp_path):
    program = python("train.py", *tiny_run(tmp_path), "--epochs", 2, "--out", tmp_path / "r")
    program["args"][:0] = ["sh", "-c", f'"$@" {redirected}', "sh"]
    done = subprocess.run(**program, capture_output=True, text=True)
    assert done.returncode == code and bool(done.stderr) == said, done.stderr
    assert done.stderr.count("\n") == 1 if code else len(report_in(tmp_path / "r")["history"]) == 2


def test_a_closed_pipe_ends_training_with_a_line_and_the_others_without(tiny, tmp_path, model):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for command, code, error in (
            ([*tiny, "--epochs", 100_000, "--patience", 100_000, "--out", tmp_path / "r"], 2,
             "output pipe closed"), (["recommend", model, "--all-users", "--top", 14], 0, "")):
        with subprocess.Popen(**python("train.py", *command), **pipes) as process:
            assert process.stdout.readline()
            process.stdout.close()
            assert process.wait(20) == code
            said = process.stderr.read()
        assert error in said and said.count("\n") == (1 if error else 0), said
    assert run("--resume", "--out", tmp_path / "r", "--epochs", 1) == 0, "its epoch is saved"


@pytest.mark.parametrize("imports, threads, n_warnings", [
    ("numpy, train", None, 1), ("train, numpy", None, 0), ("numpy, train", "1", 0)])
def test_numpy_imported_first_with_many_threads_is_one_warning(imports, threads, n_warnings):
    env = {name: value for name, value in os.environ.items() if not name.endswith("_THREADS")}
    env.update({"OPENBLAS_NUM_THREADS": threads} if threads else {})
    show = f"import os, {imports}; print(os.environ['OPENBLAS_NUM_THREADS'])"
    done = subprocess.run(**python("-c", show), env=env, capture_output=True, text=True)
    assert done.stdout == "1\n" and done.stderr.count("set OPENBLAS_NUM_THREADS=1") >= n_warnings
    assert done.stderr.count("UserWarning: NumPy was imported before train.py") == n_warnings


# ---------------------------------------------------------------------------------------------
# Recommending

IDS = ["", "7", "8", "9", "Heat", "l"]
TITLES = ["", "Heat (1995)", "Star Wars (1977)", "Star Trek (1979)", "8", "Lion King, The (1994)"]


@pytest.mark.parametrize("text, found", [
    ("7", 1), ("8", 2), ("Heat", 4), ("heat (1995)", 1), ("star wars", 2), (" TREK ", 3),
    ("the lion king", 5), ("Lion King, the", 5), ("the lion king (1994)", 5),
    ("star", r"matches 2 items.*Star Wars \(1977\) \[8\]; Star Trek \(1979\) \[9\]"),
    ("Star Wrs (1977)", r"no item.*nearest: Star Wars \(1977\)"), ("", "no item"),
    ("x\x1b[2J", r"no item 'x\\x1b\[2J'")])
def test_raw_id_beats_title_beats_part_of_a_title_else_candidates_are_named(text, found):
    if isinstance(found, int):
        assert train.find_item(text, IDS, TITLES) == found
    else:
        with pytest.raises(reader.DataError, match=found):
            train.find_item(text, IDS, TITLES)


def test_one_scan_of_a_long_history_is_the_same_as_stepping_through_it():
    params, items = tiny_params(n_items=30), np.random.default_rng(0).integers(1, 31, 19).tolist()
    scanned, stepped = train.visit(params, items), train.visit(params, [])
    for item in items:
        stepped = train.one_more(params, stepped, item)
    assert relative_error(scanned[1], stepped[1]) < 1e-12 and scanned[0] == stepped[0] == items
    logits = lrurec.score(params, lrurec.encode(params, np.array(items), np.zeros(19, bool))[-1])
    others = np.setdiff1d(np.arange(1, 31), items)
    nobody = train.visit(params, [])               # without a history: item 0, but no state of it
    assert (nobody[2] == lrurec.encode(params, [0], np.zeros(1, bool))[0]).all()
    assert nobody[1].shape == scanned[1].shape and not nobody[1].any()
    for n in (10, 99):
        best, scores, shares = train.best_items(params, scanned, n)
        assert best.tolist() == others[np.argsort(-logits[others])][:n].tolist()
        assert (scores == logits[best]).all()
        assert shares == pytest.approx(np.exp(logits[best]) / np.exp(logits[others]).sum())
        assert relative_error(scores, train.best_items(params, stepped, n)[1]) < 1e-10
    higher = {**params, "output_bias": params["output_bias"] + 1000}
    assert relative_error(train.best_items(higher, scanned, n)[2], shares) < 1e-9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    titles = write(folder / "titles", 'item,title\ni3,"Rock, The (1996)"\ni4,Undo\n')
    assert run(*tiny_run(folder), "--out", folder / "run", "--epochs", 4, "--max-len", 5,
               "--titles", titles) == 0
    return folder / "run" / "model.npz"


def edited(path, to, change):
    """Save the arrays and the JSON of the model at path to another one, after change(a, e)."""
    arrays, extra = lrurec.load(path)
    change(arrays, extra)
    np.savez(to, extra=np.array(json.dumps(extra)), **arrays)
    return to


def test_recommend_for_a_history(model, refused, capsys):
    assert run("recommend", model, "i3", "i5") == 0
    lines = capsys.readouterr().out.splitlines()
    params, extra = train.read_model(model)
    v3, v5 = extra["item_ids"].index("i3"), extra["item_ids"].index("i5")
    best = zip(*train.best_items(params, train.visit(params, [v3, v5]), 10))
    assert lines[0].split() == ["after", "2", "event(s)", "score", "probability"]
    assert [line.split() for line in lines[1:]] == [
        [str(n), *extra["titles"][v].split(), f"{s:.3f}", f"{p:.4f}"]
        for n, (v, s, p) in enumerate(best, 1)]
    assert run("recommend", model, "the rock", "--top", 3, "i5") == 0, "flags may stand anywhere"
    shorter = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shorter] == [line.split() for line in lines[:4]]
    assert run("recommend", model, "--new-user") == 0 and "after 0" in capsys.readouterr().out
    assert "no item" in refused("recommend", model, "nothing like it")
    assert "--new-user" in refused("recommend", model, "--new-user", "i3")
    assert run("recommend", model, *(f"i{k}" for k in range(14))) == 0, "nothing is left to show"
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 and printed.err == ""


@pytest.mark.parametrize("group_rows", [9, 2048])
def test_recommend_for_users_of_the_data(group_rows, model, tmp_path, refused, capsys, monkeypatch):
    monkeypatch.setattr(train, "GROUP_ROWS", group_rows)
    params, extra = train.read_model(model)
    data = reader.load_dataset(extra["config"]["data"])
    assert run("recommend", model, "--all-users", "--top", 4) == 0
    text = capsys.readouterr().out
    head, *rows = train.csv.reader(io.StringIO(text))
    assert head == ["user", "rank", "item", "title", "score"] and len(rows) == 30 * 4
    for u, raw in enumerate(data.user_ids):
        history = data.items[data.offsets[u]:data.offsets[u + 1]][-5:].tolist()
        best, scores, _ = train.best_items(params, train.visit(params, history), 4)
        mine = rows[4 * u:4 * u + 4]
        assert mine == [[raw, str(n), extra["item_ids"][v], extra["titles"][v], f"{s:.4f}"]
                        for n, (v, s) in enumerate(zip(best, scores), 1)]
        assert '"Rock, The (1996)"' in text
    assert run("recommend", model, "--user", "u7", "--top", 2) == 0
    u = 4 * data.user_ids.index("u7")
    assert list(train.csv.reader(capsys.readouterr().out.splitlines())) == [head, *rows[u:u + 2]]
    assert "no user 'nobody' in" in refused("recommend", model, "--user", "nobody")
    # others' data: what the model does not know is left out; who has nothing else is a new user
    other = write(tmp_path / "other.csv", "user,item,time\n" + "".join(
        f"a,i3,{t}\na,new,{t}\nb,new,{t}\nb,newer,{t}\n" for t in range(5)))
    assert run("recommend", model, "--all-users", "--data", other, "--top", 99) == 0
    rows = list(train.csv.reader(capsys.readouterr().out.splitlines()))[1:]
    assert [row[0] for row in rows] == ["a"] * 13 + ["b"] * 14 and "new" not in sum(rows, [])


def test_any_alphabet_in_any_terminal(tmp_path):
    words = "дом кот лес сад пол".split()
    text = "".join(f"u{u},{word},{t}\n" for u in range(6) for t, word in enumerate(words))
    file, out = write(tmp_path / "f.csv", text), tmp_path / "r"
    assert run("--data", file, "--out", out, "--epochs", 1, *TINY) == 0
    for titles, code in (([], 2), (["дом"], 0)):   # cp1252 cannot spell them
        done = subprocess.run(**python("train.py", "recommend", out / "model.npz", *titles),
                              env={**os.environ, "PYTHONIOENCODING": "cp1252"},
                              input="дом\n".encode(), capture_output=True)
        assert done.returncode == code and done.stderr.count(b"\n") == bool(code)
    assert b"\\u043a\\u043e\\u0442" in done.stdout


def test_recommend_from_a_pipe_answers_line_by_line(model, refused, capsys, monkeypatch):
    def answers(text, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert run("recommend", model, *flags) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    first, second, anew = answers("i3\ni5\n\ni5\n", "--top", 12)
    assert len(first) == 12 and "Rock, The (1996)" not in first
    assert not {"Rock, The (1996)", "i5"} & set(second) and "Rock, The (1996)" in anew
    assert answers("i5\n") == [anew[:10]]
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n\nwhat\n"))
    assert "standard input, line 3: no item 'what'" in refused("recommend", model)


def test_a_session_on_a_terminal(model, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def talk(lines, *flags):
        monkeypatch.setattr("sys.stdin", Terminal(lines))
        assert run("recommend", model, *flags) == 0
        return capsys.readouterr().out

    def tables(lines, *flags):
        return [after.splitlines()[:11] for after in talk(lines, *flags).split("    after ")[1:]]

    out = talk("i3\ni5\nUndo\nI6\nWHY\nreset\nundo\nwhy\nwhat\x1b is this\nHelp\n")
    assert re.findall(r"    after (\d+)", out) == ["1", "2", "1", "2", "0"]
    assert out.count(train.HELP) == 2 and "nothing to undo" in out and "no item" in out
    assert r"what\x1b is" in out and "nothing to explain" in out
    assert re.search(r"added i5; top 10 updated in \d+ µs", out)
    assert "Undo is taken as the command; for the item type its id, i4" in out
    first, _, undone, last = tables("i3\ni5\nundo\ni6\n")
    assert undone == first and last == tables("the rock\ni6\n")[1]
    assert len(tables("i3\n", "--top", 3)[0]) == 6, "heading, three items, time, prompt"
    for word in ("quit", "EXIT"):
        assert "after" not in talk(word + "\ni3\n")
    params, extra = train.read_model(model)        # why: without each of the events in turn
    history = [extra["item_ids"].index(raw) for raw in ("i3", "i5", "i9")]
    best = train.best_items(params, train.visit(params, history), 1)[0][0]
    whole, *without = [lrurec.score(params, train.visit(params, h)[2])[best] for h in (
        history, history[1:], history[::2], history[:2])]
    lines = talk("i3\ni5\ni9\nwhy\n").splitlines()
    at = lines.index(f"> {extra['titles'][best]}: without one of the events its score changes by")
    assert [line.split(None, 1) for line in lines[at + 1:at + 4]] == [
        [f"{s - whole:+.3f}", extra["titles"][v]] for s, v in zip(without, history)]
    assert "changes by" in talk("i3\nwhy\n"), "without its only event a history is the empty one"
    monkeypatch.setattr("builtins.input", raising(KeyboardInterrupt()))
    assert "after" not in talk("")


def test_compare(tmp_path, refused, capsys):
    tiny = tiny_run(tmp_path, items=60)
    for seed in (1, 2, 3):
        assert run(*tiny, "--out", tmp_path / str(seed), "--epochs", 1, "--seed", seed) == 0
    runs = [tmp_path / str(seed) for seed in (1, 2, 3)]
    capsys.readouterr()
    assert run("compare", *runs) == 0
    out = capsys.readouterr().out.splitlines()
    for split, table in (("validation", out[:7]), ("test", out[7:])):
        rows = [[report_in(folder)[split][name] for name in out[1].split()] for folder in runs]
        expected = [*rows, np.mean(rows, 0), np.std(rows, 0, ddof=1)]
        assert table[0] == split and len(set(map(tuple, rows))) == 3
        assert [line.split()[-7:] for line in table[2:]] == [
            [f"{value:.4f}" for value in row] for row in expected]
        names = [line[:-77].strip() for line in table[2:]]
        assert names == [*map(str, runs), "mean", "± sample std"]
    assert run("compare", runs[0]) == 0 and "mean" not in capsys.readouterr().out
    with open(tiny[1], "a", encoding="utf-8") as file:
        file.write("\nu0,i0,99")
    assert run(*tiny, "--out", tmp_path / "other", "--epochs", 1) == 0
    assert "different data" in refused("compare", *runs, tmp_path / "other")
    for text in ("", "{}", "[]", '{"data": {"digest": "x"}, "validation": {"MRR": "1"}}'):
        write(runs[1] / "metrics.json", text)
        assert "2/metrics.json holds no metrics" in refused("compare", *runs)
    os.remove(runs[1] / "metrics.json")
    assert "2/metrics.json holds no metrics" in refused("compare", *runs)


def test_inspect(model, capsys):
    assert run("inspect", model) == 0
    out = capsys.readouterr().out
    params, _ = lrurec.load(model)
    for k in (0, 1):
        lam, _ = lrurec.lam_forward(*(params[f"blocks.{k}.lru.{name}"].astype(float)
                                      for name in ("nu_log", "theta_log")))
        size = abs(lam)
        life = np.sort(np.log(0.5) / np.log(size))
        assert f"block {k}: mean |lam| {size.mean():.4f} (from {size.min():.2f} to " in out
        assert f"{size.max():.2f}); half-life in events: median {np.median(life):.2f}, 10 % " in out
        assert f"longest {life[-1]:.1f}" in out and life[1] < np.quantile(life, 0.1) < life[2]
    reals = sum(p.size * (2 if np.iscomplexobj(p) else 1) for p in params.values())
    assert f"{reals:,} parameters" in out
    picture = train.disk(np.array([1, 1j, -1, 0.2, 0.2, *[-0.5] * 12]))
    marks = {(n, m): c for n, line in enumerate(picture) for m, c in enumerate(line) if c > "."}
    assert marks == {(10, 40): "1", (0, 20): "1", (10, 0): "1", (10, 24): "2", (10, 10): "9"}
    assert "".join(picture).count(".") > 90


# ---------------------------------------------------------------------------------------------
# Files and flags made to harm

def config(**changes):
    return lambda a, e: e["config"].update(changes)


def new(name, value):
    return lambda a, e: e.update({name: value})


SOUND = "holds no sound model"
HARM = {  # what is done to the arrays a and the JSON e of a model -> what the line says
    "a billion blocks": (config(n_blocks=10 ** 9), "n-blocks"),
    "a million wide": (config(d_model=10 ** 6), "d-model"),
    "text wide": (config(d_model="wide"), "d-model"), "a list": (config(max_len=[1]), "max-len"),
    "a flag": (config(ties="item --resume"), "ties"),
    "an unknown setting": (config(speed=1), "no setting 'speed'"),
    "another digest": (new("digest", "0"), "other data"),
    **{name: (change, SOUND) for name, change in (
        ("a thousand blocks", config(n_blocks=1000)), ("65,536 wide", config(d_model=65536)),
        ("no config", lambda a, e: e.pop("config")), ("config of text", new("config", "x")),
        ("no titles", lambda a, e: e.pop("titles")), ("a number as ids", new("item_ids", 7)),
        ("too many titles", lambda a, e: e["titles"].append("x")),
        ("no items", lambda a, e: e.update(item_ids=[], titles=[])),
        ("no output_bias", lambda a, e: a.pop("output_bias")),
        ("no B", lambda a, e: a.pop("blocks.1.lru.B")),
        ("another name", lambda a, e: a.update(more=np.zeros(3))),
        ("another order", lambda a, e: a.update({name: a.pop(name) for name in [*a][::-1]})),
        ("another shape", lambda a, e: a.update(output_bias=a["output_bias"][1:])),
        ("float64", lambda a, e: a.update(output_bias=a["output_bias"].astype(float))),
        ("text", lambda a, e: a.update(output_bias=a["output_bias"].astype(str))),
        ("nan", lambda a, e: a["output_bias"].fill(np.nan)))}}


@pytest.mark.parametrize("name", HARM)
def test_a_harmful_model_file_is_one_line_that_names_it(name, model, tmp_path, refused):
    change, message = HARM[name]
    path, begin = edited(model, tmp_path / "bad.npz", change), time.process_time()
    error = refused("evaluate", path)
    assert message in error and str(path) in error and time.process_time() - begin < 1


@pytest.mark.filterwarnings("ignore")
def test_a_model_file_survives_random_edits(tmp_path):
    """Edits of its bytes, of its JSON (text, values), of its arrays: a good load or a line."""
    train.fit(dataset(np.arange(60) % 7 + 1, range(0, 61, 6), 7),
              {"epochs": 1, "d_model": 2, "n_blocks": 1}, tmp_path)
    rng, path, good = np.random.default_rng(0), tmp_path / "model.npz", 0
    values = [None, 0, -1, 3, 1e300, 10 ** 30, "", "x\n\x1b[2J", [], {}, [[0]], True]
    (arrays, extra), raw = lrurec.load(path), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    def npy(array):
        np.save(file := io.BytesIO(), array)
        return file.getvalue()

    for n in range(2000):
        changed, name = dict(entries), [*arrays][rng.integers(len(arrays))]
        if n % 4 == 1:
            text = scrambled(json.dumps(extra).encode(), rng).decode("latin-1").rstrip("\0")
            changed["extra.npy"] = npy(np.array(text))
        elif n % 4 == 2:
            new = json.loads(json.dumps(extra))
            inside = [new, new["config"], new["titles"], new["item_ids"]][rng.integers(4)]
            places = [*inside] if isinstance(inside, dict) else range(len(inside))
            inside[places[rng.integers(len(places))]] = values[rng.integers(len(values))]
            changed["extra.npy"] = npy(np.array(json.dumps(new)))
        elif n % 4 == 3:
            array, old = arrays[name], entries[name + ".npy"]
            changed[name + ".npy"] = [scrambled(old, rng), npy(array[None]), npy(array.T), b"", npy(
                array.astype(">f8")), npy(array[:-1]), npy(np.nan * array)][rng.integers(7)]
        write(path, zip_of(changed).getvalue() if n % 4 else scrambled(raw, rng))
        try:
            params, found = train.read_model(str(path))
            assert all(title.isprintable() for title in found["titles"])
            train.best_items(params, train.visit(params, [1]), 3)
            good += 1
        except reader.DataError as error:
            assert str(path) in str(error) and str(error).isprintable(), str(error)
    assert 50 < good < 1000, good


def test_no_code_runs_from_a_model_file_and_no_escape_reaches_a_terminal(tmp_path, model, capsys):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))
    np.savez(tmp_path / "m.npz", extra=np.array([Bomb()], object))
    with pytest.raises(reader.DataError, match="m.npz is not a model file"):
        train.read_model(tmp_path / "m.npz")
    assert not (tmp_path / "exploded").exists()

    def change(arrays, extra):
        extra["titles"][1:] = ["\x1b[2J" + title for title in extra["titles"][1:]]
        extra["item_ids"][1:] = ["\x1b[2J" + raw for raw in extra["item_ids"][1:]]
    path = edited(model, tmp_path / "m.npz", change)
    for arguments in (["--new-user"], ["--all-users"], ["x2JUndo"], ["\\x1b[2Ji3"]):
        run("recommend", path, *arguments)
        out, err = capsys.readouterr()
        assert (out + err).replace("\n", "").isprintable() and "\\x1b" in out + err


COMMAND_MISTAKES = [  # arguments, what the line says
    (["--epochs", "0"], "--epochs: must be an integer from 1"),
    (["--dropout", "1"], "from 0 to 0.99"), (["--max-phase", "0"], "--max-phase"),
    (["--max-phase", "1.5"], "to 1 "), (["--ties", "x"], "choose from"), (["--lr", "nan"], "--lr"),
    (["--max-len", "x"], "--max-len"), (["--max-len", "0"], "--max-len"),
    (["--average", "1"], "--average"), (["--threads", "1.5"], "--threads"),
    (["--schedule", "x"], "choose from"), (["--device", "x"], "choose from"),
    (["--data", "/nowhere.csv"], "/nowhere.csv cannot be read"), (["--data", ""], ""),
    (["--columns", "user"], "USER,ITEM"),
    (["evaluate", "/nowhere.npz"], "/nowhere.npz"), (["inspect", __file__], "not a model file"),
    (["compare"], "RUN"), (["recommend", "m.npz", "--top", "0"], "--top"),
    (["recommend", "m.npz", "--user", "u", "--all-users"], "not allowed with"),
    (["--out", os.path.join(__file__, "run")], os.path.basename(__file__)),
    (["evalute", "m.npz"], "invalid choice: 'evalute'"),
    (["train", "extra"], "unrecognized arguments: extra"),
    (["--no-such"], "unrecognized arguments: --no-such"), (["--\x1b[2J"], r"\x1b[2J"),
    (["recommend", "/nowhere.npz", "1", "--new-users"], "--new-users"),
    *[([flag, "1" + "0" * digits], "") for digits in (20, 30, 400) for flag in (
        "--max-len --d-model --epochs --seed --n-blocks --batch-size --patience --threads --lr "
        "--min-count --weight-decay --max-phase --average --dropout").split()],
]


@pytest.mark.parametrize("case", range(len(COMMAND_MISTAKES)))
def test_a_mistake_ends_with_2_and_one_line_and_leaves_nothing(case, refused, tmp_path,
                                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reader, "fetch_movielens", lambda name: "no such archive")
    arguments, message = COMMAND_MISTAKES[case]
    error = refused(*arguments)
    assert message in error and os.listdir(tmp_path) == []
    assert message or arguments[0] in error or "cannot be read" in error


# ---------------------------------------------------------------------------------------------
# The front door

def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def test_every_command_in_the_readme_parses():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", readme(), re.S | re.M)
    code = "".join(text for language, text in blocks if not language)
    lines = [line.partition("  #")[0] for line in code.splitlines() if line.startswith("python ")]
    commands = [part for line in lines for part in line.split("&&")]
    for command in commands:
        words = shlex.split(command.partition(">")[0])
        if words[1] == "train.py":
            train.parse_arguments(words[2:])       # raises DataError
        elif words[1] == "test_lrurec.py":
            names = [word.removesuffix(".py") for word in words[2:]]
            assert all(name in [*EXERCISES, "train", "pytorch", "--hint", "*"] for name in names)
        else:
            assert words[1:4] in (["-m", "pip", "install"], ["-m", "pytest", "-q"]), command
    shown = " ".join(commands)
    assert [name for name in ("test_lrurec.py gelu > gelu.py", "test_lrurec.py gelu.py",
                              *("--" + name.replace("_", "-") for name in DEFAULTS))
            if name not in shown] == []


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    """On other data: users who walk round a ring of items, with numbers as ids."""
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), re.S | re.M)
    items = (np.arange(400)[:, None] * 7 + np.arange(12)) % 1349 + 1
    monkeypatch.setattr(reader, "load_dataset", lambda *arguments, **options: dataset(
        items.ravel(), range(0, 4801, 12), 1349))
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    assert blocks and [name for name in os.listdir(tmp_path) if name.endswith(".npy")]


def test_help_lists_every_flag_with_its_default(capsys):
    for command, flags in (("train", DEFAULTS), ("evaluate", ["threads", "device", "data"]),
                           ("recommend", ["top", "user", "all_users", "new_user", "threads"]),
                           ("compare", []), ("inspect", []), ("bench", ["threads", "device"])):
        assert run(command, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        for name in flags:
            assert "--" + name.replace("_", "-") in text, name
            if command == "train" and DEFAULTS[name] is not None:
                assert f"(default: {DEFAULTS[name]})" in text, name
        assert ("that the model was trained on" in text) == (command in ("evaluate", "recommend"))
        assert run("-h") == 0 and f"{command} " in capsys.readouterr().out


def quick(work, repeat=5):
    """For train.timed; without the scans and the large models, which take their time."""
    if repeat not in (3, 5):
        work()
    return 1e-6


# ---------------------------------------------------------------------------------------------
# The GPU, on machines without one: a stand-in for CuPy whose arrays refuse NumPy

class DeviceArray:
    """An array that NumPy cannot read and no NumPy array can be mixed with, as on a card."""
    __array_ufunc__ = None                         # NumPy's operators give up
    reads = 0                                      # copies to the host, each a wait for the card

    def __init__(self, array):
        self.inside = np.asarray(array)

    def __array__(self, *args, **options):
        raise TypeError("a device array was handed to NumPy")

    def get(self):
        DeviceArray.reads += 1
        return self.inside.copy()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.inside, name)
        return on_device(value) if callable(value) else wrapped(value)

    def __setitem__(self, index, value):
        self.inside[unwrapped(index)] = unwrapped(value)

    def __bool__(self):
        return bool(self.get())


def unwrapped(x):
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array was handed to the device")
    if isinstance(x, (tuple, list)):
        return type(x)(map(unwrapped, x))
    return x.inside if isinstance(x, DeviceArray) else x


def wrapped(x):
    return DeviceArray(x) if isinstance(x, (np.ndarray, np.generic)) else x


def on_device(function):
    def call(*args, **options):
        result = function(*map(unwrapped, args), **{k: unwrapped(x) for k, x in options.items()})
        return options.get("out", wrapped(result))
    return call


for operator in ("add sub mul truediv pow matmul and or lt le gt ge eq ne neg abs invert getitem "
                 "len radd rsub rmul rtruediv iadd isub imul itruediv ior").split():
    def method(self, *others, name=f"__{operator}__"):
        result = getattr(self.inside, name)(*map(unwrapped, others))
        return self if name[2] == "i" and name != "__invert__" else wrapped(result)
    setattr(DeviceArray, f"__{operator}__", method)


class StandIn:
    """As much of CuPy as we use; the two kernels are done here by the definition."""
    inf, ndarray, broken = np.inf, DeviceArray, False
    add = type("add", (), {"at": staticmethod(on_device(np.add.at))})
    asarray = staticmethod(lambda x, dtype=None: DeviceArray(
        np.array(x.inside if isinstance(x, DeviceArray) else x, dtype)))

    class cuda:
        class get_current_stream:
            synchronize = staticmethod(lambda: None)

    def __getattr__(self, name):
        if self.broken:
            raise RuntimeError("no CUDA-capable device is detected")
        return on_device(getattr(np, name))

    def ElementwiseKernel(self, inputs, outputs, body, name):
        def lru_scan(lam, starts, N, H, h, size):
            h[:] = lrurec.scan_loop(lam, h, starts)
            assert (N, N * H) == (len(h), size)

        def random_bytes(seed, size):
            return np.random.default_rng(seed).integers(256, size=size, dtype=np.uint8)
        return on_device({"lru_scan": lru_scan, "random_bytes": random_bytes}[name])


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", StandIn())
    yield lrurec.use_device
    lrurec.use_device("cpu")


def test_the_same_numbers_on_the_stand_in_and_no_wait_inside_a_step(gpu):
    params, batch = tiny_params(n_items=40), batch_of(40)
    gpu("gpu")
    device = {name: lrurec.xp.asarray(p) for name, p in params.items()}
    opt, settings = lrurec.adamw_init(device), {**DEFAULTS, "dropout": 0.3, "threads": 1}
    DeviceArray.reads = 0
    results = everything(device, *batch)
    _, grads = train.gradients(None, device, batch, settings, 0)
    lrurec.clip_gradients(grads, 5)
    lrurec.adamw_update(device, grads, opt, 0.01, 0.01)
    assert len(train.shards(*2 * [np.arange(9999)], np.ones(9999, bool))) == 1
    assert DeviceArray.reads == 0, "each wait for the card costs more than the step's kernels"
    results = [lrurec.to_host(result) for result in results]
    gpu("cpu")
    for a, b in zip(results, everything(params, *batch)):
        assert relative_error(a, b) < 1e-12
    for stray in (lambda z: np.exp(z), lambda z: np.ones(3) * z, lambda z: z + np.ones(3),
                  lambda z: np.concatenate([z, z]), lambda z: z[np.array([0])], float):
        with pytest.raises(TypeError):             # the stand-in catches a stray NumPy call
            stray(DeviceArray(np.ones(3)))


def test_the_whole_program_on_the_stand_in_and_its_model_on_the_cpu(gpu, tiny, tmp_path, capsys,
                                                                    monkeypatch):
    model, device = tmp_path / "run" / "model.npz", ["--device", "gpu"]
    run_of = [*tiny, "--out", tmp_path / "run"]
    monkeypatch.setattr(train, "timed", quick)
    assert run("bench", *tiny[:2]) == 0 and "128 x    100" in capsys.readouterr().out
    for command in ([*run_of, "--epochs", 2, "--average", 0.9],
                    ["--resume", *run_of[-2:], "--epochs", 3], ["evaluate", model],
                    ["recommend", model, "--user", "u3"],
                    ["bench", *tiny[:2]], ["recommend", model, "i3"]):
        assert run(*command, *device) == 0
    on_gpu = capsys.readouterr().out.splitlines()[-10:]
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n"))
    assert run("recommend", model, *device) == 0
    gpu("cpu")
    capsys.readouterr()
    assert run("recommend", model, "i3") == 0 and capsys.readouterr().out.splitlines()[1:] == on_gpu


def test_without_cupy_or_a_card_one_line_says_what_to_install(monkeypatch, refused):
    assert "cupy" not in sys.modules, "nobody asked for it"
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert 'pip install "cupy' in refused("--device", "gpu")
    monkeypatch.setattr(StandIn, "broken", True)
    monkeypatch.setitem(sys.modules, "cupy", StandIn())
    assert "NVIDIA GPU (no CUDA-cap" in refused("--device", "gpu") and lrurec.xp is np
