# SPDX-License-Identifier: MIT
"""The exercises and their grader first, then the tests: every derivative against central
differences, the fast against the plain, the program from end to end.

    python -m pytest -q                          the tests
    python test_lrurec.py check                  every gradient of the whole model
    python test_lrurec.py                        the exercises, easy to hard
    python test_lrurec.py gelu > gelu.py         one of them: fill in the empty body
    python test_lrurec.py gelu --hint            its derivative, in letters
    python test_lrurec.py gelu.py scan.py        grade one file or several
    python test_lrurec.py train gelu.py scan.py  train a small model with your functions
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
# The check: every gradient of the whole model

def check_batch():
    """items, targets, starts (16,) with all that a batch can hold: items that occur twice, id 0,
    rows without a target; walls before row 1, two in a row, then none for long."""
    items = np.array([0, 3, 1, 3, 5, 0, 7, 3, 2, 2, 6, 1, 4, 7, 7, 5])
    targets = np.array([3, 1, 3, 5, 0, 7, 3, 2, 2, 0, 1, 4, 7, 7, 5, 0])
    starts = np.isin(np.arange(16), [1, 4, 5])
    return items, targets, starts


def check_gradients():
    """Compare loss_and_grads with central differences of the loss, along every entry of every
    parameter; print a line a tensor and a summary -> the largest relative error.
    Two blocks, in float64; the dropout masks are those of a generator made anew for each call.
    """
    params, batch, numbers, largest = tiny_params(), check_batch(), 0, 0.0

    def loss_and_grads():
        return lrurec.loss_and_grads(params, *batch, dropout=0.3, rng=np.random.default_rng(7))

    _, grads = loss_and_grads()
    print(f"{'tensor':26} {'shape':8} {'kind':8} relative error")
    for name, p in params.items():
        error = relative_error(grads[name], numeric_gradient(lambda: loss_and_grads()[0], p))
        kind = "complex" if np.iscomplexobj(p) else "real"
        print(f"{name:26} {str(p.shape):8} {kind:8} {error:.0e}")
        numbers += lrurec.real_view(p).size
        largest = max(largest, error) if error == error else np.inf   # nan is no small error
    print(f"{len(params)} tensors, {numbers} numbers, largest relative error {largest:.0e}")
    return largest


# ---------------------------------------------------------------------------------------------
# The grader: what an answer returns beside what is expected, tensor by tensor

class Wrong(AssertionError):
    """What the grader found, in the learner's terms."""


def same(a, n, tolerance=1e-5):
    return (type(a) is np.ndarray and a.shape == n.shape and a.dtype == n.dtype
            and relative_error(a, n) < tolerance)         # nan is not


def by_name(name, result, outputs, note=""):
    """What `name` returned, as a dict of tensors; a dict in it counts as its entries."""
    if result is None:
        raise Wrong(f"your {name} returned nothing{note}: a return statement is missing")
    values = result if isinstance(result, tuple) and len(outputs) > 1 else (result,)
    if len(values) != len(outputs):
        count = f"{len(values)} values" if len(values) > 1 else f"1 value ({type(result).__name__})"
        raise Wrong(f"your {name} returned {count}, it should return {len(outputs)}: "
                    f"{', '.join(outputs)}")
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
        missing, unknown = expected.keys() - given.keys(), given.keys() - expected.keys()
        raise Wrong(f"gradients by name. Missing: {sorted(missing)}; "
                    f"not wanted: {sorted(map(str, unknown))}")
    wrong = [name for name, n in expected.items() if not same(given[name], n, tolerance)]
    if not wrong:
        return
    rows = [note, f"  {'tensor':26} {'shape':8} {'error':>8}"]
    for name, n in expected.items():
        if len(expected) > 20 and name not in wrong:
            continue                               # a whole model: the wrong ones alone
        a, error, verdict = given[name], "", "WRONG" if name in wrong else "ok"
        if type(a) is np.ndarray and a.shape == n.shape and a.dtype == n.dtype:
            error = f"{relative_error(a, n):.1e}"
            if name in wrong:
                worst = np.unravel_index(np.argmax(abs(a - n)), n.shape)
                verdict += (f"  at {list(map(int, worst))}: yours {a[worst]:.8g}, "
                            f"expected {n[worst]:.8g}")
        rows.append(f"  {name:26} {str(n.shape):8} {error:>8}  {verdict}")
    if len(wrong) > 1:
        rows.append(f"  first wrong: {wrong[0]}; what comes after may rest on it")
    rows.append(f"  hint: {hint(wrong[0], given, expected, mistakes)}")
    raise Wrong("\n".join(rows))


def hint(name, given, expected, mistakes):
    """What the difference between a tensor and what is expected looks like."""
    a, n = given[name], expected[name]
    if type(a) is not np.ndarray:
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
        if name in tensors and same(a, tensors[name]) and not same(n, tensors[name]):
            return text
    factor = np.vdot(n, a).real / np.vdot(n, n).real
    if same(a, factor * n):
        return f"a constant factor: it is {factor:.6g} times what it should be"
    wrong = ~np.isclose(a, n, 1e-5).reshape(len(n), -1).all(1)
    rows = "every row" if wrong.all() else f"rows {np.flatnonzero(wrong).tolist()} of {len(n)}"
    return f"no known pattern; wrong in {rows}: check each term of the formula for this tensor"


def check(name, function, arguments, expected, outputs=None, may_change=(), note="",
          tolerance=1e-6):
    """Grade one call of an answer. Raises Wrong. outputs: what it returns, in order."""
    outputs, given = outputs or list(expected), copy.deepcopy(arguments)
    parameters = inspect.signature(getattr(lrurec, name)).parameters

    def contents():
        named = arrays_in(dict(zip(parameters, given)), names=CACHES.get(name, ()))
        return {label: array.tobytes() for label, array in named}

    before = contents()
    with np.errstate(all="ignore"):
        try:
            result = function(*given)
        except Exception as error:
            raise Wrong(f"your {name} raised an error{note}") from error
        for label, new in contents().items():
            if label not in may_change and new != before.get(label):
                raise Wrong(f"your {name} changed {label}: work on a copy")
        mistakes = usual_mistakes(name, dict(zip(parameters, arguments)), expected, outputs)
        compare(by_name(name, result, outputs, note), expected, mistakes, tolerance,
                f"your {name} is wrong{note}")


# ---------------------------------------------------------------------------------------------
# The usual mistakes: what our function returns where one of the arrays that it gets is changed;
# and, where that does not tell, a formula

CHANGES = [  # kinds of arrays (f and c: numbers, b: starts), hint, what they become
    ("fc", "{} is missing: this is what 1 in its place gives", np.ones_like),
    ("fc", "a conjugate is missing, or one too many: {0} for conj({0}), or the reverse", np.conj),
    ("fc", "the terms with {} are missing (in a block: a branch)", np.zeros_like),
    ("fc", "the sign: this is what -{} in its place gives", np.negative),
    ("b", "the walls are ignored", np.zeros_like),
    ("b", "the recurrence is missing", np.ones_like),
    ("b", "the walls are shifted by a row", lambda starts: np.roll(starts, 1)),
    ("b", "the walls are shifted by a row", lambda starts: np.roll(starts, -1))]
CACHES = {  # the names of what a cache holds, where it is a tuple
    "linear_backward": ["x", "W"], "gelu_backward": ["x", "s"],
    "layer_norm_backward": ["xhat", "rstd", "scale"], "lam_backward": ["nu", "theta", "lam"],
    "cross_entropy_backward": ["exps", "sums", "targets", "weights"]}


def arrays_in(value, label="", names=()):
    """(name, array) pairs: every array in a nest of dicts, tuples and lists."""
    if isinstance(value, np.ndarray):
        yield label, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from arrays_in(entry, f'{label}["{key}"]' if label else key, names)
    elif isinstance(value, (tuple, list)):
        known = names if label == "cache" else ()
        for i, entry in enumerate(value):
            yield from arrays_in(entry, known[i] if known else f"{label}[{i}]", names)


def formulas(name, expected, arguments):
    """(hint, tensors) pairs for mistakes that no change of an array tells."""
    if name == "gelu_backward":
        dout, (x, s) = arguments
        r = 2 * lrurec.GELU_C * (1 + 3 * lrurec.GELU_A * x * x)   # the slope of s's argument
        yield ("the slope of s is s (1 - s), not 1 - s^2: s is a sigmoid, no tanh",
               {"dx": dout * (s + x * (1 - s * s) * r)})
    if name == "cross_entropy_backward":
        dloss, (exps, sums, _, weights) = arguments
        softmax = exps / sums[:, None]
        yield "the one-hot target is missing", {"dlogits": dloss * weights[:, None] * softmax}
    if name == "layer_norm_backward":
        dout, (xhat, rstd, scale) = arguments
        dxhat, D = dout * scale, len(scale)
        first, second = lrurec.row_mean(dxhat), xhat * lrurec.row_mean(dxhat * xhat)
        yield "both means are missing", {"dx": rstd * dxhat}
        yield "the first mean is missing: x moves the mean too", {"dx": rstd * (dxhat - second)}
        yield "the second mean is missing: x moves rstd too", {"dx": rstd * (dxhat - first)}
        yield "sums in place of means", {"dx": rstd * (dxhat - D * first - D * second)}
    if name == "scan_backward":
        dh, _, h, starts = arguments
        g, no_wall = expected["du"], ~starts[1:, None]
        yield "the walls are ignored in dlam", {"dlam": (h[:-1].conj() * g[1:]).sum(0)}
        yield "dlam takes du, not dh", {"dlam": (no_wall * h[:-1].conj() * dh[1:]).sum(0)}
        yield ("dlam takes h of the row before, h_{n-1}",
               {"dlam": (no_wall * h[1:].conj() * g[1:]).sum(0)})
    if name == "lru_backward":
        _, cache = arguments
        yield ("the factor gamma is missing: the gradient is by gamma_log",
               {"dgamma_log": expected["dgamma_log"] / cache["gamma"]})
        yield ("gamma counts twice: u already holds it",
               {"dgamma_log": expected["dgamma_log"] * cache["gamma"]})
    if name == "backward":
        dhidden, (items, *rest), E = arguments
        rows = [np.arange(len(items)), *rest]      # as if no item occurred twice
        dx, lost = lrurec.backward(dhidden, rows, dhidden)["item_embedding"], np.zeros_like(E)
        lost[items] = dx
        yield ("an item that occurs twice gets the sum of its rows: dE[items] += dx keeps the last "
               "row alone", {"item_embedding": lost})


def usual_mistakes(name, arguments, expected, outputs):
    """(hint, tensors) pairs, the most special first."""
    rows = len(np.atleast_1d(next(iter(arguments.values()))))
    means = {key: n / rows for key, n in expected.items()}
    yield "a mean over the rows in place of their sum", means
    yield from formulas(name, expected, arguments.values())
    names = CACHES.get(name, ())
    for kinds, text, change in CHANGES:
        for k, (label, array) in enumerate(arrays_in(arguments, names=names)):
            if array.dtype.kind not in kinds:
                continue
            others = copy.deepcopy(arguments)
            list(arrays_in(others))[k][1][...] = change(array)
            with np.errstate(all="ignore"):
                result = getattr(lrurec, name)(*others.values())
            tensors = by_name(name, result, outputs)
            yield text.format(label), tensors
            if change is np.zeros_like:            # or what is added to those terms is lost
                only = {key: n - tensors[key] for key, n in expected.items()}
                yield (f"only the terms with {label} are there: what is added to them is missing "
                       "(in a block: a residual)"), only


# ---------------------------------------------------------------------------------------------
# One grader for each function that is asked for; it raises Wrong

def grade_backward(name, forward, inputs, function, more=(), **options):
    """Grade by central differences of a random projection of forward() -> out, cache.

    inputs: arrays, which forward works on, by their gradients' names; more: arguments.
    """
    out, cache = forward()
    dout = np.array((compl if np.iscomplexobj(out) else real)(*np.shape(out), seed=9))

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
    x = real(5, 6)
    for p in (0.4, 0):
        grade_backward("dropout_backward",
                       lambda: lrurec.dropout_forward(x, p, np.random.default_rng(3)),
                       {"dx": x}, function, note=f" for p = {p}; with p = 0 the mask is None")


def grade_cross_entropy(function):
    targets, weights = np.array([1, 4, 0, 2, 3]), np.array([0.5, 0.2, 0.0, 0.3, 0.7])
    logits = 3 * real(5, 6)
    grade_backward("cross_entropy_backward",
                   lambda: lrurec.cross_entropy_forward(logits.copy(), targets, weights),
                   {"dlogits": logits}, function, may_change=["exps"])


def walls_of(starts):
    rows = np.flatnonzero(starts).tolist()
    return f"walls before rows {rows if len(rows) < 30 else '...'} of {len(starts)}"


def grade_scan(function):
    """Any N, any walls, any |lam|."""
    for N in (11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 100, 700):
        for p_wall, radius in itertools.product((0.3, 0, 1), (0.9, 0.3, 0.9999)):
            starts = np.random.default_rng(N).random(N) < p_wall
            lam, u = lam_of(5, radius), compl(N, 5)
            check("scan", function, (lam, u, starts), {"h": lrurec.scan_loop(lam, u, starts)},
                  note=f" for |lam| = {radius}, {walls_of(starts)}", tolerance=1e-12)
    grade_speed("scan", function, lrurec.scan_loop,
                (lam_of(1), compl(20_000, 1), np.zeros(20_000, bool)))


def grade_scan_backward(function):
    lam = lam_of(4)
    for N in (11, 1, 2, 64):
        starts = STARTS if N == 11 else np.random.default_rng(N).random(N) < 0.3
        dh, h = compl(N, 4), lrurec.scan_loop(lam, compl(N, 4, seed=2), starts)
        dlam, du = lrurec.scan_backward_loop(dh, lam, h, starts)
        check("scan_backward", function, (dh, lam, h, starts), {"du": du, "dlam": dlam},
              ["dlam", "du"], note=f" with {walls_of(starts)}", tolerance=1e-12)
    grade_speed("scan_backward", function, lrurec.scan_backward_loop,
                (compl(20_000, 1), lam_of(1), compl(20_000, 1), np.zeros(20_000, bool)))


def grade_speed(name, function, loop, arguments):
    """O(log N) array operations take a fiftieth of the loop's time."""
    def seconds(function):
        begin = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - begin

    yours, slow = min(seconds(function) for _ in range(3)), seconds(loop)
    if yours > slow / 4:
        raise Wrong(f"your {name} gives the right values, but it is N steps long, as slow as a "
                    f"loop over the rows: {1000 * yours:.0f} ms for N = 20,000, where the loop "
                    f"takes {1000 * slow:.0f} ms. The exercise asks for O(log N) array operations")


def grade_lru(function):
    D, H = 3, 4
    inputs = {"dx": real(11, D), "dnu_log": real(H) - 1, "dtheta_log": real(H, seed=3),
              "dgamma_log": real(H, seed=4), "dB": compl(D, H), "db_B": compl(H),
              "dC": compl(H, D), "db_C": real(D)}
    order = ["dC", "db_C", "dgamma_log", "dB", "db_B", "dx", "dnu_log", "dtheta_log"]
    grade_backward("lru_backward", lambda: lrurec.lru_forward(*inputs.values(), STARTS),
                   {key: inputs[key] for key in order}, function, outputs=list(inputs),
                   note=f" with {walls_of(STARTS)}")


BLOCK_ORDER = ["ffn_norm.scale", "ffn_norm.shift", "ffn.W2", "ffn.b2", "ffn.W1", "ffn.b1",
               "lru_norm.scale", "lru_norm.shift", "lru.C", "lru.b_C", "lru.gamma_log", "lru.B",
               "lru.b_B", "lru.nu_log", "lru.theta_log"]          # of the backward pass


def grade_block(function):
    p, x = lrurec.blocks(tiny_params(n_blocks=1))[0], real(11, 4)
    inputs = {**{name: p[name] for name in BLOCK_ORDER}, "dx": x}
    for dropout in (0.3, 0.0):
        grade_backward(
            "block_backward",
            lambda: lrurec.block_forward(x, p, STARTS, dropout, np.random.default_rng(2)),
            inputs, function, outputs=["dx", "dp"],
            note=f" with dropout {dropout}, {walls_of(STARTS)}")


def grade_model(function):
    items = np.random.default_rng(4).integers(0, 7, 11)           # without the last one, 7
    for dropout, n_blocks in ((0.3, 2), (0.0, 1)):
        params = tiny_params(n_blocks=n_blocks)
        order = [f"blocks.{k}.{name}" for k in reversed(range(n_blocks)) for name in BLOCK_ORDER]
        order += ["embedding_norm.scale", "embedding_norm.shift", "item_embedding"]
        grade_backward(
            "backward",
            lambda: lrurec.forward(params, items, STARTS, dropout, np.random.default_rng(6)),
            {name: params[name] for name in order}, function, [params["item_embedding"]],
            outputs=["grads"],
            note=f" with {n_blocks} blocks, dropout {dropout}, items {items.tolist()}, "
                 f"{walls_of(STARTS)}")


def adamw_plain(t, params, grads, opt, lr, weight_decay, betas, eps, eps_in_root=False):
    """Step t as its equations say it -> what it changes, by name."""
    tensors, (beta1, beta2) = {"step": np.array([opt["step"] + 1])}, betas
    for name, p in params.items():
        g = lrurec.real_view(grads[name])          # a complex number is two real ones
        m = beta1 * opt["m"][name] + (1 - beta1) * g
        v = beta2 * opt["v"][name] + (1 - beta2) * g ** 2
        mhat, vhat = m / (1 - beta1 ** t), v / (1 - beta2 ** t)
        root = np.sqrt(vhat + eps) if eps_in_root else np.sqrt(vhat) + eps
        kept = 1 - lr * weight_decay if name.endswith(lrurec.DECAYED) else 1
        p = kept * p - (lr * mhat / root).view(p.dtype)
        tensors |= {f"m: {name}": m, f"v: {name}": v, name: p}
    return tensors


def grade_adamw(function):
    """The third step, with an eps and betas that are not the usual ones."""
    params = {"output_bias": real(2), "item_embedding": real(2, 2), "blocks.0.lru.b_B": compl(2),
              "blocks.0.lru.B": compl(1, 2), "blocks.0.lru.nu_log": real(3),
              "blocks.0.lru.theta_log": real(2, seed=2), "blocks.0.lru.gamma_log": real(4)}
    grads, opt = {name: p[::-1] + 1 for name, p in params.items()}, lrurec.adamw_init(params)
    arguments = (params, grads, opt, 0.1, 0.5, (0.8, 0.95), 0.1)
    for _ in range(2):
        lrurec.adamw_update(*arguments)
        grads.update({name: 2 * g * g for name, g in grads.items()})
    given = {}                                     # the arrays themselves: all is in place
    for name, p in params.items():
        given |= {f"m: {name}": opt["m"][name], f"v: {name}": opt["v"][name], name: p}
    right = adamw_plain(3, *arguments)
    mistakes = [
        ("it is not changed in place", copy.deepcopy({"step": np.array([2]), **given})),
        ("t is counted late: it is 1 in the first step", adamw_plain(2, *arguments)),
        ("the bias correction is missing", adamw_plain(10 ** 9, *arguments)),
        ("eps stands outside the root: sqrt(vhat) + eps",
         adamw_plain(3, *arguments, eps_in_root=True))]
    before = pickle.dumps(grads)
    function(*arguments)
    if pickle.dumps(grads) != before:
        raise Wrong("your adamw_update changed its argument grads: work on a copy")
    compare({"step": np.array([opt["step"]]), **given}, right, mistakes, 1e-12,
            "your adamw_update is wrong in step 3")


def grade_step(function):
    """One event at a time, for three users, gives what encode gives for their histories."""
    params, items = tiny_params(), np.random.default_rng(2).integers(0, 8, (9, 3))

    def encoded(n):
        """hidden (users, D), state (K, users, H) after n events"""
        users = [lrurec.encode(params, history, NO_WALLS[:n], return_state=True)
                 for history in items[:n].T]
        return (np.stack([hidden[-1] for hidden, _ in users]),
                np.concatenate([state for _, state in users], 1))

    for n in (1, 8, 0):
        state = encoded(n)[1] if n else lrurec.init_state(params, 3)
        hidden, new_state = encoded(n + 1)
        check("step", function, (params, state, items[n]), {"state": new_state, "hidden": hidden},
              ["hidden", "state"], note=f" at event {n} of three users")


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

EXERCISES = {  # easy to hard: name -> functions to write
    "linear": ["linear_backward"], "gelu": ["gelu_backward"],
    "layer_norm": ["layer_norm_backward"], "dropout": ["dropout_backward"],
    "cross_entropy": ["cross_entropy_backward"],
    "complex_linear": ["complex_in_backward", "complex_out_backward"],
    "lam": ["lam_backward"], "scan": ["scan"], "scan_backward": ["scan_backward"],
    "lru": ["lru_backward"], "block": ["block_backward"], "adamw": ["adamw_update"],
    "step": ["step"], "model": ["backward"]}
SHOWN_WHOLE = {  # what an exercise shows whole, where it is not the forward of a backward
    "scan": ["scan_loop"], "scan_backward": ["scan_loop"], "adamw_update": ["adamw_init"],
    "step": ["forward", "lru_forward", "block_forward", "init_state"]}
NOTES = {  # a word, and what a learner is told where it occurs
    "": """Sizes: N rows of a batch, V items (ids 1..V; id 0 is "nothing yet"), D model width,
H complex state width, F feed-forward width, K blocks, I and O any width in and out.
dname is the gradient of the loss L by name. Rows count from 0. xp is NumPy.""",
    "starts": """Walls: the rows of all users stand one after another, and where starts[n] is True
the state is zero before row n. A wall always stands before row 0, whatever starts[0] says.""",
    "complex": """Complex numbers: dz = dL/d(Re z) + i dL/d(Im z) for a complex z; no factor 2.
Where z changes by a small c, L changes by Re(conj(dz) c). So z = a w gives dw = conj(a) dz."""}
TOLD = {  # what an exercise says besides the docstring
    "adamw_update": """

    With t = 1 in the first step, for each parameter p and its gradient g:
        m <- beta1 m + (1 - beta1) g         mhat = m / (1 - beta1^t)
        v <- beta2 v + (1 - beta2) g^2       vhat = v / (1 - beta2^t)"""}
IDEAS = {  # the hints that are no "Derivative:" in lrurec's docstrings
    "adamw_update": """First add 1 to opt["step"]: it is t. The real views of p and g have the shape
of m and v. All of it is in place, with *=, += and -=; the gradient stays as it is.""",
    "step": """The lines of forward and block_forward, for one row of each user, without dropout.
In the place of the scan stands one step of the recurrence: new_state[k] = lam * state[k] + u."""}


def split_docstring(name):
    """The docstring of lrurec's `name` -> what a learner is told, what only a hint tells."""
    doc = inspect.getdoc(getattr(lrurec, name))
    told, _, withheld = doc.partition("\n\n" if name == "scan" else "\nDerivative: ")
    return told.strip(), IDEAS.get(name, withheld)


def heading(name):
    """A function of lrurec as a learner sees it: its signature and docstring."""
    signature = inspect.signature(getattr(lrurec, name))
    doc = textwrap.indent(split_docstring(name)[0], "    ").strip() + TOLD.get(name, "")
    return f'def {name}{signature}:\n    """{doc}\n    """'


def write_exercise(exercise):
    """The text of an exercise file."""
    asked = EXERCISES[exercise]
    shown = [other for name in asked
             for other in SHOWN_WHOLE.get(name, [name.replace("backward", "forward")])]
    parts, used = [], set()
    for name in asked + shown:
        used.update(getattr(lrurec, name).__code__.co_names)
        used.update(filter(str.isupper, heading(name).split()))   # constants in docstrings
    for name, value in vars(lrurec).items():       # the helpers
        if name in used.difference(asked, shown) and (inspect.isfunction(value) or name.isupper()):
            text = heading(name) if inspect.isfunction(value) else f"{name} = {value!r}"
            parts.append(f"from lrurec import {name}\n" + textwrap.indent(text, "# "))
    parts += [inspect.getsource(getattr(lrurec, name)) for name in shown]
    parts += [f"{heading(name)}\n    # your lines here\n" for name in asked]
    body = "\n\n".join(parts)
    notes = "\n\n".join(note for word, note in NOTES.items() if word in body)
    return (f'"""Exercise {exercise}: write {" and ".join(asked)}.\n\n'
            f"    python test_lrurec.py {exercise}.py          grades it\n"
            f"    python test_lrurec.py {exercise} --hint      shows how, in letters\n\n"
            f'{notes}\n"""\nimport math\n\nimport numpy as np\n\nxp = np\n\n{body}')


# ---------------------------------------------------------------------------------------------
# Files of answers, and the commands

TIME_LIMIT = 60                   # seconds for one file
RIGHT, WRONG = 40, 41             # exit codes that neither a crash nor a sys.exit(0) gives


def load_answers(path):
    """The functions in a file that exercises ask for, by name."""
    spec = importlib.util.spec_from_file_location("answers", path)
    module, answers = importlib.util.module_from_spec(spec), {}
    spec.loader.exec_module(module)
    for name in GRADERS:
        value = getattr(module, name, None)
        if callable(value) and value is not getattr(lrurec, name):
            answers[name] = value
        elif value is not None and f"\ndef {name}(" in inspect.getsource(module):
            raise Wrong(f"your {name} is replaced by an import of {name} that stands below it: "
                        "remove that import")
    if not answers:
        raise Wrong("no function of an exercise; python test_lrurec.py lists them")
    return answers


def describe(error, paths):
    """What was found, or what was raised, with the last line in the learner's files."""
    if isinstance(error, Wrong):
        return f"{error}\n  {describe(error.__cause__, paths)}" if error.__cause__ else str(error)
    text, absolute = f"{type(error).__name__}: {error}", [os.path.abspath(path) for path in paths]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.abspath(frame.filename) in absolute:
            where = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
            return f"{where}: {frame.line}\n  {text}"
    return text                                    # a SyntaxError names its line itself


def grade_here(path):
    """Grade the answers in a file, in this process, up to the first wrong one -> exit code."""
    try:
        for name, function in load_answers(path).items():
            GRADERS[name](function)
            print(f"{path}: {name}: right")
    except (Exception, SystemExit) as error:
        print(f"{path}: WRONG: {describe(error, [path])}")
        return WRONG
    return RIGHT


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


def in_order(function):
    """function, but what it returns can be written to and lies row by row, as lrurec wants it."""
    def copied(value):
        if isinstance(value, tuple):
            return tuple(map(copied, value))
        if isinstance(value, dict):
            return {name: copied(entry) for name, entry in value.items()}
        return np.array(value, order="C") if isinstance(value, np.ndarray) else value

    return functools.wraps(function)(lambda *arguments: copied(function(*arguments)))


def train_with(paths, steps=90):
    """Train a small model on a task that needs memory, with all right answers in the files in place
    of lrurec's functions."""
    import train
    answers, disks, rng = {}, [], np.random.default_rng(0)
    for path in paths:
        for name, function in load_answers(path).items():
            try:
                GRADERS[name](function)
                answers[name] = function
            except Exception:
                print(f"{path}: {name} is not right yet: ours takes its place")
    answers = {name: in_order(function) for name, function in answers.items()}
    for name, function in answers.items():
        setattr(lrurec, name, function)
        for other in answers.keys() & function.__wrapped__.__globals__.keys():
            function.__wrapped__.__globals__[other] = answers[other]      # answers call one another
    params = lrurec.init_params(5, 16, n_blocks=1, rng=rng, dtype=np.float64)
    opt = lrurec.adamw_init(params)
    print(f"Your functions: {', '.join(answers) or 'none, these are ours'}\n\n"
          "Recall the item of 3 steps ago, one of 5. A model without memory cannot get below "
          f"log 5 = {np.log(5):.3f}.\n\nstep    loss")
    for n in range(steps + 1):
        if n in (0, steps):
            p = lrurec.blocks(params)[0]
            lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
            disks.append(train.disk(lam))
        items = rng.integers(1, 6, (32, 32))
        targets = np.zeros_like(items)             # 0: nothing to recall yet
        targets[:, 3:] = items[:, :-3]
        starts = np.arange(items.size) % 32 == 0
        loss, grads = lrurec.loss_and_grads(params, items.ravel(), targets.ravel(), starts)
        lrurec.clip_gradients(grads, 5.0)
        lrurec.adamw_update(params, grads, opt, 1e-2, 0.01)
        if n % 10 == 0:
            print(f"{n:4d}  {loss:6.3f}  {'#' * round(20 * float(loss))}", flush=True)
    print("\nThe circle is |lam| = 1, a digit how many eigenvalues are there.\n"
          f"{'Before':44}and after")
    for before, after in zip(*disks):
        print(f"{before:44}{after}")


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
    config, rng = {**train.DEFAULTS, "dropout": 0.2, "seed": 0}, np.random.default_rng(0)
    dataset = reader.load_dataset("ml-100k")
    batches = list(reader.batches(reader.training_rows(dataset, 200), 128, rng))[:6]
    params = lrurec.init_params(len(dataset.item_ids) - 1, rng=rng)
    tensors = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    opt, pool = lrurec.adamw_init(params), ThreadPoolExecutor(config["threads"])
    scan = torch_scan()
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-3, weight_decay=0.01, eps=1e-9)
    torch.set_num_threads(config["threads"])

    def numpy_step(batch):
        train.train_step(pool, params, opt, batch, config, 1e-3)

    def torch_step(batch):
        optimizer.zero_grad()
        torch_loss(tensors, *map(torch.tensor, batch), scan, dropout=0.2)[1].backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 5.0)
        optimizer.step()

    print("\nML-100K, batches of 128 windows of 200, dropout 0.2, float32, "
          f"{config['threads']} threads: ms a step\n  NumPy  PyTorch  ratio")
    for _ in range(3):                             # by turns: other programs disturb both
        ms = []
        for step in (numpy_step, torch_step):
            step(batches[0])                       # the first one warms up
            begin = time.perf_counter()
            for batch in batches:
                step(batch)
            ms.append(1000 * (time.perf_counter() - begin) / len(batches))
        print(f"  {ms[0]:5.0f}  {ms[1]:7.0f}  {ms[1] / ms[0]:5.2f}", flush=True)
    return 0


def exercise_main(arguments):
    """Run a command of this file -> exit code."""
    command, *rest = arguments or ["list"]
    if command == "list":
        print("Exercises, easy to hard. python test_lrurec.py gelu > gelu.py writes one, and\n"
              "python test_lrurec.py gelu.py grades it.\n")
        for name, asked in EXERCISES.items():
            print(f"  {name:15} {', '.join(asked)}")
        return 0
    if command == "check":
        return int(not check_gradients() < 1e-6)
    if command == "pytorch":
        return compare_with_pytorch()
    if command == "--here":
        return grade_here(rest[0])
    if command in EXERCISES and not rest:
        print(write_exercise(command), end="")
        return 0
    if command in EXERCISES and rest == ["--hint"]:
        for name in EXERCISES[command]:
            print(f"{name}: {split_docstring(name)[1]}\n")
        return 0
    files = rest if command == "train" else arguments
    if len(files) > 1 and set(files) & set(EXERCISES):
        print("test_lrurec.py: one exercise at a time, or files of answers", file=sys.stderr)
        return 2
    for path in files:
        if not (path.endswith(".py") and os.path.isfile(path)):
            print(f"test_lrurec.py: {path!r} is neither an exercise nor a .py file; the exercises: "
                  f"{', '.join(EXERCISES)}", file=sys.stderr)
            return 2
    if command == "train":
        try:
            train_with(files)
        except (Exception, SystemExit) as error:
            print(describe(error, files), file=sys.stderr)
            return 1
        return 0
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
from unittest.mock import Mock  # noqa: E402

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


def tiny_run(folder, items=14):
    """Flags of a run that takes a tenth of a second. Its users walk round a ring of items: the
    next item is the one after, most of the time."""
    rng, lines = np.random.default_rng(0), ["user,item,time"]
    for u in range(30):
        item = rng.integers(items)
        for t in range(12):
            item = (item + (1 if rng.random() < 0.9 else 5)) % items
            lines.append(f"u{u},i{item},{t}")
    flags = "--d-model 8 --batch-size 8 --lr 0.02 --dropout 0.1 --seed 3".split()
    return ["--data", write(folder / "toy.csv", "\n".join(lines)), *flags]


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
    return archive.getvalue()


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
def test_ours_is_right_and_nothing_wrong_passes(name):
    ours = getattr(lrurec, name)
    GRADERS[name](ours)

    def with_nan(*arguments):
        result = ours(*arguments)
        _, array = list(arrays_in(arguments if result is None else result))[-1]
        array[...] = np.nan
        return result

    def changes(k):
        def wrong(*arguments):
            result = ours(*arguments)
            for _, array in arrays_in([arguments[k]]):
                array[...] = 2
            return result
        return wrong

    n_arguments = 3 if name == "adamw_update" else ours.__code__.co_argcount    # lr is no array
    for wrong in (lambda *_: None, with_nan, *map(changes, range(n_arguments))):
        with pytest.raises(Wrong):
            GRADERS[name](wrong)


def block_without(forgotten):
    """block_backward as a learner writes it, who forgets a branch or a skip connection."""
    def kept(name, z):
        return 0 * z if name == forgotten else z

    def wrong(ours, dout, c):
        dx, scale2, shift2 = lrurec.layer_norm_backward(dout, c["norm2"])
        dy, dW2, db2 = lrurec.linear_backward(lrurec.dropout_backward(dx, c["mask3"]), c["linear2"])
        dy = lrurec.gelu_backward(lrurec.dropout_backward(dy, c["mask2"]), c["gelu"])
        dy, dW1, db1 = lrurec.linear_backward(dy, c["linear1"])
        dx = kept("skip2", dx) + kept("branch2", dy)
        dx, scale1, shift1 = lrurec.layer_norm_backward(dx, c["norm1"])
        dy, *dlru = lrurec.lru_backward(lrurec.dropout_backward(dx, c["mask1"]), c["lru"])
        grads = [*dlru, scale1, shift1, dW1, db1, dW2, db2, scale2, shift2]
        return kept("skip1", dx) + kept("branch1", dy), dict(zip(lrurec.BLOCK_NAMES, grads))
    return wrong


def norm_with(first, second):
    """layer_norm_backward with other factors than 1 before its two means."""
    def wrong(ours, dout, cache):
        xhat, rstd, scale = cache
        d = scale * dout
        means = first * d.mean(1, keepdims=True), second * (d * xhat).mean(1, keepdims=True)
        return rstd * (d - means[0] - xhat * means[1]), (dout * xhat).sum(0), dout.sum(0)
    return wrong


def adamw_with(late=0, inside=0, bias=1):
    """adamw_update as a learner writes it, who counts t late, has eps inside the root, ..."""
    def wrong(ours, params, grads, opt, lr, weight_decay, betas, eps):
        t, opt["step"] = opt["step"] + 1 - late, opt["step"] + 1
        for name, p in params.items():
            p, g, m, v = p.view(float), grads[name].view(float), opt["m"][name], opt["v"][name]
            m[:] = betas[0] * m + (1 - betas[0]) * g
            v[:] = betas[1] * v + (1 - betas[1]) * g * g
            root = np.sqrt(v / (1 - bias * betas[1] ** t) + inside * eps) + (1 - inside) * eps
            p *= 1 if name == "output_bias" else 1 - lr * weight_decay
            p -= lr * m / (1 - bias * betas[0] ** t) / root
    return wrong


LINEAR, GELU, NORM, DROPOUT, CE, C_IN, C_OUT, LAM, _, SCAN, LRU, BLOCK, *_ = GRADERS
MISSING, CONJ = "{} is missing: this is what 1 in", "one too many: {0} for conj({0}), or"
BRANCH, ONLY = "the terms with {} are missing", "only the terms with {} are there"
IGNORED, SHIFTED, LOOP = "walls are ignored", "shifted by a row", "values, but it is N steps long"
WRONG_VERSIONS = [  # function, a wrong version of it, which is given ours first, part of the hint
    (LINEAR, lambda ours, *a: ours(*a)[:2], "returned 2 values, it should return 3: dx, dW, db"),
    (LINEAR, lambda ours, *a: list(ours(*a)), "returned 1 value (list), it should return 3"),
    (LINEAR, lambda ours, d, c: (d @ c[1].T, c[0].T @ d, d.sum(0)[:, None]), "shape is (4, 1)"),
    (LINEAR, lambda ours, d, c: (d @ c[1].T, d.T @ c[0], d.sum(0)), "it is transposed"),
    (LINEAR, lambda ours, d, c: (c[0].T @ d, d @ c[1].T, d.sum(0)), "the order: this is dW"),
    (LINEAR, lambda ours, d, c: (d @ c[1].T, c[0].T @ d, None), "it is missing"),
    (LINEAR, lambda ours, d, c: (d @ c[1].T, c[0].T @ d, d.mean(0)), "a mean over the rows in"),
    (LINEAR, lambda ours, d, c: (d @ c[1].T, c[0].T @ d, d.sum(0).astype("f4")), "is float32"),
    (LINEAR, lambda ours, d, c: (-d @ c[1].T, c[0].T @ d, d.sum(0)), "the sign is flipped"),
    (LINEAR, lambda ours, d, c: (d @ c[1].T ** 2, c[0].T @ d, d.sum(0)), "wrong in every row"),
    (GELU, lambda ours, d, c: d * c[1] + (ours(d, c) - d * c[1]) * (1 + c[1]) / c[1],
     "the slope of s is s (1 - s), not 1 - s^2"),
    (GELU, lambda ours, d, c: ours(d, c) - d * c[1], ONLY.format("x")),
    (GELU, lambda ours, d, c: d * c[1], BRANCH.format("x")),
    (GELU, lambda ours, d, c: ours(d, c) * 3, "3 times what it should be"),
    (GELU, lambda ours, d, c: (ours(d, c),), "it should be an array; it is tuple"),
    (NORM, norm_with(0, 0), "both means are missing"),
    (NORM, norm_with(0, 1), "the first mean is missing"),
    (NORM, norm_with(1, 0), "the second mean is missing"),
    (NORM, norm_with(6, 6), "sums in place of means"),
    (NORM, lambda ours, d, c: (ours(d, c)[0] / c[1], *ours(d, c)[1:]), MISSING.format("rstd")),
    (NORM, lambda ours, d, c: (ours(d / c[2], c)[0], *ours(d, c)[1:]), MISSING.format("scale")),
    (DROPOUT, lambda ours, d, mask: d * mask, "with p = 0 the mask is None"),
    (DROPOUT, lambda ours, d, mask: d, MISSING.format("mask")),
    (CE, lambda ours, dloss, c: ours(1, c), MISSING.format("dloss")),
    (CE, lambda ours, dloss, c: dloss * (c[3] / c[1])[:, None] * c[0], "one-hot target is missing"),
    (CE, lambda ours, dloss, c: (ours(dloss, c), c[1].fill(0))[0], "changed sums: work on a copy"),
    (C_IN, lambda ours, d, c: (ours(d, c)[0] + 0j, *ours(d, c)[1:]), "dtype is complex128"),
    (C_IN, lambda ours, d, c: (ours(d, c)[0], c[0].T @ d.conj(), d.sum(0)), "missing conjugate"),
    (C_OUT, lambda ours, d, c: (ours(d, c)[0].conj(), *ours(d, c)[1:]), "missing conjugate"),
    (LAM, lambda ours, dlam, c: ours(dlam, c)[::-1], "the order: this is dtheta_log"),
    (LAM, lambda ours, dlam, c: ours(dlam.conj(), c), CONJ.format("dlam")),
    (LAM, lambda ours, dlam, c: (ours(dlam, c)[0] / c[0], ours(dlam, c)[1]), MISSING.format("nu")),
    ("scan", lambda ours, *a: lrurec.scan_loop(*a), LOOP),
    ("scan", lambda ours, lam, u, s: ours(lam, u[:8], s), "raised an error for |lam| = 0.9, walls"),
    ("scan", lambda ours, lam, u, s: ours(lam.conj(), u, s), CONJ.format("lam")),
    ("scan", lambda ours, lam, u, s: ours(lam, u, s & False), IGNORED),
    ("scan", lambda ours, lam, u, s: ours(lam, u, np.roll(s, -1)), SHIFTED),
    (SCAN, lambda ours, *a: ours(*a)[0], "1 value (ndarray), it should return 2: dlam, du"),
    (SCAN, lambda ours, *a: lrurec.scan_backward_loop(*a), LOOP),
    (SCAN, lambda ours, dh, lam, h, s: ours(dh, lam.conj(), h, s), CONJ.format("lam")),
    (SCAN, lambda ours, dh, lam, h, s: ours(dh, lam, h.conj(), s), CONJ.format("h")),
    (SCAN, lambda ours, dh, lam, h, s: ours(dh, lam, np.roll(h, -1, 0), s), "takes h of the row"),
    (SCAN, lambda ours, dh, lam, h, s: (
        (h[:-1].conj() * dh[1:] * ~s[1:, None]).sum(0), ours(dh, lam, h, s)[1]), "du, not dh"),
    (SCAN, lambda ours, dh, lam, h, s: ours(dh, lam, h, s & False), IGNORED),
    (SCAN, lambda ours, dh, lam, h, s: ours(dh, lam, h, np.roll(s, 1)), SHIFTED),
    (LRU, lambda ours, d, c: ours(d, {**c, "starts": c["starts"] & False}), IGNORED),
    (LRU, lambda ours, d, c: ours(d, {**c, "lam": c["lam"].conj()}), CONJ.format('cache["lam"]')),
    (LRU, lambda ours, d, c: ours(d, {**c, "h": c["h"].conj()}), CONJ.format('cache["h"]')),
    (LRU, lambda ours, d, c: ours(d, {**c, "u": c["u"].conj()}), CONJ.format('cache["u"]')),
    (LRU, lambda ours, d, c: ours(d, {**c, "gamma": 1}), MISSING.format('cache["gamma"]')),
    (LRU, lambda ours, d, c: ours(d, {**c, "u": c["u"] / c["gamma"]}), "gamma is missing"),
    (LRU, lambda ours, d, c: ours(d, {**c, "u": c["u"] * c["gamma"]}), "gamma counts twice"),
    (BLOCK, lambda ours, *a: (ours(*a)[0], {}), "Missing: ['ffn.W1', "),
    (BLOCK, lambda ours, *a: (ours(*a)[0], []), "not wanted: ['dp']"),
    (BLOCK, lambda ours, d, c: ours(d, {**c, "mask1": None}), MISSING.format('cache["mask1"]')),
    (BLOCK, lambda ours, d, c: ours(d, {**c, "mask2": None}), MISSING.format('cache["mask2"]')),
    (BLOCK, lambda ours, d, c: ours(d, {**c, "mask3": None}), MISSING.format('cache["mask3"]')),
    (BLOCK, lambda ours, d, c: ours(d, {**c, "mask3": None}), "first wrong: ffn.W2; what comes"),
    (BLOCK, block_without("branch2"), BRANCH.format('cache["linear1"][1]')),
    (BLOCK, block_without("skip2"), ONLY.format('cache["linear1"][1]')),
    (BLOCK, block_without("branch1"), BRANCH.format('cache["lru"]["gamma"]')),
    (BLOCK, block_without("skip1"), ONLY.format('cache["lru"]["gamma"]')),
    ("adamw_update", lambda ours, *a: None, "it is not changed in place"),
    ("adamw_update", adamw_with(late=1), "t is counted late"),
    ("adamw_update", adamw_with(bias=0), "the bias correction is missing"),
    ("adamw_update", adamw_with(inside=1), "eps stands outside the root"),
    ("step", lambda ours, *a: ours(*a)[::-1], "the order: this is hidden"),
    ("step", lambda ours, p, state, items: ours(p, 0 * state, items), BRANCH.format("state")),
    ("backward", lambda ours, d, caches, E: ours(-d, caches, E), "first wrong: blocks.1.ffn_norm"),
    ("backward", lambda ours, d, c, E: ours(d, [c[0], None, *c[2:]], E), "caches[1] is missing"),
]


@pytest.mark.parametrize("name, wrong, part", WRONG_VERSIONS)
def test_a_wrong_version_is_refused_with_the_right_hint(name, wrong, part):
    with pytest.raises(Wrong) as error:
        GRADERS[name](lambda *arguments: wrong(getattr(lrurec, name), *arguments))
    assert part in str(error.value), str(error.value)


def test_the_exercises_from_end_to_end(tmp_path, capfd):
    paths = []
    for exercise, asked in EXERCISES.items():
        text = write_exercise(exercise)
        hidden = [split_docstring(name)[1] for name in asked] + ["Derivative:"]
        assert all(part and part not in text for part in hidden), exercise
        answers = [inspect.getsource(getattr(lrurec, name)) for name in asked]
        paths.append(write(tmp_path / f"{exercise}.py", "\n".join([text, *answers])))
    with open(paths[0], "a") as file:              # right in any memory order
        file.write("\ndef by_columns(name, function=linear_backward):\n"
                   "    return lambda *a: tuple(map(np.asfortranarray, function(*a)))\n"
                   "\nlinear_backward = by_columns(linear_backward)\n")
    assert exercise_main(paths[:2]) == 0           # each in its own process
    assert capfd.readouterr().out.count(": right\n") == 2
    out = subprocess.check_output(**python("test_lrurec.py", "train", *paths), text=True)
    losses = [float(line.split()[1]) for line in out.splitlines() if line.endswith("#")]
    assert f"Your functions: {', '.join(GRADERS)}\n" in out, "all are right"
    assert losses[0] > np.log(5) > 10 * losses[-1]


@pytest.mark.parametrize("lines, message", [
    ("return dout * maks", "gelu.py, line LINE: return dout * maks\n  NameError: name 'maks'"),
    ("return dout *", "SyntaxError: invalid syntax (gelu.py, line LINE)"),
    ("return exit(0)", "SystemExit: 0"),
    ("pass", "your gelu_backward returned nothing: a return statement is missing"),
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
    assert exercise_main([write(tmp_path / "gelu.py", before + lines)]) == 1
    assert message.replace("LINE", str(before.count("\n") + 1)) in capfd.readouterr().out


def test_lists_hints_and_a_wrong_name(capsys):
    for arguments, code, part in [([], 0, "complex_in_backward, complex_out_backward"),
                                  (["gelu", "--hint"], 0, "a sigmoid's slope is s (1 - s)"),
                                  (["scan_backward"], 0, "Complex numbers: dz = dL/d(Re z)"),
                                  (["step", "--hint"], 0, "one step of the recurrence"),
                                  (["gelu", "scan"], 2, "one exercise at a time"),
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
# The model, its optimizer and its file

def test_every_gradient_of_the_whole_model_agrees_with_central_differences(capsys):
    assert exercise_main(["check"]) == 0, capsys.readouterr().out
    *tensors, last = capsys.readouterr().out.splitlines()[1:]
    assert len(tensors) == 34 and re.fullmatch(
        "34 tensors, 414 numbers, largest relative error [0-9]e-[01][0-9]", last), last


def test_a_wrong_gradient_fails_the_check(capsys, monkeypatch):
    ours = lrurec.loss_and_grads
    for wrong in (lambda g: 0 * g, lambda g: g * (1 + 1e-5), lambda g: g + np.nan):
        def loss_and_grads(*arguments, **options):
            loss, grads = ours(*arguments, **options)
            return loss, {**grads, "blocks.0.lru.nu_log": wrong(grads["blocks.0.lru.nu_log"])}

        monkeypatch.setattr(lrurec, "loss_and_grads", loss_and_grads)
        assert exercise_main(["check"]) == 1


@pytest.mark.parametrize("place", range(7))        # the embedding, then three in each block
def test_dropout_changes_the_loss_at_each_of_its_places(place, monkeypatch):
    params, batch, calls, dropout = tiny_params(), check_batch(), [], lrurec.dropout_forward

    def only_here(x, p, rng):
        calls.append(p)
        return dropout(x, p if len(calls) == place + 1 else 0, rng)

    without, _ = lrurec.loss_and_grads(params, *batch)
    monkeypatch.setattr(lrurec, "dropout_forward", only_here)
    loss, _ = lrurec.loss_and_grads(params, *batch, 0.5, np.random.default_rng(0))
    assert calls == 7 * [0.5] and loss != without


def test_the_loss_is_the_mean_of_what_encode_gives_over_the_rows_with_a_target():
    params, (items, targets, starts) = tiny_params(), check_batch()
    hidden = lrurec.encode(params, items, starts)
    logits = hidden @ params["item_embedding"].T + params["output_bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), targets]
    loss, _ = lrurec.loss_and_grads(params, items, targets, starts)
    assert loss == pytest.approx(losses[targets > 0].mean(), rel=1e-12)
    loss, grads = lrurec.loss_and_grads(params, items, 0 * targets, starts)
    assert loss == 0 and not any(g.any() for g in grads.values())


def test_step_goes_on_where_encode_stops():
    params, (items, _, starts) = tiny_params(), check_batch()
    hidden, states = lrurec.encode(params, items, starts, return_state=True)
    segments = np.split(items, np.flatnonzero(starts))
    assert states.shape == (2, len(segments), 5)
    row = 0
    for k, segment in enumerate(segments):
        state = lrurec.init_state(params)
        for item in segment:
            x, state = lrurec.step(params, state, np.array([item]))
            assert relative_error(x[0], hidden[row]) < 1e-12, row
            row += 1
        assert relative_error(state[:, 0], states[:, k]) < 1e-12, k


def test_all_scans_agree_with_the_loops_for_any_length_and_walls():
    h = lrurec.scan_loop(np.array([0.5j]), np.array([[2], [1], [4 + 0j]]), np.array([0, 0, 1]))
    assert h.ravel().tolist() == [2, 1 + 1j, 4], "the example in the docstring"
    lam, rng = lam_of(3), np.random.default_rng(0)
    for N, share in itertools.product((*range(1, 35), 127, 128, 129), (0, 0.3, 1)):
        u, dh, starts = compl(N, 3), compl(N, 3, seed=2), rng.random(N) < share
        h = lrurec.scan_loop(lam, u, starts)
        for scan in (lrurec.scan, lrurec.scan_recursive):
            assert relative_error(scan(lam, u, starts), h) < 1e-12, (scan.__name__, N)
        expected = lrurec.scan_backward_loop(dh, lam, h, starts)
        for a, b in zip(lrurec.scan_backward(dh, lam, h, starts), expected):
            assert a.shape == b.shape and relative_error(a, b) < 1e-12, N


def test_float32_stays_exact_over_a_very_long_history():
    N, lam = 200_000, lam_of(2, 0.99999).astype(np.complex64)
    u, dh, starts = compl(N, 2), compl(N, 2, seed=2), np.zeros(N, bool)
    h = lrurec.scan_loop(lam.astype(complex), u, starts)
    expected = h, *lrurec.scan_backward_loop(dh, lam.astype(complex), h, starts)
    h32 = lrurec.scan(lam, u.astype(lam.dtype), starts)
    given = h32, *lrurec.scan_backward(dh.astype(lam.dtype), lam, h32, starts)
    for a, b in zip(given, expected):              # powers of lam in float32 give errors of 2e-4
        assert a.dtype == np.complex64 and relative_error(a, b) < 2e-5


def test_nothing_passes_a_wall_and_the_future_never_reaches_the_past():
    params, items = tiny_params(), np.array([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4])
    hidden, segment = lrurec.encode(params, items, STARTS), np.cumsum(STARTS)
    for n in range(11):
        changed = items.copy()
        changed[n] = items[n] % 7 + 1
        moved = (lrurec.encode(params, changed, STARTS) != hidden).any(1)
        expected = (segment == segment[n]) & (np.arange(11) >= n)
        assert moved.tolist() == expected.tolist(), n


@pytest.mark.parametrize("max_phase", [1, 0.2])
def test_initial_values(max_phase):
    params = lrurec.init_params(50, 32, 2000, rng=np.random.default_rng(0), max_phase=max_phase)
    for p in lrurec.blocks(params):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        area = (abs(lam) ** 2 - 0.8 ** 2) / (0.99 ** 2 - 0.8 ** 2)
        turn = np.angle(lam) % (2 * math.pi) / (2 * math.pi * max_phase)
        for uniform in (area, turn):
            quantiles = np.quantile(uniform, [0, 0.25, 0.5, 0.75, 1])
            assert quantiles == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.04)
        assert np.exp(2 * p["lru.gamma_log"]) == pytest.approx(1 - abs(lam) ** 2, rel=1e-3)
    for name, p in params.items():
        parts = lrurec.real_view(p)
        if "norm" in name:
            assert (parts == name.endswith("scale")).all()
        elif "_log" not in name:                   # normal(0, 0.02) cut at two standard deviations
            error = 0.03 if parts.size > 2000 else 0.25
            assert abs(parts).max() <= 0.04 and parts.std() == pytest.approx(0.0176, rel=error)


def test_the_names_shapes_and_types_that_the_contract_names():
    block = {"lru.nu_log": "H", "lru.theta_log": "H", "lru.gamma_log": "H", "lru.B": "DH",
             "lru.b_B": "H", "lru.C": "HD", "lru.b_C": "D", "lru_norm.scale": "D",
             "lru_norm.shift": "D", "ffn.W1": "DF", "ffn.b1": "F", "ffn.W2": "FD", "ffn.b2": "D",
             "ffn_norm.scale": "D", "ffn_norm.shift": "D"}
    expected = {"item_embedding": "VD", "embedding_norm.scale": "D", "embedding_norm.shift": "D",
                **{f"blocks.0.{name}": shape for name, shape in block.items()},
                **{f"blocks.1.{name}": shape for name, shape in block.items()}, "output_bias": "V"}
    params, letters = lrurec.init_params(6, 4), {7: "V", 4: "D", 8: "H", 16: "F"}
    assert expected == {
        name: "".join(letters[size] for size in p.shape) for name, p in params.items()}
    for name, p in params.items():
        is_complex = name.endswith((".B", ".b_B", ".C"))
        assert p.dtype == (np.complex64 if is_complex else np.float32), name
    assert lrurec.init_params(6, 4, 3, 5)["blocks.1.ffn.W1"].shape == (4, 5)
    assert lrurec.init_params(6)["item_embedding"].shape == (7, 64)


def test_gelu_layer_norm_and_score_against_their_definitions():
    x = np.linspace(-6, 6, 241)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert abs(lrurec.gelu_forward(x)[0] - exact).max() < 5e-4    # the tanh form's own error
    x, scale, shift = 0.01 * real(5, 6), real(6), real(6, seed=2)
    expected = scale * (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert relative_error(lrurec.layer_norm_forward(x, scale, shift)[0], expected + shift) < 1e-12
    params, hidden = tiny_params(), real(2, 3, 4)
    expected = np.einsum("ijd,vd->ijv", hidden, params["item_embedding"]) + params["output_bias"]
    scores = lrurec.score(params, hidden)
    assert (scores[..., 0] == -np.inf).all()
    assert relative_error(scores[..., 1:], expected[..., 1:]) < 1e-12


@pytest.mark.parametrize("ids", [[], [-1], [8], [1.0], [True]])
def test_ids_that_are_no_items_are_refused_with_a_sentence(ids):
    params, ids, good = tiny_params(), np.array(ids), np.ones(len(ids), int)
    starts, state = np.zeros(len(ids), bool), lrurec.init_state(params, len(ids))
    for function, *arguments in ((lrurec.encode, ids, starts), (lrurec.step, state, ids),
                                 (lrurec.loss_and_grads, good, ids, starts),
                                 (lrurec.loss_and_grads, ids, good, starts)):
        with pytest.raises(ValueError, match=r"integers in 0\.\.7, one or more"):
            function(params, *arguments)
    lrurec.encode(params, [0, 7], np.zeros(2, bool))              # both ends are ids


def test_arrays_of_different_lengths_are_refused():
    params = tiny_params()
    for function, *arguments in ((lrurec.encode, [1, 2], [True]),
                                 (lrurec.step, lrurec.init_state(params, 3), [5]),
                                 (lrurec.loss_and_grads, [1, 2], [1, 2], [True]),
                                 (lrurec.loss_and_grads, [1, 2], [1, 2, 3], [True, False])):
        with pytest.raises(ValueError):
            function(params, *arguments)
    for histories in ([], [[1], []]):
        with pytest.raises(ValueError, match="hold one event or more"):
            train.model_scorer(params)(histories)


@pytest.mark.parametrize("scale, shift, n_rows", [
    (1, 0, 9), (1e4, 0, 9), (1e4, -1e6, 9), (1, 0, 1), (1, 0, 0)])
def test_the_loss_against_its_definition_whatever_the_size_of_the_logits(scale, shift, n_rows):
    hidden, E, bias = scale * real(9, 4), real(8, 4, seed=2), scale * real(8, seed=3) + shift
    targets = np.array([1, 0, 7, 3, 3, 0, 2, 5, 6])
    targets[n_rows:] = 0
    n = np.flatnonzero(targets)                    # the other rows carry no loss
    logits = hidden[n] @ E.T + bias
    losses = np.logaddexp.reduce(logits, 1) - logits[np.arange(len(n)), targets[n]]
    loss, *grads = lrurec.output_loss(hidden, E, bias, targets)
    assert loss == pytest.approx(losses.sum() / max(1, len(n)), rel=1e-12)
    assert all(np.isfinite(g).all() and g.any() == (n_rows > 0) for g in grads)


def test_the_gradients_of_the_loss_in_chunks_of_so_many_rows(monkeypatch):
    inputs = {"hidden": real(37, 3), "E": real(6, 3), "output_bias": real(6)}
    targets = np.random.default_rng(0).integers(0, 6, 37)
    expected = {name: numeric_gradient(
        lambda: lrurec.output_loss(*inputs.values(), targets)[0], z) for name, z in inputs.items()}
    forward = Mock(wraps=lrurec.cross_entropy_forward)
    monkeypatch.setattr(lrurec, "cross_entropy_forward", forward)
    assert 2 ** 24 <= lrurec.LOGITS_PER_CHUNK <= 2 ** 27, "a million items train in 6 GB"
    for rows, logits, sizes in ((256, 2 ** 26, [37]), (10, 2 ** 26, [10, 10, 10, 7]),
                                (256, 60, [10, 10, 10, 7]), (256, 1, 37 * [1])):
        monkeypatch.setattr(lrurec, "ROWS_PER_CHUNK", rows)
        monkeypatch.setattr(lrurec, "LOGITS_PER_CHUNK", logits)
        forward.reset_mock()
        _, *given = lrurec.output_loss(*inputs.values(), targets)
        compare(dict(zip(inputs, given)), expected)
        assert [len(call.args[0]) for call in forward.mock_calls] == sizes


def test_dropout_keeps_the_expectation():
    x = np.ones((1001, 999))
    for p, n_dropped in ((0.3, 77), (0.001, 0), (0.9999, 255)):   # of 256, the nearest to p
        out, _ = lrurec.dropout_forward(x, p, np.random.default_rng(0))
        assert set(np.unique(out)) <= {0, 256 / (256 - n_dropped)}
        assert (out == 0).mean() == pytest.approx(n_dropped / 256, abs=0.002 * p)
    assert lrurec.dropout_forward(x, 0, None)[0] is x


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


def test_decay_groups_and_clipping():
    params = tiny_params()
    before, grads = copy.deepcopy(params), {name: 0 * p for name, p in params.items()}
    lrurec.adamw_update(params, grads, lrurec.adamw_init(params), 0.1, 0.5)
    shrunk = {name.split(".", 2)[-1] for name in params if (params[name] != before[name]).any()}
    assert shrunk == {"item_embedding", "lru.nu_log", "lru.theta_log", "lru.gamma_log", "lru.B",
                      "lru.C", "ffn.W1", "ffn.W2"}
    grads = {"a": np.array([3.0, 0]), "b": np.array([4j])}
    for max_norm, factor in ((10, 1), (1, 1 / (5 + 1e-6))):
        assert lrurec.clip_gradients(grads, max_norm) == pytest.approx(5)
        assert grads["a"][0] == 3 * factor and grads["b"][0] == 4j * factor


def test_save_and_load(tmp_path):
    params, extra = tiny_params(), {"note": {"a": [1, 2.5, "ü"]}, "none": None}
    lrurec.save(tmp_path / "m.npz", params, **extra)
    again, extra_again = lrurec.load(tmp_path / "m.npz")
    assert list(again) == list(params) and extra_again == extra
    assert all((again[name] == params[name]).all() for name in params)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    write(path, "old")
    write(tmp_path / "f.part", "what a killed run left, longer than new")
    with pytest.raises(OSError) as error, lrurec.whole_file(path) as file:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "full")
    assert error.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with lrurec.whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]


# ---------------------------------------------------------------------------------------------
# Data

# Every right file says: user 1 saw 10 at 100 s and 11 at 200 s, user 2 saw 10 at 50 s
# DIGEST: SHA-256 of items and offsets as int64, then of every item id after a zero byte
PARTS = np.array([1, 2, 1] + [0, 2, 3], "<i8").tobytes() + b"\x0010" + b"\x0011"
DIGEST = reader.hashlib.sha256(PARTS).hexdigest()


def table(user="user", item="item", when="time", delimiter=",", times=("200", "100", "50")):
    rows = [(user, item, when), *zip("112", ("11", "10", "10"), times)]
    return "".join(delimiter.join(row) + "\n" for row in rows)


USERS = "user,user_id,User Id,USER-ID,uid,reviewerID,visitorid,customer_id,session_id,SessionId"
ITEMS = "item,item_id,Item-Id,iid,movieId,video_id,sid,product_id,asin,parent_asin,book_id,track_id"
TIMES = ("time_ms,timestamp_ms,timestamp,event_timestamp,unixReviewTime,unix_time,date_time,"
         "event_time,created_at,rated_at,time,ts,date,event_date").split(",")
PLAIN, NUMBERED = table(), "200;11;1\n100;10;1\n50;10;2\n"
FILES = [  # the file's content, and the columns where they are given
    *[[table(user=name)] for name in USERS.split(",")],
    *[[table(item=name)] for name in ITEMS.split(",")],
    *[[table(when=f"{coarser},{finer}", times=["8,200", "8,100", "8,50"])]
      for finer, coarser in zip(TIMES, TIMES[1:])],
    *[[table(delimiter=text)] for text in ["\t", "::", ";", "|", " "]],
    *[[table(when="datetime", times=times)] for times in [
        ["2024-05-01", "2024-04-30", "2024-03-02"],
        ["2024-05-01 12:30:01", "2024-05-01 12:30:00 UTC", "2024-05-01 12:00"],
        ["2024-05-01T12:30:00.123457001Z", "2024-05-01T12:30:00.123456Z", "2024-05-01T12:30:00.5Z"],
        ["2024-05-01T12:00:00-02:00", "2024-05-01T12:30:00+0100", "2024-05-01T12:30:00+09"]]],
    [table(when="date", times=["2e2", "100.5", "50"])],
    [table(times=[str(2 ** 60 + 1), str(2 ** 60), "50"])],                   # exact as int
    ["1,10\n1,11\n2,10\n"], [gzip.compress(PLAIN.encode())], [PLAIN.replace("\n", ",\n")],
    ["1\t11\t3\t200\n1\t10\t5\t100\n2\t10\t1\t50\n"],                        # u.data
    ["1::11::3::200\n1::10::5::100\n2::10::1::50\n"],                        # ratings.dat
    [table("user_id:token", "item_id:token", "timestamp:float", "\t")],      # RecBole
    ["\ufeff\r\n" + PLAIN.replace("\n", "\r\n\r\n").replace("11", ' "11"')],
    [PLAIN.replace(",", " ").replace("\n", " \n")], ["1;11;3,5;200\n1;10;4,0;100\n2;10;1,5;50\n"],
    ['"user;x;y;z",item,user,time\n"a;b;c;d",11,1,200\n,10,1,100\n"e,f",10,2,50\n'],
    ['review,user,item,time\n"a\nb",1,11,200\n,1,10,100\n,2,10,50'],
    ["session_id,user_id,item,ts\n5,1,11,200\n6,1,10,100\n7,2,10,50\n"],
    [NUMBERED, "3,2,1"], ["time;item;user\n" + NUMBERED, "3,2,1"],
    ["user1;item;c\n" + NUMBERED, "3, 2, 1"], ["a;b;c\n" + NUMBERED, "3,2,1"],
    ["a1;b;user\n" + NUMBERED, "user,b,a1"],
]


@pytest.mark.parametrize("case", range(len(FILES)))
def test_every_right_file_gives_the_same_data(case, tmp_path):
    content, *columns = FILES[case]
    data = reader.load_dataset(write(tmp_path / "f", content), 0, "file", 0, *columns)
    assert (data.user_ids, data.item_ids) == (["1", "2"], ["", "10", "11"]), content
    assert data.items.tolist() == [1, 2, 1] and data.offsets.tolist() == [0, 2, 3], content
    assert data.digest == DIGEST


REFUSED = [  # content, what the message says, and the columns where they are given
    (" \n\n", "is empty"), ("user,item\n", "header but no events"),
    ("\n1,2,3\n1,2\n", "line 3: 2 columns where the first line has 3"),
    ("1,2,3\n1,Rock, The,3\n", "line 2: 4 columns where the first"),
    ("1 2 3 4 5 6\n2 3 4\n", "line 1: .*not a user's whole sequence"),
    ("1,2,3\n1,2,x\n", "line 2: .*'x'.*seconds or milliseconds.*ISO 8601"),
    ("1,2,nan\n", "line 1: 'nan' is not a finite"), (f"1,2,{2 ** 63}\n", "below 2\\^63"),
    ("1,2,2024-05-01\n1,3,4\n", "line 2: '4' is not ISO 8601"),
    ("1,4\n", "nobody is left with 5 events.*item from column 2.*lower --min-count"),
    ("1,,3\n", "line 1: user '1', item '' "), ("1,2,3\n , 2,3\n", "line 2: user '', item '2'"),
    ("1,2,3\n1,\x1b[3,3\n", "line 2: .*item '.x1b"), (b"1,Caf\xe9,3\n", "line 1: .*'Caf.udce9'"),
    ("alone \n", "line 1: no delimiter in 'alone'"), ('1,2,3\n1,"2,3\n1,2,3\n', "line 2: .*quotes"),
    ("who,what,when\n1,2,3\n", "line 1: unknown header.*who.*--columns"),
    ("1,2,3\n", "named .gz but is not gzip"), (b"\x1f\x8b junk", "cannot be read.*gzip"),
    (gzip.compress(b"1,2,3\n" * 99)[:-9], "cannot be read.*gzip"),
    (zip_of({"a.csv": ""}), "is a zip archive.*unpack"),
    (zip_of({"xl/a.xml": ""}), "is xlsx.*pandas.read_excel"),
    (b"PAR1\x15\x04\x15", "is Parquet.*pandas.read_parquet"),
    (b"BZh91AY&SY", "compressed with bz2.*bunzip2"), ("1,2".encode("utf-16"), "is UTF-16.*UTF-8"),
    (b"\x80\x04\x95", "is a pickle.*trust.*pandas.read_pickle"),
    (gzip.compress(b' {"user": 1}\n'), r"is JSON lines.*read_json\('FILE', lines=True, dtype=F"),
    (PLAIN, "no column 'x'.* user, item, time", "user,x"),
    (PLAIN, "no column '0'", "0,1"), (PLAIN, "no column '4'.*1 to 3", "1,4"),
    ("user_id,film1\n1,2\n", "line 1: unknown header.*user_id, film1"),
    ("1,2,2024-05-01,5\n", "line 1: .*no event user,item"), ("1,2,987654321,5\n", "line 1: "),
    ("1,2024-05-01,2,5\n", "line 1: .*no event"), ("1,NULL\n", "line 1: .*item 'NULL' cannot be"),
    ("1,2\nNA,2\n", "line 2: user 'NA', item"), ("nan,2\n", "'nan'"), ("\\N,2\n", r"\\\\N"),
    (b'["u1", "i1"]\n', "is JSON lines"), ("user_id,film1\n1,2\n", "no column '3'", "1,3"),
    ("user,item,time,date\n1,2,3,4\n", "line 1: a time and a date in user, item, time, date"),
    (b'[{"user": 1}]', r"is JSON, .*read_json\('FILE', dtype=False\)"),
    # and what could take much time or memory
    (b"1,2,3\n" + b"x" * 10_000_000, "line 2: over 1048576 characters"),
    (b'1,2\n1,"' + b"xxxxxxxxx\n" * 10 ** 6, "line 2: field larger"), (b"\n" * 200_000, "is empty"),
    (b"1," * 100_000, "line 1: unknown header"), (b"user,item," + b"t," * 100_000, "no events"),
    (b"".join(b"%d,7,%d\n" % (n, n) for n in range(20_000)), "nobody is left"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_every_wrong_file_is_refused_with_its_place_and_what_to_do(case, tmp_path, capfd):
    content, message, *columns = REFUSED[case]
    path = write(tmp_path / ("f.gz" if "gzip" in message else "f"), content)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(reader.DataError, match=message) as error:
        reader.load_dataset(path, 5, "item", 0, *columns)
    seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path in str(error.value) and str(error.value).isprintable()
    assert len(str(error.value)) < 900 + len(path) and len(capfd.readouterr().err) < 600 + len(path)
    assert peak < 16 * 2 ** 20 and seconds < 4


def test_the_reader_survives_random_edits(tmp_path):
    rng, text = np.random.default_rng(0), b'user,item,time\nu1,"i,1",1\nu2,i2,3.5\nu,i,2024-05-01\n'
    for n in range(400):
        path = write(tmp_path / "f", scrambled(text * 2 if n % 5 else rng.bytes(80), rng))
        try:
            reader.load_dataset(path, 0)
        except reader.DataError as error:
            assert path in str(error) and str(error).isprintable()


def test_the_layout_says_by_name_what_was_read_and_what_is_unused(tmp_path, capfd):
    for content, layout in [
            ("user_id,iid,date,ts\n1,2,3,4\n", "user from user_id, item from iid, time from ts; "
                                               "other columns (date) unused"),
            ("1,2\n", "user from column 1, item from column 2"),
            ("u:1,i:2,3\n", "user from column 1, item from column 2, time from column 3"),
            ("user,item\n1,2\n", "user from user, item from item"),
            ("1,2,5,3\n", "user from column 1, item from column 2, time from column 4; "
                          "other columns (column 3) unused")]:
        assert reader.load_dataset(write(tmp_path / "f", content), 0).layout == layout
    assert capfd.readouterr() == ("", "")
    path = write(tmp_path / "f", "user,item,wh\x1ben\n1,2,3\n")
    assert reader.load_dataset(path, 0).layout.endswith(r"; other columns (wh\x1ben) unused")
    warning = capfd.readouterr().err               # a header without a known time
    assert warning.count("\n") == 1 and warning[:-1].isprintable() and "--columns" in warning
    assert r"f, line 1: no known time column in user, item, wh\x1ben: events are" in warning
    reader.load_dataset(path, 0, columns="user,item")
    assert capfd.readouterr().err == "", "who names the columns is not warned"


def test_ids_are_any_text_in_the_order_of_numbers_where_all_are(tmp_path):
    for lines, ordered in (("10 9 1", "1 9 10"), ("b 10 9", "10 9 b"), ("01 1", "01 1"),
                           ("10.0 9.5 1", "1 9.5 10.0"), ("用户 c::d José", "José c::d 用户")):
        content = "".join(f'"{raw}","{raw}"\n' for raw in lines.split())
        data = reader.load_dataset(write(tmp_path / "f", "user,item\n" + content), 0)
        assert data.item_ids[1:] == data.user_ids == ordered.split()
    data = reader.load_dataset(write(tmp_path / "f", "0,Foo::Bar\n0,Baz\n"), 0)
    assert data.item_ids == ["", "Baz", "Foo::Bar"]


def test_titles_come_from_a_file_and_ids_without_one_keep_their_id(tmp_path):
    file, titles = write(tmp_path / "f", PLAIN), tmp_path / "titles"
    for content in [
            "movieId,title,genres\n10,\"Rock, Thé\",Action\n12,Other,\n", "10\tRock, Thé\n",
            *[f"{name}\titem\nRock, Thé\t10\n" for name in
              "title movie_title itemTitle product_title Name item_name".split()],
            "10::Rock, Thé::Action|Drama\n".encode("latin-1"), "10|Rock, Thé||\n11|||\n",
            "id,year,title\n10,1996,\"Rock, Thé\"\n"]:
        data = reader.load_dataset(file, 0, titles=write(titles, content))
        assert data.titles == ["", "Rock, Thé", "11"], content
    for content, message in [
            ("10,Rock\n10\n", "line 2: 1 columns"),
            ("movie,name\n7,x\n", "no id of an item of"),
            ("10,Rock\n11,Rock, The\n", "line 2: 3 columns.*in quotes"), ("", "is empty")]:
        with pytest.raises(reader.DataError, match=message):
            reader.load_dataset(file, 0, titles=write(titles, content))


def test_filtering_and_order(tmp_path):
    # item 3 has one event; then user 2 has one; the repeat of (0, 1) is dropped first
    path = write(tmp_path / "f", "0,1,5\n0,1,5\n0,2,4\n1,2,1\n1,1,1\n2,3,1\n2,1,9\n")
    data = reader.load_dataset(path, min_count=2)
    assert data.item_ids == ["", "1", "2"] and data.user_ids == ["0", "1"]
    assert data.items.tolist() == [2, 1, 1, 2] and data.offsets.tolist() == [0, 2, 4]
    assert reader.load_dataset(path, 2, "file").items.tolist() == [2, 1, 2, 1]
    drawn = {tuple(reader.load_dataset(path, 2, "random", seed).items) for seed in range(9)}
    assert drawn == {(2, 1, 1, 2), (2, 1, 2, 1)}
    with pytest.raises(reader.DataError, match="ties must be 'item', 'file' or 'random' .got 'no'"):
        reader.load_dataset(path, 2, "no")
    five = reader.load_dataset(write(tmp_path / "five", "1,1\n1,2\n" * 5))
    assert len(five.items) == 10, "five events are enough"


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
    parts = list(reader.batches(rows, 4, np.random.default_rng(0)))
    assert [part[2].dtype for part in parts] == [bool, bool], "two batches, of 4 and 2 windows"
    items, targets, _ = (np.concatenate(part) for part in zip(*parts))
    assert sorted(targets) == sorted(rows.targets) and targets.tolist() != rows.targets.tolist()
    assert dict(zip(targets, items)) == dict(zip(rows.targets, rows.items))


RECBOLE = "recbole/dataset_example/ml-100k/ml-100k"
ARCHIVES = [  # in each of them user 1 saw item 1 at 5 s and item 2 at 4 s
    ("ml-100k", {"ml-100k/u.data": "1\t1\t3\t5\n1\t2\t3\t4\n",
                 "ml-100k/u.item": b"1|unknown||\n2|Caf\xe9 (1990)|1-Jan-1990|\n"}),
    ("ml-100k", {RECBOLE + ".inter": "user_id\titem_id\ttimestamp\n1\t1\t5\n1\t2\t4\n",
                 RECBOLE + ".item": "item_id:token\tmovie_title:token_seq\trelease_year\tclass\n"
                                    "1\tunkonwn\t\t\n2\tCafé\t1990\t\n"}),
    ("ml-1m", {"ml-1m/ratings.dat": "1::1::3::5\n1::2::3::4\n",
               "ml-1m/movies.dat": b"1::unknown::x\n2::Caf\xe9 (1990)::y\n"})]


def test_archives_are_kept_in_the_cache_and_damaged_ones_refused(tmp_path, monkeypatch):
    two_events = np.array([1, 1, 5, 1, 2, 4], "<i8").tobytes()
    monkeypatch.setattr(reader, "ML_100K_EVENTS", reader.hashlib.sha256(two_events).hexdigest())
    monkeypatch.setenv("USERPROFILE", str(tmp_path))          # HOME on Windows
    monkeypatch.delenv("LRUREC_CACHE", raising=False)
    folders = [("HOME", ".cache/lrurec"), ("LRUREC_CACHE", "."), ("LRUREC_CACHE", ".")]
    for (name, files), (variable, folder) in zip(ARCHIVES, folders):
        monkeypatch.setenv(variable, str(tmp_path))           # it comes before the last
        archive = io.BytesIO(zip_of(files))
        path = Path(reader.fetch_movielens(name, lambda url, timeout: archive))
        assert path == tmp_path / folder / f"{name}.zip"
        data = reader.load_dataset(name, 0)
        assert data.user_ids == ["1"] and data.items.tolist() == [2, 1] and data.layout == ""
        assert data.titles == ["", "unknown", "Café (1990)"]
        ratings, titles = files
        for damaged in ({}, {**files, ratings: "a\tb\tc\td\n"}, {**files, titles: "x\n1"}):
            write(path, zip_of(damaged))
            with pytest.raises(reader.DataError, match=f"{name}.zip is not an archive of {name}"):
                reader.load_dataset(name)


def test_grouplens_is_asked_then_pip_and_a_wrong_archive_is_not_kept(tmp_path, monkeypatch):
    def no_route(url, timeout):
        asked.append(url)
        raise OSError("no \x1broute")

    def pip(command, **options):
        folder = Path(command.pop(-2))
        asked.append(" ".join(command))
        if wheel:
            write(folder / "recbole.whl", wheel)
        return subprocess.CompletedProcess(command, not wheel, "", "first\nno network\n")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("LRUREC_CACHE", str(tmp_path))
    url = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
    other_events = zip_of(ARCHIVES[1][1])
    for wheel, reason in ((b"", "no network"), (other_events, "not the 100,000 events")):
        asked = []
        with pytest.raises(reader.DataError, match=f"no .x1broute; recbole==.*{reason}") as error:
            reader.fetch_movielens("ml-100k", no_route)
        assert str(error.value).endswith(f"{url} by hand and put it at {tmp_path / 'ml-100k.zip'}")
        assert asked == [url, f"{sys.executable} -m pip download --no-deps --quiet "
                                   "--disable-pip-version-check --dest recbole==1.2.1"]
        assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# Evaluation and training

def test_metrics_in_groups_are_those_of_each_user_alone_ranked_by_brute_force():
    params, rng = tiny_params(n_items=60), np.random.default_rng(0)
    data = dataset(rng.integers(1, 61, 200), range(0, 201, 5), 60)     # 40 users with 5 events
    with_ties = rng.integers(0, 30, (61, 61)).astype(float)
    for scorer in (train.model_scorer(params),
                   lambda seen: np.array([with_ties[history[-1]] for history in seen])):
        ranks = []
        for events in data.items.reshape(40, 5):
            history, true = events[1:4], events[4]         # the last 3 before the true one
            scores = scorer([history])[0]
            others = [v for v in range(1, 61) if v not in history and v != true]
            rank = sum(scores[v] >= scores[true] for v in others)
            ranks.append(math.inf if true in history else rank)
        expected = {"MRR": np.mean([1 / (r + 1) for r in ranks])}
        for k in (1, 5, 10, 20, 50):
            expected[f"Recall@{k}"] = np.mean([r < k for r in ranks])
            expected[f"NDCG@{k}"] = np.mean([1 / math.log2(r + 2) if r < k else 0 for r in ranks])
        for threads in (1, 3):
            assert train.evaluate(scorer, data, "test", 3, threads) == pytest.approx(expected)
    table = with_ties.copy()
    train.evaluate(lambda seen: table[:len(seen)], data, "test")
    assert (table == with_ties).all(), "a scorer may hand out what it keeps"
    assert (train.evaluate(lambda seen: table[:len(seen)].tolist(), data, "test")
            == train.evaluate(lambda seen: table[:len(seen)], data, "test"))
    with pytest.raises(ValueError, match="must be .users, V.1., .16, 61. .got .16, 9.."):
        train.evaluate(lambda seen: table[:len(seen), :9], data, "test")


def test_markov_and_popularity_by_hand():
    data = dataset([1, 2, 3, 1, 1] + [2, 3, 2, 1, 1], [0, 5, 10], 99)
    data = data._replace(items=data.items.astype(np.int8))         # too small for pairs of items
    scorers = train.baseline_scorers(data)
    assert scorers["popularity"]([[2]])[0, :4].tolist() == [0, 1, 3, 2]
    markov = scorers["markov"]([data.items[5:6], [3], [1], [1, 2]])
    assert markov[0, :4] == pytest.approx([0, 1 / 7, 3 / 7, 2 + 2 / 7])
    assert markov[1].argmax() == 2 and markov[2].argmax() == 2 and (markov[3] == markov[0]).all()


DEFAULTS = {"data": "ml-100k", "epochs": 50, "patience": 15, "seed": 42, "batch_size": None,
            "max_len": 200, "dropout": 0.5, "lr": 2e-3, "schedule": "constant",
            "weight_decay": 0.01, "average": 0.0, "d_model": 64, "n_blocks": 2, "max_phase": 0.01,
            "min_count": 5, "ties": "item", "columns": None, "titles": None,
            "threads": os.cpu_count() or 1}
SHOWN = "Recall@5 Recall@10 Recall@20 NDCG@5 NDCG@10 NDCG@20 MRR".split()


def test_a_whole_tiny_run_until_patience_ends_it(tmp_path, capsys):
    events = [f"u{u},i{(u + t) % 40},{t // 3}\n" for u in range(30) for t in range(12)]
    file = write(tmp_path / "f", "who,what,when\nu0,rare,9\nu1,rare,9\n" + "".join(events))
    titles, out = write(tmp_path / "t", ",None\ni1,The One\ni2,Two\n"), tmp_path / "run"
    settings = {"data": file, "columns": "who,what,when", "ties": "random", "min_count": 2,
                "titles": titles, "max_len": 4, "epochs": 40, "patience": 3, "seed": 3,
                "d_model": 8, "batch_size": 8, "lr": 0.02, "dropout": 0.1, "out": str(out)}
    assert run(*[f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]) == 0
    printed, report, history = capsys.readouterr(), report_in(out), report_in(out)["history"]
    data = reader.load_dataset(file, 2, "random", 3, "who,what,when", titles)
    assert report["data"] == {"name": file, "users": 30, "items": 41, "events": 362,
                              "digest": data.digest}
    assert train.DEFAULTS == DEFAULTS and report["config"] == {**DEFAULTS, **settings}
    params, extra = train.read_model(out / "model.npz")
    assert extra["titles"] == data.titles and data.titles[:3:2] == ["", "The One"]
    assert lrurec.load(out / "last.npz")[1]["step"] == 12 * len(history), "3 windows a user, in 8s"
    scorers = {"LRURec": train.model_scorer(params), **train.baseline_scorers(data)}
    tests = {"LRURec": report["test"], **report["baselines"]}
    for name, scorer in scorers.items():
        assert tests[name] == train.evaluate(scorer, data, "test", 4), name
        assert tests[name] != train.evaluate(scorer, data, "test"), name
    assert report["validation"] == train.evaluate(scorers["LRURec"], data, "validation", 4)
    recalls = [h["Recall@10"] for h in history]
    best = recalls.index(max(recalls))

    def cells(table):
        return "".join(f"{table[metric]:11.4f}" for metric in SHOWN)

    assert report["epoch"] == best + 1 == len(history) - 3 > 1
    for metric in ("Recall@10", "NDCG@10"):
        assert report["validation"][metric] == history[best][metric]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert all(0 < h["seconds"] < 60 for h in history)
    lines = [f"{file}: 30 users, 41 items, 362 events; user from who, item from what, "
             f"time from when; ties by random; run in {out}"]
    for n, h in enumerate(history, 1):
        mark = "*" if max(recalls[:n]) not in recalls[:n - 1] else " "
        lines.append(f"epoch {n:3d}  loss {h['loss']:.4f}  validation Recall@10 "
                     f"{h['Recall@10']:.4f} {mark}  {h['seconds']:.1f} s")
    assert printed.err == "" and printed.out.splitlines() == [
        *lines, "", f"test, best epoch {best + 1}, trained for {report['seconds']:.0f} s",
        " " * 12 + "".join(f"{metric:>11}" for metric in SHOWN),
        "popularity  " + cells(tests["popularity"]), "Markov chain" + cells(tests["markov"]),
        "LRURec      " + cells(tests["LRURec"])]
    assert run("--resume", "--out", out) == 0 and report_in(out) == report
    assert run("evaluate", out / "model.npz") == 0      # on the data as the run read them
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "validation" + cells(report["validation"]), "test      " + cells(tests["LRURec"])]


def test_shards_are_cut_at_the_walls_nearest_to_equal_parts_in_linear_time():
    for n_rows, n_parts in ((1000, 2), (5900, 2), (6100, 4), (10100, 6)):
        rng = np.random.default_rng(n_rows)
        batch = np.arange(n_rows), rng.integers(9, size=n_rows), rng.random(n_rows) < 0.02
        parts, walls = train.shards(*batch), np.flatnonzero(batch[2])
        assert all((np.concatenate(cut) == whole).all() for whole, *cut in zip(batch, *parts))
        cuts = np.cumsum([len(part[0]) for part in parts])[:-1]
        wanted = n_rows / n_parts * np.arange(1, n_parts)
        assert len(parts) == n_parts and np.isin(cuts, walls).all()
        assert all(abs(cut - w) == abs(walls - w).min() for cut, w in zip(cuts, wanted))
    assert len(train.shards(*batch[:2], np.arange(10100) % 5050 == 0)) == 2, "only two walls"
    tracemalloc.start()
    assert len(train.shards(*3 * [np.ones(400_000, bool)])) == 200
    assert tracemalloc.get_traced_memory()[1] < 2 ** 25, "no array of walls by shards"
    tracemalloc.stop()


def end_of(folder):
    """All that came out of a run but its settings and seconds; of arrays, the hash of their bits"""
    report, (arrays, _) = report_in(folder), lrurec.load(folder / "last.npz")
    for epoch in report["history"]:
        del epoch["seconds"]
    numbers = {key: report[key] for key in ("epoch", "history", "validation", "test")}
    return {**numbers, **{name: hash(array.tobytes()) for name, array in arrays.items()}}


def test_each_step_has_numbers_of_its_own_and_the_mean_of_the_weights_is_the_model(
        tiny, tmp_path, monkeypatch):
    shards, states, real_update = set(), set(), lrurec.adamw_update

    def loss_and_grads(params, items, targets, starts, dropout, rng):
        assert dropout == 0.1
        shards.add(items.tobytes())
        states.add(rng.bit_generator.state["state"]["state"])
        return 1.0, {name: rng.normal(0, 9, p.shape).astype(p.dtype) for name, p in params.items()}

    def update(params, grads, opt, lr, weight_decay):
        assert lrurec.clip_gradients(grads, np.inf) == pytest.approx(5, rel=1e-3)
        assert (lr, weight_decay) == (pytest.approx(rates[opt["step"]]), 0.3)
        if opt["step"] == 0:
            assert all((params[name] == start).all() for name, start in means[0].items())
        real_update(params, grads, opt, lr, weight_decay)
        d = min(0.4, (1 + opt["step"]) / (10 + opt["step"]))
        means.append({name: m + (1 - d) * (params[name] - m) for name, m in means[-1].items()})

    monkeypatch.setattr(lrurec, "loss_and_grads", loss_and_grads)
    monkeypatch.setattr(lrurec, "adamw_update", update)
    flags = [*tiny, "--n-blocks", 3, "--max-phase", 0.5, "--weight-decay", 0.3, "--average", 0.4]
    falling = 0.01 + 0.01 * np.cos(np.pi * np.arange(8) / 8)
    for seed, schedule, rates in ((5, "constant", 8 * [0.02]), (6, "cosine", falling)):
        out, rng = tmp_path / schedule, np.random.default_rng(seed)
        means = [lrurec.init_params(14, 8, n_blocks=3, max_phase=0.5, rng=rng)]
        assert run(*flags, "--seed", seed, "--schedule", schedule, "--out", out, "--epochs", 2) == 0
        report, (params, _) = report_in(out), train.read_model(out / "model.npz")
        for name, p in params.items():
            assert relative_error(p, means[4 * report["epoch"]][name]) < 1e-6, name
        scorer, data = train.model_scorer(params), reader.load_dataset(tiny[1])
        for split in ("validation", "test"):
            assert report[split] == train.evaluate(scorer, data, split, 200)
    assert len(shards) == len(states) == 32, "of 2 runs, 2 epochs, 4 batches, 2 shards: all differ"


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("module, name, happens, code, message", [
    (lrurec, "clip_gradients", Mock(side_effect=KeyboardInterrupt()), 130, "interrupted; "),
    (lrurec, "clip_gradients", Mock(side_effect=MemoryError()), 2, "out of memory: lower "),
    (lrurec, "adamw_update", lambda params, *rest: params["output_bias"].fill(np.nan), 2,
     "not finite in epoch {}: lower --lr"),
    (lrurec, "loss_and_grads", lambda params, *rest: (
        np.inf, {name: 0 * p for name, p in params.items()}), 2, "not finite in epoch {}: lower"),
    (os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "full")), 2, ".npz: full: check the ")])
def test_a_run_that_ends_amid_an_epoch_keeps_those_before(
        module, name, happens, code, message, epoch, tmp_path, capsys, monkeypatch):
    start = [*tiny_run(tmp_path, items=60), "--epochs", 2, "--threads", 1]
    out, whole, real_gradients = tmp_path / "run", tmp_path / "whole", train.gradients
    monkeypatch.setattr(train, "SHARD_ROWS", 20)

    def gradients(*arguments):
        if arguments[-1] == 4 * epoch - 1:         # the last step of the epoch
            patch.setattr(module, name, happens)
        return real_gradients(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "gradients", gradients)
        assert run(*start, "--out", out) == code
    error = capsys.readouterr().err.strip()
    assert message.format(epoch) in error and error.isprintable(), error
    assert ("nothing was saved yet" in error) == (code == 130 and epoch == 1)
    assert out.exists() == (epoch == 2), "a run that saved nothing leaves nothing"
    if epoch == 2:
        assert sorted(os.listdir(out)) == ["last.npz", "model.npz"]
        first = lrurec.load(out / "last.npz")[1]["history"][0]
        assert run("--resume", "--out", out, "--threads", 3) == 0
        assert run(*start, "--out", whole) == 0
        assert end_of(out) == end_of(whole), "neither the end nor the threads change a bit"
        report = report_in(out)
        assert report["seconds"] == first["seconds"] + report["history"][1]["seconds"]


def test_from_python(tmp_path):
    for users, events, size in ((5, 3, 1400), (7, 3002, 1), (40, 12, 140)):
        data = dataset(np.arange(users * events) % 7 + 1, range(0, users * events + 1, events), 7)
        folder, config = tmp_path / f"new{size}" / "folder", {"epochs": 2, "d_model": 2,
                                                              "max_len": None}
        state = train.fit(data, config, folder)
        params, extra = train.read_model(folder / "model.npz")
        assert state["epoch"] == 2 and state["mean"].keys() == params.keys()
        assert extra["config"] == {
            **DEFAULTS, **config, "batch_size": size, "data": os.path.abspath("toy")}, (
            "as many windows as hold about 1,400 training events")
    for config, message in (({"epohcs": 3}, "no setting 'epohcs': choose from .*epochs"),
                            ({"epochs": 2.5}, "--epochs: must be an integer from 1 .*2.5")):
        with pytest.raises(reader.DataError, match=message):
            train.fit(data, config, tmp_path / "no")
    with pytest.raises(reader.DataError, match="toy: no user has the 3 events"):
        train.fit(dataset(range(1, 9), range(0, 9, 2), 9), {}, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_model_made_from_python_knows_its_data_and_goes_on_with_its_settings(tmp_path):
    file = write(tmp_path / "f", "who,what,when\n" + "".join(
        f"u{u},i{(u + t) % 9},7\n" for u in range(9) for t in range(4)))
    folder = tmp_path / "r"
    data = reader.load_dataset(file, 0, "random", 7, "who,what,when")
    folder.mkdir()
    write(folder / "metrics.json", "of an older model")
    state = train.fit(data, {"epochs": 1, "d_model": 2, "average": 0.5}, folder)
    assert sorted(os.listdir(folder)) == ["last.npz", "model.npz"]
    for setting, value in (("d_model", 4), ("n_blocks", 1), ("average", 0), ("lr", 1e-3)):
        with pytest.raises(reader.DataError, match=f"--{setting.replace('_', '-')}: the run has"):
            train.fit(data, {setting: value}, folder, state)
    for wrong in ((data._replace(digest="other"), {}, folder, state), (data, {}, tmp_path, state)):
        with pytest.raises(reader.DataError, match="must be the data and the folder of the run"):
            train.fit(*wrong)
    state = train.read_run(folder)
    assert train.fit(data, {"epochs": 2}, folder, state)["config"] == {
        **DEFAULTS, "data": file, "min_count": 0, "ties": "random", "columns": "who,what,when",
        "seed": 7, "epochs": 2, "d_model": 2, "average": 0.5, "batch_size": 700}
    with pytest.raises(reader.DataError, match="seed is 8, but the data were read with 7"):
        train.fit(data, {"seed": 8}, tmp_path / "other")
    assert run("evaluate", folder / "model.npz") == 0
    assert run("recommend", folder / "model.npz", "--user", "u3") == 0


# ---------------------------------------------------------------------------------------------
# A run's files

def test_two_runs_never_share_a_folder_and_resume_takes_the_one_last_written(
        tiny, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused("--data", "nowhere") and not os.path.exists("runs")
    assert "no run in runs/" in refused("--resume")
    begun, real_load = [], reader.load_dataset

    def load(*arguments):                          # the first run begins another amid its start
        if not begun:
            begun.append(True)
            assert run(*tiny, "--epochs", 1) == 0
        return real_load(*arguments)

    monkeypatch.setattr(reader, "load_dataset", load)
    assert run(*tiny, "--epochs", 2) == 0 and run(*tiny, "--epochs", 1) == 0
    lengths = {path.name: len(report_in(path)["history"]) for path in Path("runs").iterdir()}
    assert lengths == {"toy": 2, "toy-2": 1, "toy-3": 1}
    assert "runs/toy exists: choose another --out" in refused(*tiny, "--out", "runs/toy")
    os.utime("runs/toy-2/last.npz")
    assert run("--resume", "--epochs", 2) == 0
    assert len(report_in(Path("runs", "toy-2"))["history"]) == 2


def test_what_resume_says_and_does(tiny, tmp_path, refused, monkeypatch, capsys):
    out, moved = tmp_path / "r", tmp_path / "moved.csv"
    assert "no epoch saved yet" in refused("--resume", "--out", out)
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job ignores it
    with monkeypatch.context() as patch:           # Ctrl-C waits until an epoch's files are written
        patch.setattr(os, "fsync", lambda file: signal.raise_signal(signal.SIGINT))
        assert run(*tiny, "--out", out) == 130
    os.rename(tiny[1], moved)
    assert "toy.csv cannot be read" in refused("--resume", "--out", out)
    again = ["--resume", "--out", out, "--data", moved]
    assert run(*again, "--epochs", 2) == 0
    assert report_in(out)["config"]["data"] == str(moved)
    assert run("evaluate", out / "model.npz", "--data", moved) == 0
    for flag, value in (("--lr", 1), ("--seed", 9), ("--average", 0.5), ("--titles", moved)):
        assert f"{flag}: the run has" in refused(*again, flag, value)
    for change in (lambda a, e: a.pop("m/output_bias"), lambda a, e: e.pop("history"),
                   lambda a, e: e.update(step=-1), lambda a, e: e.update(history=[7])):
        edited(shutil.copy(out / "last.npz", tmp_path), out / "last.npz", change)
        assert "last.npz holds no run to resume" in refused(*again, "--epochs", 3)
        shutil.copy(tmp_path / "last.npz", out)
    monkeypatch.setattr(lrurec, "clip_gradients", Mock(side_effect=KeyboardInterrupt()))
    assert run(*again, "--epochs", 3) == 130
    assert "continue with the same command" in capsys.readouterr().err
    write(moved, moved.read_text() + "\nu0,i0,99")
    for command in (again, ["evaluate", out / "model.npz", "--data", moved]):
        assert "has other events than the training had" in refused(*command)


unix = pytest.mark.skipif(os.name == "nt", reason="signals and shells of Unix")


@unix
@pytest.mark.parametrize("end, code", [("SIGKILL", -9), ("SIGINT", 130), ("closed pipe", 2)])
def test_a_run_ended_at_any_moment_says_so_and_goes_on_to_the_same_end(end, code, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job ignores it
    out, whole = tmp_path / "the run", tmp_path / "whole"
    start = [*tiny_run(tmp_path), "--patience", 100_000, "--threads", 2, "--average", 0.9]
    program = python("train.py", *start, "--epochs", 100_000, "--out", out)
    with subprocess.Popen(**program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   2"):       # the first is saved by then
                break
        time.sleep(0.02)
        if end == "closed pipe":
            process.stdout.close()
        else:
            os.killpg(process.pid, getattr(signal, end))
        error = process.stderr.read()
        assert process.wait(10) == code and error.count("\n") <= 2, error
    assert code == -9 or f"train.py train --resume --out '{out}'" in error
    lrurec.load(out / "model.npz")                 # the old one or the new one, never half of one
    epochs = lrurec.load(out / "last.npz")[1]["epoch"] + 2
    assert run("--resume", "--out", out, "--epochs", epochs) == 0
    assert run(*start, "--out", whole, "--epochs", epochs, "--threads", 1) == 0
    assert end_of(out) == end_of(whole)


@unix
@pytest.mark.parametrize("command, shell, code, out, err", [
    ("compare", '"$@" 2>&-', 2, "train.py: ", ""), ("inspect", '"$@" >&-', 0, "", "block 0"),
    ("inspect", '"$@" >&- 2>&-', 0, "", ""), ("recommend", '"$@" <&-', 0, "", ""),
    ("recommend --all-users", '{ "$@"; echo "code $?" >&2; } | true', 0, "", "code 0"),
    pytest.param("inspect", '"$@" >/dev/full', 2, "", "train.py: output: No space",
                 marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux"))])
def test_closed_and_full_streams_lose_nothing_in_silence(command, shell, code, out, err, model):
    program = python("train.py", *command.split(), model)
    program["args"][:0] = ["sh", "-c", shell, "sh"]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}   # what is written late is lost late
    done = subprocess.run(**program, env=env, capture_output=True, text=True)
    for expected, text in ((out, done.stdout), (err, done.stderr)):
        assert text.startswith(expected) and bool(text) == bool(expected), text
    assert done.returncode == code and (code == 0 or (done.stdout + done.stderr).count("\n") == 1)


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

def test_raw_id_beats_title_beats_part_of_a_title_else_candidates_are_named():
    items = [["", "7", "8", "9", "Heat", "l", "6"],
             ["", "Heat (1995)", "Star Wars (1977)", "Star Trek (1979)", "8",
              "Lion King, The (1994)", "Heat (1995), the making of"]]
    for text, item in (("7", 1), ("8", 2), ("Heat", 4), ("heat (1995)", 1), (" TREK ", 3),
                       ("the lion king", 5), ("Lion King, the", 5)):
        assert train.find_item(text, *items) == item, text
    for text, message in (
            ("star", r"matches 2 items.*Star Wars \(1977\) \[8\]; Star Trek \(1979\) \[9\]"),
            ("Star Wrs", "no item 'Star Wrs': give a title, a part of one"), ("", "no item")):
        with pytest.raises(reader.DataError, match=message):
            train.find_item(text, *items)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    titles = write(folder / "titles", 'item,title\ni3,"Rock, The (1996)"\ni4,Undo\ni6,Дом\n')
    assert run(*tiny_run(folder), "--out", folder / "run", "--epochs", 4, "--max-len", 5,
               "--titles", titles) == 0
    return folder / "run" / "model.npz"


def best_after(model, raw_ids, top, longest=99):
    """What to recommend after these raw ids, by hand: a list of [rank, raw id, title, score].
    The model sees the longest last ones, and none of them is recommended."""
    params, extra = train.read_model(model)
    history = [extra["item_ids"].index(raw) for raw in raw_ids] or [0]
    recent = history[-longest:]
    hidden = lrurec.encode(params, recent, np.zeros(len(recent), bool))
    scores = lrurec.score(params, hidden[-1])
    best = sorted(set(range(1, 15)) - set(history), key=lambda v: -scores[v])[:top]
    return [[str(n), extra["item_ids"][v], extra["titles"][v], scores[v]]
            for n, v in enumerate(best, 1)]


def test_recommend_for_a_history(model, capsys):
    everything = [f"i{k}" for k in range(14)]
    for words, history, top in ((["the rock", "i5"], ["i3", "i5"], 99), (["i5"], ["i5"], 4),
                                (["--new-user"], [], 12), (everything, everything, 1)):
        assert run("recommend", model, "--top", top, *words) == 0
        lines = capsys.readouterr().out.splitlines()
        best, rows = best_after(model, history, top), [line.split() for line in lines]
        assert [row[:-1] for row in rows] == [[n, *title.split()] for n, _, title, _ in best]
        scores = [float(row[-1]) for row in rows]
        assert scores == pytest.approx([row[-1] for row in best], abs=1e-3)
        assert len({len(line) for line in lines}) <= 1, "columns are aligned"


def test_recommend_for_users_of_the_data(model, tmp_path, refused, capsys):
    data = reader.load_dataset(train.read_model(model)[1]["config"]["data"])
    histories = {user: [data.item_ids[v] for v in events]         # of 30 users: two groups
                 for user, events in zip(data.user_ids, reader.full_histories(data))}
    # others' data: what the model does not know is left out; who has nothing else is a new user
    other = write(tmp_path / "other.csv", "user,item,time\n" + "".join(
        f"a,i3,{t}\na,new,{t}\nb,new,{t}\nb,newer,{t}\n" for t in range(5)) + "c,i4,1\n")
    for flags, expected in (
            (["--all-users"], histories), (["--user", "u7"], {"u7": histories["u7"]}),
            (["--all-users", "--data", other], {"a": 5 * ["i3"], "b": [], "c": ["i4"]})):
        assert run("recommend", model, *flags, "--top", 4) == 0
        head, *rows = train.csv.reader(capsys.readouterr().out.splitlines())
        best = [[user, *row] for user in expected
                for row in best_after(model, expected[user], 4, 5)]
        assert head == ["user", "rank", "item", "title", "score"]
        assert [row[:4] for row in rows] == [row[:4] for row in best]
        scores = [float(row[4]) for row in rows]
        assert scores == pytest.approx([row[4] for row in best], abs=1e-4)
    assert "no user 'nobody' among" in refused("recommend", model, "--user", "nobody")


def test_a_pipe_is_answered_line_by_line(model, refused, monkeypatch):
    class Pipe(io.StringIO):
        def __next__(self):
            answered.append(printed.getvalue().count(b"\n"))
            return super().__next__()

    answered, printed = [], io.BytesIO()
    monkeypatch.setattr("sys.stdin", Pipe("i3\nдом\n\nДом\n"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "cp1252"))     # Windows
    assert run("recommend", model) == 0
    assert answered == [0, 1, 2, 2, 3], "each line before the next one is read"
    for history, line in zip((["i3"], ["i3", "i6"], ["i6"]), printed.getvalue().splitlines()):
        titles = [title for _, _, title, _ in best_after(model, history, 10)]
        assert line == "\t".join(titles).encode()
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n\nwhat\n"))
    assert "standard input, line 3: no item 'what'" in refused("recommend", model)


def test_a_session_on_a_terminal(model, capsys, monkeypatch):
    def table(*history):
        rows = [f" {n}  {title}" for n, _, title, _ in best_after(model, history, 3)]
        return [*rows, f"{len(history)} event(s); top 3 updated"]

    taken = "is taken as the command; for the item type its id, i4"
    for end in ("", "quit\ni5", "EXIT\ni5"):
        terminal = io.StringIO("the rock\ni5\nUNDO\nдом\nReset\nundo\ni4\nHELP\n\n1?\n" + end)
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", terminal)
        assert run("recommend", model, "--top", 3) == 0
        out = re.sub("> | in [0-9]+ µs| +-?[0-9.]+$", "", capsys.readouterr().out, flags=re.M)
        assert out.rstrip().splitlines() == [
            train.HELP, *table("i3"), *table("i3", "i5"), f"UNDO {taken}", *table("i3"),
            *table("i3", "i6"), *table(), f"undo {taken}", *table(), *table("i4"), train.HELP,
            train.HELP, "no item '1?': give a title, a part of one, or an id"]


def test_compare(model, tmp_path, refused, capsys):
    report, runs = report_in(model.parent), [model.parent, tmp_path]
    for split, factor in (("validation", 0.5), ("test", 0.25)):
        report[split] = {name: factor * value for name, value in report[split].items()}
    write(tmp_path / "metrics.json", json.dumps(report))
    assert run("compare", *runs) == 0
    lines = capsys.readouterr().out.splitlines()
    for split, table in (("validation", lines[:6]), ("test", lines[6:])):
        rows = [[report_in(folder)[split][name] for name in train.SHOWN] for folder in runs]
        rows += [np.mean(rows, 0), np.std(rows, 0, ddof=1)]
        assert table[0] == split and len(table) == 6
        for line, name, row in zip(table[2:], [*runs, "mean", "± sample std"], rows):
            assert line.startswith(str(name))
            assert line.split()[-7:] == [f"{value:.4f}" for value in row]
    other = {**report, "data": {"digest": "other"}}
    for text, message in ((json.dumps(other), "different data"), ("", "no metrics"),
                          ("{}", "no metrics"), ("[]", "no metrics"), ("7", "no metrics")):
        write(tmp_path / "metrics.json", text)
        assert message in refused("compare", *runs)
    assert "metrics.json holds no metrics" in refused("compare", tmp_path / "nowhere")
    for seed in ("1", "2"):                        # with random ties each seed draws its own data
        os.mkdir(tmp_path / seed)
        drawn = {"config": {"ties": "random"}, "data": {"digest": seed, "events": 9}}
        write(tmp_path / seed / "metrics.json", json.dumps({**report, **drawn}))
    assert run("compare", tmp_path / "1", tmp_path / "2") == 0


def test_inspect(model, capsys):
    assert run("inspect", model) == 0
    out, (params, _) = capsys.readouterr().out, lrurec.load(model)
    for k, line in enumerate(re.findall("block .*", out)):
        rate = np.exp(params[f"blocks.{k}.lru.nu_log"].astype(float))          # |lam| = e^-rate
        size, life = np.exp(-rate), np.log(2) / rate
        low, middle, high = np.quantile(life, [0.1, 0.5, 0.9])
        expected = [k, size.mean(), size.min(), size.max(), middle, 10, low, 10, high, life.max()]
        assert [float(x) for x in re.findall("[0-9.]+", line)] == pytest.approx(
            expected, rel=1e-3, abs=0.006)
    picture = train.disk(np.array([1, 1j, -1, *[-0.5] * 12]))
    assert picture[0][20] + picture[10][0] + picture[10][40] + picture[10][10] == "1119"
    assert picture[3] == picture[17] and picture[3].strip(" .") == "", "the circle"
    assert f"\n{picture[3]}\n" in out and k == 1


# ---------------------------------------------------------------------------------------------
# Files and flags made to harm

def edited(path, to, change):
    """Save the arrays and the JSON of the model at path to another one, after change(a, e)."""
    arrays, extra = lrurec.load(path)
    change(arrays, extra)
    np.savez(to, extra=np.array(json.dumps(extra)), **arrays)
    return to


def test_a_harmful_model_file_is_one_line_that_names_it_and_runs_no_code(model, tmp_path, refused):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path, bias = tmp_path / "bad.npz", lrurec.load(model)[0]["output_bias"]
    for part, name, value in (
            ("config", "n_blocks", 10 ** 9), ("config", "n_blocks", 1000), ("json", "config", "x"),
            ("config", "d_model", 10 ** 6), ("config", "d_model", 65536), ("json", "item_ids", 7),
            ("config", "ties", "item --resume"), ("config", "d_model", "wide"),
            ("config", "max_len", [1]), ("config", "speed", 1), ("json", "titles", ["x"]),
            ("json", "item_ids", []), ("arrays", "more", bias), ("arrays", "output_bias", bias[1:]),
            ("arrays", "output_bias", bias.astype(float)), ("arrays", "output_bias", np.nan * bias),
            ("arrays", "output_bias", np.array([Bomb()]))):
        def change(a, e):
            {"arrays": a, "json": e, "config": e["config"]}[part][name] = value

        begin = time.process_time()
        edited(model, path, change)
        assert f"{path} holds no sound model" in refused("inspect", path), (name, value)
        assert time.process_time() - begin < 1
    edited(model, path, lambda a, e: a.update(item_embedding=a.pop("item_embedding")))
    assert "holds no sound model" in refused("inspect", path), "the order of the arrays"
    assert not (tmp_path / "exploded").exists()


def test_a_model_file_survives_random_edits(tmp_path, refused, capsys):
    """Of its bytes, its JSON, its arrays: a good load or a line that names it."""
    train.fit(dataset(np.arange(60) % 7 + 1, range(0, 61, 6), 7),
              {"epochs": 1, "d_model": 2, "n_blocks": 1, "max_len": None}, tmp_path)
    capsys.readouterr()
    model, path = tmp_path / "model.npz", tmp_path / "edited.npz"
    rng, raw, good = np.random.default_rng(0), model.read_bytes(), 0
    values = ["gone", None, 0, -1, 3, 1e300, 10 ** 30, "", [], {}, True, 8 * [7], 8 * ["\n\x1b"]]

    def change(a, e):
        inside, value = [a, e, e["config"]][rng.integers(3)], values[rng.integers(len(values))]
        name = rng.choice([*inside])
        inside[name] = value
        if value == "gone":
            inside.pop(name)

    for n in range(2000):
        if n % 2:
            write(path, scrambled(raw, rng))
        else:
            edited(model, path, change)
        code, (out, error) = run("recommend", path, "--new-user"), capsys.readouterr()
        assert (out + error).replace("\n", "").isprintable(), (out, error)
        assert code == 0 or code == 2 and error.count("\n") == 1 and str(path) in error, error
        good += code == 0
    assert 50 < good < 1000, good
    edited(model, path, lambda a, e: e.update(item_ids=8 * ["\x1b[2J"], titles=8 * ["\x1b[2J"]))
    assert r"matches 8 items: \x1b[2J [\x1b[2J]" in refused(
        "recommend", path, "2J")


def test_a_mistake_ends_with_2_and_one_line_and_leaves_nothing(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reader, "fetch_movielens", lambda name: "no such archive")
    write(tmp_path / "file", "")
    for arguments, message in (
            ("--ties x", "choose from"), ("--dropout 1", "0.99"), ("--average 1", "0.999999"),
            ("--data /nowhere.csv", "nowhere.csv cannot be read"), ("--columns user", "USER,ITEM"),
            ("--out file/run", "file"), ("inspect file", "not a model file"), ("compare", "RUN"),
            ("evaluate nowhere.npz", "nowhere.npz"), ("train extra", "arguments: extra"),
            ("recommend m --user u --all-users", "give one of"), ("--\x1b[2J", r"\x1b[2J"),
            ("recommend m --user u --top 2 x", "give one of"),
            ("recommend m --top 2 x --lr 1", "unrecognized arguments: x --lr 1"),
            ("recommend m --top 0", "--top: must be"), (f"recommend m --top {10 ** 400}", "--top")):
        assert message in refused(*arguments.split(" "))
    positive = "epochs patience batch-size max-len d-model n-blocks threads max-phase".split()
    for flag in [*positive, "seed", "min-count", "lr", "weight-decay", "dropout", "average"]:
        least = 1 if flag in positive else 0
        train.parse_arguments(["--" + flag, str(least)])          # raises DataError
        for value in ("x", "nan", least - 1, 10 ** 20, 10 ** 30, 10 ** 400):
            assert f"--{flag}: must be a" in refused("--" + flag, value)
    assert os.listdir(tmp_path) == ["file"]


# ---------------------------------------------------------------------------------------------
# The front door

def blocks_of_the_readme(language):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", file.read(), re.S | re.M)
    return [text for name, text in blocks if name == language]


def test_every_command_in_the_readme_parses_and_every_flag_is_shown_there_and_in_help(capsys):
    lines = "".join(blocks_of_the_readme("")).replace("&& ", "\n").splitlines()
    commands = [line.partition("  #")[0] for line in lines if line.startswith("python ")]
    for command in commands:
        program, *words = shlex.split(command.partition(">")[0])[1:]
        if program == "train.py":
            train.parse_arguments(words)           # raises DataError
        elif program == "test_lrurec.py":
            names = {word.removesuffix(".py") for word in words}
            assert names <= {*EXERCISES, "check", "train", "pytorch", "--hint"}, command
    assert run("train", "--help") == 0
    listed, shown = " ".join(capsys.readouterr().out.split()), " ".join(commands)
    for name, default in train.DEFAULTS.items():
        flag = "--" + name.replace("_", "-")
        assert flag in shown and f" {flag} " in listed, flag
        assert not default or f"(default: {default})" in listed, flag


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    """On other data: users who walk round a ring of items, with numbers as ids."""
    items = (np.arange(60)[:, None] * 7 + np.arange(12)) % 120 + 1
    monkeypatch.setattr(reader, "load_dataset", lambda name: dataset(
        items.ravel(), range(0, 721, 12), 120))
    monkeypatch.chdir(tmp_path)
    for block in blocks_of_the_readme("python"):
        exec(block, {})
    assert np.load("scores.npy").shape == (60, 121)


# ---------------------------------------------------------------------------------------------
# The GPU, on machines without one: a stand-in for CuPy whose arrays refuse NumPy

class DeviceArray(np.ndarray):
    """Operators work on it alone, NumPy's functions where the stand-in calls them."""
    reads = 0                                      # copies to the host, each a wait for the card
    __float__ = __index__ = None                   # say .get() where one is wanted

    def __array_function__(self, function, types, args, options):
        assert StandIn.working, f"{function} was given a device array"
        return super().__array_function__(function, types, args, options)

    def __array_wrap__(self, result, context=None, _=False):
        if context and not StandIn.working:
            function, arguments, _ = context
            assert np.ndarray not in map(type, arguments), f"{function} mixes host and device"
        return result.view(DeviceArray)

    def __bool__(self):
        return bool(self.get())

    def get(self):
        DeviceArray.reads += 1
        return np.array(self)


class StandIn:
    """As much of CuPy as we use, on one thread; the two kernels are done here by the definition."""
    inf, ndarray, add = np.inf, DeviceArray, np.add
    working = False                                # within a function of it

    def __getattr__(self, name):
        def call(*args, **options):
            assert np.ndarray not in map(type, args), f"{name} was given an array of the host"
            StandIn.working = True
            try:
                return self.asarray(getattr(np, name)(*args, **options))
            finally:
                StandIn.working = False
        return call

    def asarray(self, x, dtype=None):
        return np.array(x, dtype).view(DeviceArray)

    def ElementwiseKernel(self, inputs, outputs, body, name):
        return getattr(self, name)                 # one of the two below

    def lru_scan(self, lam, starts, N, H, h, size):
        assert (N, H, size) == (*h.shape, h.size) and type(starts) is type(lam) is DeviceArray
        h[:] = lrurec.scan_loop(lam, h, starts)

    def random_bytes(self, seed, size):
        return self.asarray(np.random.default_rng(seed).integers(256, size=size))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", StandIn())
    yield lrurec.use_device
    lrurec.use_device("cpu")


def test_the_same_numbers_on_the_stand_in_and_no_wait_inside_a_step(gpu):
    params, batch = tiny_params(n_items=40), batch_of(40)
    batch[1][:15] = 0                              # a shard counts by its targets

    def step_of_training(params, dropout):
        config = {**DEFAULTS, "dropout": dropout, "threads": 1}
        loss, grads = train.gradients(None, params, batch, config, 0)
        norm = lrurec.clip_gradients(grads, 0.1)
        lrurec.adamw_update(params, grads, lrurec.adamw_init(params), 0.01, 0.01)
        return [loss, norm, *grads.values(), *params.values(), *everything(params, *batch)]

    gpu("gpu")
    device = {name: lrurec.xp.asarray(p) for name, p in params.items()}
    DeviceArray.reads = 0
    step_of_training({name: p.copy() for name, p in device.items()}, 0.3)
    results = step_of_training(device, 0)
    assert DeviceArray.reads == 0, "each wait for the card costs more than the step's kernels"
    results = [lrurec.to_host(result) for result in results]
    for stray in (np.zeros_like, lambda z: z + np.ones(4), lambda z: float(z.sum())):
        with pytest.raises((AssertionError, TypeError)):
            stray(device["embedding_norm.scale"])  # the stand-in catches it
    gpu("cpu")
    for a, b in zip(results, step_of_training(params, 0)):         # on the CPU in two shards
        assert relative_error(a, b) < 1e-12


def test_the_whole_program_on_the_stand_in_and_its_model_on_the_cpu(gpu, tiny, tmp_path, capsys,
                                                                    monkeypatch):
    def quick(work, repeat=5):                     # without the large models, which take their time
        if repeat != 3:
            work()
        return 1e-6

    out, model = tmp_path / "run", tmp_path / "run" / "model.npz"
    monkeypatch.setattr(train, "timed", quick)
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n"))
    for command in ([*tiny, "--out", out, "--epochs", 2, "--average", 0.9],
                    ["--resume", "--out", out, "--epochs", 3], ["evaluate", model],
                    ["bench", *tiny[:2]], ["recommend", model, "--user", "u3"],
                    ["recommend", model], ["recommend", model, "i3"]):
        assert run(*command, "--device", "gpu", "--threads", 1) == 0
    on_gpu = capsys.readouterr().out.splitlines()[-10:]
    assert run("recommend", model, "i3") == 0
    assert capsys.readouterr().out.splitlines()[-10:] == on_gpu


def test_without_cupy_or_a_card_one_line_says_what_to_install(monkeypatch, refused):
    assert "cupy" not in sys.modules, "nobody asked for it"
    for cupy, reason in ((None, "cupy"), (object(), "no attribute 'zeros'")):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        error = refused("--device", "gpu")
        assert reason in error and 'pip install "cupy' in error and lrurec.xp is np
