# SPDX-License-Identifier: MIT
"""The proof: every derivative against central differences, the fast against the plain; and the
grader of the exercises.

    python -m pytest -q                          the proof
    python test_lrurec.py                        the exercises, easy to hard
    python test_lrurec.py gelu > mine.py         one of them: fill in the empty body
    python test_lrurec.py mine.py                grade it

Offline, and nothing but NumPy and pytest. float64 throughout, where nothing else is said.
"""
import errno
import gzip
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # small products: threads only wait

import numpy as np  # noqa: E402

import lrurec  # noqa: E402

# ---------------------------------------------------------------------------------------------
# The grader: an analytic gradient against the numeric one, tensor by tensor


class Wrong(AssertionError):
    """What the grader found, as a table with hints."""


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


def relative_error(a, n):
    scale = np.linalg.norm(a) + np.linalg.norm(n)
    return np.linalg.norm(a - n) / scale if scale > 1e-12 else np.linalg.norm(a - n)


def grade(loss, inputs, grads, tolerance=1e-7, mistakes=()):
    """Raise Wrong, with one row per tensor, where an analytic gradient is not the numeric one.

    inputs, grads: dicts of arrays; loss(): a real number that depends on the inputs' memory;
    mistakes: (hint, grads) pairs, what some common mistakes would give.
    """
    rows, failed = [], False
    for name, z in inputs.items():
        n, a = numeric_gradient(loss, z), np.asarray(grads.get(name, np.nan))
        error = relative_error(a, n) if a.shape == n.shape else np.inf
        bad = not error < tolerance
        failed |= bad
        rows.append(f"{name:20} {str(n.shape):10} {error:9.1e}  {'WRONG' if bad else 'ok'}")
        if bad and a.shape == n.shape:
            worst = np.unravel_index(np.nanargmax(np.nan_to_num(abs(a - n), nan=1e300)), n.shape)
            rows.append(f"    worst at {tuple(map(int, worst))}: analytic {a[worst]:.6g}, "
                        f"numeric {n[worst]:.6g}")
        if bad:
            known = [(text, wrong.get(name)) for text, wrong in mistakes]
            rows.append("    hint: " + hint(a, n, known))
    if failed:
        raise Wrong("\n" + "\n".join(rows))


def hint(a, n, known=()):
    """What the difference between analytic a and numeric n looks like."""
    def same(x, y):
        return x is not None and x.shape == y.shape and relative_error(x, y) < 1e-5

    if a.dtype == object or a.shape == ():
        return "nothing came back for this tensor"
    if a.shape != n.shape:
        return (f"the shape is {a.shape}, not {n.shape}"
                + ("; it looks transposed" if same(a.T, n) else ""))
    if not np.isfinite(a).all():
        return "an entry is not finite"
    factor = np.vdot(n, a).real / max(np.vdot(n, n).real, 1e-300)
    if same(a, -n):
        return "the sign is flipped"
    if abs(factor) > 1e-9 and same(a, factor * n):
        return f"a constant factor: the analytic gradient is {factor:.6g} times the numeric one"
    if np.iscomplexobj(n) and same(a, n.conj()):
        return "a missing conjugate: this is the conjugate of the gradient"
    if a.ndim == 2 and same(a.T, n):
        return "this is the gradient transposed"
    for text, wrong in known:
        if same(wrong, a) and not same(wrong, n):
            return text
    return "no known pattern; check the term that this tensor enters"


def grade_layer(L, name, inputs, *rest, tolerance=1e-7, mistakes=None):
    """Grade L's pair name_forward, name_backward: the loss is a random projection of the output.

    mistakes(projection, cache) -> (hint, gradients) pairs, gradients in the backward's order.
    """
    forward, backward = getattr(L, name + "_forward"), getattr(L, name + "_backward")
    out, cache = forward(*inputs.values(), *rest)
    ours, _ = getattr(lrurec, name + "_forward")(*inputs.values(), *rest)
    if relative_error(out, ours) > 1e-10:
        raise Wrong(f"\n{name}_forward no longer gives what it gave: put it back")
    projection = real(*out.shape, seed=9)
    if np.iscomplexobj(out):
        projection = projection + 1j * real(*out.shape, seed=8)

    def loss():
        return np.sum(projection.conj() * forward(*inputs.values(), *rest)[0]).real

    def by_name(grads):
        return dict(zip(inputs, grads if isinstance(grads, tuple) else (grads,)))

    known = [(text, by_name(g)) for text, g in mistakes(projection, cache)] if mistakes else ()
    grade(loss, inputs, by_name(backward(projection.copy(), cache)), tolerance, known)


def real(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def compl(*shape, seed=1):
    return real(*shape, seed=seed) + 1j * real(*shape, seed=seed + 100)


STARTS = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0], bool)
NO_WALLS = np.zeros(11, bool)
WALL = "a wall is ignored: this is the gradient without walls"


def lam_of(H, radius=0.9):
    return radius * np.exp(1j * np.linspace(0.4, 5.1, H))         # generic phases


def tiny_params(n_items=7, n_blocks=2):
    """float64, nothing zero, square or symmetric: zeros hide wrong gradients."""
    params = lrurec.init_params(n_items, 4, 5, 6, n_blocks, np.random.default_rng(1), np.float64)
    for seed, p in enumerate(params.values()):
        p += 0.3 * (compl if np.iscomplexobj(p) else real)(*p.shape, seed=seed)
    return params


# One grader a function pair. L is lrurec, or a copy of it with some functions replaced; the
# expected relative error stands beside each tolerance.

def grade_linear(L):
    grade_layer(L, "linear", {"x": real(5, 3), "W": real(3, 4), "b": real(4)})           # 1e-10


def grade_gelu(L):
    grade_layer(L, "gelu", {"x": 2 * real(6, 5)})                                        # 1e-10


def grade_layer_norm(L):
    grade_layer(L, "layer_norm", {"x": real(5, 6), "scale": real(6), "shift": real(6, seed=2)})


def grade_dropout(L):
    class Fixed:                                   # a random stream that begins anew every time
        def integers(self, *args, **options):
            return np.random.default_rng(3).integers(*args, **options)
    grade_layer(L, "dropout", {"x": real(5, 6)}, 0.4, Fixed())                           # 1e-11


def grade_embedding(L):
    for items in ([3, 0, 3, 1, 5, 3], [1, 4, 1, 2, 4, 1]):
        grade_layer(L, "embedding", {"E": real(6, 4)}, np.array(items))                  # 1e-11


def grade_cross_entropy(L):
    targets, weights = np.array([1, 4, 0, 2]), np.array([0.5, 0.2, 0.0, 0.3])
    logits = 3 * real(4, 6)

    def loss():
        return 1.7 * L.cross_entropy_forward(logits.copy(), targets, weights)[0]

    by_hand = sum(w * (np.log(np.exp(x).sum()) - x[t])
                  for w, x, t in zip(weights, logits, targets))
    if abs(loss() - 1.7 * by_hand) > 1e-12:
        raise Wrong("\ncross_entropy_forward no longer gives what it gave: put it back")
    _, cache = L.cross_entropy_forward(logits.copy(), targets, weights)
    grade(loss, {"logits": logits}, {"logits": L.cross_entropy_backward(1.7, cache)})    # 1e-10


def grade_lam(L):
    grade_layer(L, "lam", {"nu_log": real(5), "theta_log": real(5, seed=2)})             # 1e-10


def grade_complex_in(L):
    def mistakes(d, cache):
        x, B = cache[0], cache[1].view(complex)
        yield "a missing conjugate: B enters dx conjugated", (np.real(d @ B.T), x.T @ d, d.sum(0))
    grade_layer(L, "complex_in", {"x": real(5, 3), "B": compl(3, 4), "b": compl(4)},     # 1e-10
                mistakes=mistakes)


def grade_complex_out(L):
    grade_layer(L, "complex_out", {"h": compl(5, 4), "C": compl(4, 3), "b": real(3)})    # 1e-10


def grade_scan(L):
    """Any N, any walls, any |lam|: against the definition."""
    for N in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 100, 257):
        for p_wall in (0, 0.1, 0.6, 1):
            starts = np.random.default_rng(N).random(N) < p_wall
            for radius in (0.3, 0.9999):
                lam, u = lam_of(5, radius), compl(N, 5)
                u_before, h = u.copy(), lrurec.scan_loop(lam, u, starts)
                for name in ("scan_recursive", "scan"):
                    out = getattr(L, name)(lam, u, starts)
                    if out is None or out.shape != h.shape or relative_error(out, h) > 1e-12:
                        raise Wrong(f"\n{name} differs from scan_loop for N = {N}, |lam| = "
                                    f"{radius}, walls at {np.flatnonzero(starts).tolist()}")
                    if (u != u_before).any():
                        raise Wrong(f"\n{name} changed the u that it was given")


def grade_scan_backward(L):
    inputs = {"lam": lam_of(4), "u": compl(11, 4)}
    projection = compl(11, 4, seed=5)

    def run():
        return lrurec.scan_loop(inputs["lam"], inputs["u"], STARTS)

    def mistake(text, lam, h, starts):
        return text, dict(zip(inputs, lrurec.scan_backward(projection, lam, h, starts)))

    lam, h, given = inputs["lam"], run(), projection.copy()
    grads = L.scan_backward(given, lam, h, STARTS) or (np.nan, np.nan)
    if (given != projection).any():
        raise Wrong("\nscan_backward changed the dh that it was given")
    _, g = lrurec.scan_backward(projection, lam, h, STARTS)
    across = {"lam": (h[:-1].conj() * g[1:]).sum(0)}
    grade(lambda: np.sum(projection.conj() * run()).real, inputs,                        # 1e-10
          dict(zip(inputs, grads)),
          mistakes=[(WALL, across), mistake(WALL, lam, h, NO_WALLS),
                    mistake("a missing conjugate: lam runs backward conjugated", lam.conj(), h,
                            STARTS),
                    mistake("a missing conjugate: h enters dlam conjugated", lam, h.conj(),
                            STARTS)])


def grade_lru(L):
    D, H = 3, 4
    inputs = {"x": real(11, D), "nu_log": real(H) - 1, "theta_log": real(H, seed=3),
              "gamma_log": real(H, seed=4), "B": compl(D, H), "b_B": compl(H),
              "C": compl(H, D), "b_C": real(D)}
    grade_layer(L, "lru", inputs, STARTS, tolerance=1e-6, mistakes=lambda d, cache: [    # 1e-9
        (WALL, lrurec.lru_backward(d, {**cache, "starts": NO_WALLS}))])


def grade_block(L):
    p, x = lrurec.blocks(tiny_params(n_blocks=1))[0], real(11, 4)
    projection = real(11, 4, seed=5)
    for dropout in (0.0, 0.3):
        def run():
            return L.block_forward(x, p, STARTS, dropout, np.random.default_rng(2))

        _, cache = run()
        dx, dp = L.block_backward(projection.copy(), cache) or (np.nan, {})
        cache["lru"]["starts"] = NO_WALLS
        wx, wp = lrurec.block_backward(projection.copy(), cache)
        grade(lambda: np.sum(projection * run()[0]), {"x": x, **p}, {"x": dx, **dp},     # 1e-9
              1e-6, [(WALL, {"x": wx, **wp})])


def grade_output_loss(L):
    inputs = {"hidden": real(37, 3), "E": real(6, 3), "output_bias": real(6)}
    targets, chunk = np.random.default_rng(0).integers(0, 6, 37), L.LOGITS_PER_CHUNK
    results = []
    for L.LOGITS_PER_CHUNK in (1, 10 ** 6):        # chunks of 16 rows, the least; all rows
        results.append(L.output_loss(*inputs.values(), targets))
    L.LOGITS_PER_CHUNK = chunk
    for a, b in zip(*results):
        assert relative_error(np.asarray(a), np.asarray(b)) < 1e-12, "chunks change the result"
    grade(lambda: L.output_loss(*inputs.values(), targets)[0], inputs,                   # 1e-9
          dict(zip(inputs, results[0][1:])))


def grade_model(L):
    params, rng = tiny_params(), np.random.default_rng(4)
    items, targets = rng.integers(0, 8, 11), rng.integers(0, 8, 11)
    for dropout in (0.0, 0.3):
        def run():
            return L.loss_and_grads(params, items, targets, STARTS, dropout,
                                    np.random.default_rng(6))
        grade(lambda: run()[0], params, run()[1], 1e-6)                                  # 1e-8


def grade_adamw(L):
    """Twenty steps against a loop over single numbers: decay groups, complex entries and all."""
    rng, lr, decay = np.random.default_rng(0), 0.1, 0.5
    params = {"item_embedding": real(2, 2), "blocks.0.lru.b_C": real(3), "blocks.0.lru.B":
              compl(1, 2), "blocks.0.lru.b_B": compl(2), "output_bias": real(2)}
    decayed = {"item_embedding", "blocks.0.lru.B"}
    expected = {name: p.copy() for name, p in params.items()}
    moments = {name: np.zeros((p.size, 4)) for name, p in params.items()}
    opt = L.adamw_init(params)
    for t in range(1, 21):
        grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
        for name in ("blocks.0.lru.B", "blocks.0.lru.b_B"):
            grads[name] = grads[name] + 1j * rng.normal(size=grads[name].shape)
        given = {name: g.copy() for name, g in grads.items()}
        L.adamw_update(params, grads, opt, lr, decay)
        assert all((grads[name] == given[name]).all() for name in grads), "grads were changed"
        for name, p in expected.items():
            for k, (g, moment) in enumerate(zip(grads[name].flat, moments[name])):
                value, moved = complex(p.flat[k]), []
                if name in decayed:
                    value *= 1 - lr * decay
                for part, (x, d) in enumerate([(value.real, g.real), (value.imag, g.imag)]):
                    moment[part] = 0.9 * moment[part] + 0.1 * d
                    moment[part + 2] = 0.999 * moment[part + 2] + 0.001 * d * d
                    mhat, vhat = moment[part] / (1 - 0.9 ** t), moment[part + 2] / (1 - 0.999 ** t)
                    moved.append(x - lr * mhat / (math.sqrt(vhat) + 1e-9))
                p.flat[k] = complex(*moved) if np.iscomplexobj(p) else moved[0]
        for name in params:
            if relative_error(params[name], expected[name]) > 1e-12:
                raise Wrong(f"\n{name} is wrong after step {t}: {params[name].flat[0]:.6g} where "
                            f"the formula gives {expected[name].flat[0]:.6g}")


def grade_step(L):
    """One event at a time gives what encode gives, row by row and state by state."""
    params, items = tiny_params(), np.random.default_rng(2).integers(0, 8, 11)
    hidden, states = lrurec.encode(params, items, STARTS, return_state=True)
    segment = -1
    for n in range(11):
        if n == 0 or STARTS[n]:
            state, segment = lrurec.init_state(params), segment + 1
        given = state.copy()
        x, after = L.step(params, state, items[n:n + 1]) or (np.zeros((1, 4)), None)
        if (state != given).any():
            raise Wrong("\nstep changed the state that it was given")
        state = after
        if state is None or relative_error(x[0], hidden[n]) > 1e-12:
            raise Wrong(f"\nstep differs from encode at event {n}: {x[0]} and {hidden[n]}")
        if n == 10 or STARTS[n + 1]:
            assert relative_error(state[:, 0], states[:, segment]) < 1e-12, "the state differs"
    assert states.shape == (2, 4, 5)


# name -> the functions shown whole, the functions to write, their graders; easy to hard
EXERCISES = {
    "linear": (["linear_forward"], ["linear_backward"], [grade_linear]),
    "gelu": (["gelu_forward"], ["gelu_backward"], [grade_gelu]),
    "layer_norm": (["layer_norm_forward"], ["layer_norm_backward"], [grade_layer_norm]),
    "dropout": (["dropout_forward"], ["dropout_backward"], [grade_dropout]),
    "cross_entropy": (["cross_entropy_forward"], ["cross_entropy_backward"],
                      [grade_cross_entropy]),
    "complex_linear": (["complex_in_forward", "complex_out_forward"],
                       ["complex_in_backward", "complex_out_backward"],
                       [grade_complex_in, grade_complex_out]),
    "scan": (["scan_loop"], ["scan"], [grade_scan]),
    "scan_backward": (["scan_loop"], ["scan_backward"], [grade_scan_backward]),
    "lam": (["lam_forward"], ["lam_backward"], [grade_lam]),
    "lru": (["lru_forward"], ["lru_backward"], [grade_lru]),
    "block": (["block_forward"], ["block_backward"], [grade_block]),
    "adamw": (["adamw_init"], ["adamw_update"], [grade_adamw]),
    "step": (["block_forward", "init_state"], ["step"], [grade_step]),
    "model": (["forward"], ["backward"], [grade_model]),
}
GRADERS = {grader.__name__: grader for _, _, graders in EXERCISES.values() for grader in graders}
GRADERS.update(grade_embedding=grade_embedding, grade_output_loss=grade_output_loss)


def import_file(name, path):
    """A module of its own: of lrurec a copy, whose functions can be replaced in it alone."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def skeleton(name):
    """The source of a function as an exercise: signature, docstring up to its derivative."""
    source = inspect.getsource(getattr(lrurec, name))
    head, doc, _ = source.split('"""', 2)
    doc = re.split(r"\n *Derivative:", doc)[0].rstrip()
    end = "\n    " if "\n" in doc else ""
    return f'{head}"""{doc}{end}"""\n    # your lines here\n'


def names_used(function):
    """Names of lrurec that a function needs, those inside its inner functions too."""
    codes, used = [function.__code__], set()
    while codes:
        code = codes.pop()
        used |= set(code.co_names)
        codes += [c for c in code.co_consts if inspect.iscode(c)]
    return {name for name in used if hasattr(lrurec, name)}


def write_exercise(name):
    """The text of an exercise file."""
    shown, asked, _ = EXERCISES[name]
    used = set().union(*(names_used(getattr(lrurec, f)) for f in shown + asked))
    modules = {n for n in used if inspect.ismodule(getattr(lrurec, n))} - {"xp"}
    imports = sorted((used - modules - set(shown) - set(asked)) | {"xp"})
    bodies = [inspect.getsource(getattr(lrurec, f)) for f in shown] + [skeleton(f) for f in asked]
    lines = [f'"""Exercise {name}: write {" and ".join(asked)}. The conventions stand in the '
             'header of lrurec.py.\n\nGrade it: python test_lrurec.py THIS_FILE\n"""',
             "import math\n\nimport numpy as np\n",
             textwrap.fill(f"from lrurec import ({', '.join(imports)})", 96,
                           subsequent_indent=" " * 20) + "\n\n"]
    return "\n".join(lines) + "\n\n".join(bodies)


def grade_file(path):
    """Grade every function of lrurec that the file defines -> exit code 0 or 1."""
    try:
        mine = import_file("mine", path)
    except Exception as error:
        print(f"{path} cannot be run: {type(error).__name__}: {error}")
        return 1
    L = import_file("lrurec_copy", lrurec.__file__)
    defined = {name for name, value in vars(mine).items() if inspect.isfunction(value)
               and value.__module__ == "mine" and hasattr(lrurec, name)}
    for name in defined:
        setattr(L, name, getattr(mine, name))
    chosen = {exercise: graders for exercise, (_, asked, graders) in EXERCISES.items()
              if defined & set(asked)}
    if not chosen:
        print(f"{path} defines no function of an exercise; python test_lrurec.py lists them")
        return 1
    failed = False
    for exercise, graders in chosen.items():
        for grader in graders:
            try:
                grader(L)
                found = "right"
            except AssertionError as error:
                failed, found = True, error
            except Exception as error:
                failed, found = True, f"your code raised {type(error).__name__}: {error}"
            print(f"{exercise}: {grader.__name__}: {found}")
    return int(failed)


def exercise_main(arguments):
    if not arguments:
        print("Exercises, easy to hard. python test_lrurec.py NAME > mine.py writes one,\n"
              "python test_lrurec.py mine.py grades it.\n")
        for name, (_, asked, _) in EXERCISES.items():
            print(f"  {name:15} {', '.join(asked)}")
        return 0
    if len(arguments) == 1 and arguments[0] in EXERCISES:
        print(write_exercise(arguments[0]), end="")
        return 0
    if len(arguments) == 1 and os.path.isfile(arguments[0]) and arguments[0].endswith(".py"):
        return grade_file(arguments[0])
    print(f"test_lrurec.py: {' '.join(arguments)!r} is neither an exercise nor a .py file; the "
          f"exercises: {', '.join(EXERCISES)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(exercise_main(sys.argv[1:]))

# Below are the tests proper; the exercises above need neither pytest nor the other files.
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
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error
    return run_refused


def python(*arguments):
    """What subprocess needs to run one of our programs."""
    return {"args": [sys.executable, *map(str, arguments)], "cwd": HERE}


# ---------------------------------------------------------------------------------------------
# Derivatives, and the grader itself

@pytest.mark.parametrize("name", GRADERS)
def test_graded(name):
    GRADERS[name](lrurec)


CONJUGATE, FLIPPED, FACTOR, ANY = "missing conjugate", "sign is flipped", "constant factor", "WRONG"
BROKEN = [  # function, its right code, a plausible wrong version, the hint
    ("linear_backward", "dout @ W.T", "-dout @ W.T", FLIPPED),
    ("linear_backward", "x.T @ dout", "dout.T @ x", "transposed"),
    ("linear_backward", "sum_rows(dout)", "dout.mean(0)", "0.2 times"),
    ("gelu_backward", "6 * GELU_A", "2 * GELU_A", ANY),
    ("gelu_backward", "dx *= dout", "dx *= 2 * dout", "2 times"),
    ("gelu_backward", "1 - s\n", "1 + s\n", ANY),
    ("layer_norm_backward", "dx -= dout @ average", "pass", ANY),
    ("layer_norm_backward", "dx -= xhat * (along @ average)", "pass", ANY),
    ("layer_norm_backward", "dx *= rstd", "pass", ANY),
    ("layer_norm_backward", "sum_rows(along)", "sum_rows(dout)", ANY),
    ("dropout_backward", "else dout * mask", "else dout", ANY),
    ("dropout_backward", "else dout * mask", "else dout * (mask > 0)", FACTOR),
    ("cross_entropy_backward", "-= dloss * weights", "-= weights", ANY),
    ("cross_entropy_backward", "dloss * weights / sums", "weights / sums", ANY),
    ("complex_in_backward", "linear_backward(real_view(dout), cache)",
     "linear_backward(real_view(dout), (cache[0], real_view(cache[1].view(complex).conj())))",
     CONJUGATE),
    ("complex_in_backward", "dB.view(dout.dtype)", "dB.view(dout.dtype).conj()", CONJUGATE),
    ("complex_out_backward", "dh.view(dC.dtype)", "dh.view(dC.dtype).conj()", CONJUGATE),
    ("complex_out_backward", "- 1j * dW[1::2]", "+ 1j * dW[1::2]", CONJUGATE),
    ("scan_backward", "dh if in_place else dh.copy()", "dh", "changed the dh"),
    ("scan_backward", "lam.conj()", "lam", CONJUGATE),
    ("scan_backward", "h[:-1].conj()", "h[:-1].copy()", CONJUGATE),
    ("scan_backward", "xp.roll(starts, -1)[::-1]", "xp.zeros(len(starts), bool)",
     "wall is ignored"),
    ("scan_backward", "products[starts[1:]] = 0", "pass", "wall is ignored"),
    ("scan_backward", "xp.roll(starts, -1)[::-1]", "starts[::-1]", ANY),
    ("lam_backward", "-nu * pull.real", "nu * pull.real", FLIPPED),
    ("lam_backward", "-theta * pull.imag", "-pull.imag", ANY),
    ("lam_backward", "dlam.conj() * lam", "dlam * lam", ANY),
    ("lru_backward", "dB *= gamma", "pass", ANY),
    ("lru_backward", "B.conj() * dB", "B * dB", ANY),
    ("lru_backward", "+ (b_B.conj() * db_B).real", "", ANY),
    ("lru_backward", 'cache["starts"]', 'xp.zeros(len(dout), bool)', "wall is ignored"),
    ("block_backward", "dx += dy                                       # residual: skip branch + "
     "feed", "pass  #", ANY),
    ("block_backward", "dx += dy                                       # residual: skip branch + "
     "LRU", "pass  #", ANY),
    ("block_backward", 'dy = dropout_backward(dy, cache["mask2"])', "pass", ANY),
    ("embedding_backward", "xp.add.at(dE, entries.ravel(), dout.ravel())",
     "dE[entries.ravel()] = dout.ravel()", ANY),
    ("backward", "dx = dropout_backward(dx, mask)", "pass", ANY),
    ("loss_and_grads", 'grads["item_embedding"] += dE', "pass", ANY),
    ("output_loss", "dW += dlogits.T", "dW = dlogits.T", "chunks change"),
    ("adamw_update", "if name.endswith(DECAYED):", "if True:", "is wrong after step 1"),
    ("adamw_update", "(xp.sqrt(v / correction2) + eps)", "xp.sqrt(v / correction2 + eps)",
     "is wrong"),
    ("adamw_update", "v / correction2", "v", "is wrong"),
    ("scan", "u if in_place else u.copy()", "u", "changed the u"),
    ("step", "lam * state[k] +", "state[k] +", "differs from encode"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_wrong_versions_are_refused_with_the_right_hint(case):
    name, right, wrong, message = BROKEN[case]
    L = import_file("lrurec_copy", lrurec.__file__)
    source = inspect.getsource(getattr(lrurec, name))
    assert source.count(right) == 1, f"{name} no longer has {right!r}"
    exec(source.replace(right, wrong), vars(L))
    with pytest.raises(AssertionError) as error:
        for grader in GRADERS.values():
            grader(L)
    assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_from_end_to_end(name, tmp_path, capsys):
    assert exercise_main([name]) == 0
    text, mine = capsys.readouterr().out, str(tmp_path / "mine.py")
    asked = EXERCISES[name][1]
    assert "Derivative:" not in text.split(f"def {asked[0]}(")[1]

    own = {function: inspect.getsource(getattr(lrurec, function)) for function in asked}

    def grade_with(changed):
        filled = text
        for function, body in {**own, **changed}.items():
            filled = filled.replace(skeleton(function), body)
        write(tmp_path / "mine.py", filled)
        return exercise_main([mine])

    assert grade_with({}) == 0, capsys.readouterr().out
    before = {function: getattr(lrurec, function) for function in asked}
    for function, body in own.items():             # one by one empty, then broken
        assert grade_with({function: skeleton(function)}) == 1
        right, wrong = next((r, w) for f, r, w, _ in BROKEN if f == function)
        assert grade_with({function: body.replace(right, wrong)}) == 1
    assert all(getattr(lrurec, function) is before[function] for function in asked)


def test_the_list_of_exercises_and_a_wrong_name():
    for arguments, code in (([], 0), (["no_such"], 2)):
        done = subprocess.run(**python("test_lrurec.py", *arguments), text=True,
                              capture_output=True)
        assert done.returncode == code and "layer_norm" in done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------
# The recurrence

def test_nothing_passes_a_wall_and_the_future_never_reaches_the_past():
    params, items = tiny_params(), np.array([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4])
    hidden = lrurec.encode(params, items, STARTS)
    for n in range(11):
        changed = items.copy()
        changed[n] = items[n] % 7 + 1
        moved = (lrurec.encode(params, changed, STARTS) != hidden).any(1)
        end = next((m for m in range(n + 1, 11) if STARTS[m]), 11)
        assert moved[n:end].all() and not moved[:n].any() and not moved[end:].any(), n


# ---------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("max_phase", [1, 0.2])
def test_initial_values(max_phase):
    params = lrurec.init_params(50, 32, 2000, n_blocks=2, rng=np.random.default_rng(0),
                                max_phase=max_phase)
    for p in lrurec.blocks(params):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        for part, low, high in ((abs(lam) ** 2, 0.8 ** 2, 0.99 ** 2),      # uniform in area
                                (np.angle(lam) % (2 * math.pi), 0, 2 * math.pi * max_phase)):
            quantiles = np.quantile(part, [0, 0.25, 0.5, 0.75, 1])
            np.testing.assert_allclose(quantiles, np.linspace(low, high, 5),
                                       atol=0.05 * (high - low))
            edge = 0.01 * (high - low)
            assert low - 1e-6 <= quantiles[0] < low + edge
            assert high - edge < quantiles[-1] <= high + 1e-6
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


def test_the_shapes_and_types_that_the_contract_names():
    params = lrurec.init_params(7, 4, rng=np.random.default_rng(0))
    D, H, F = 4, 8, 16
    block = {"lru.nu_log": (H,), "lru.theta_log": (H,), "lru.gamma_log": (H,), "lru.B": (D, H),
             "lru.b_B": (H,), "lru.C": (H, D), "lru.b_C": (D,), "lru_norm.scale": (D,),
             "lru_norm.shift": (D,), "ffn.W1": (D, F), "ffn.b1": (F,), "ffn.W2": (F, D),
             "ffn.b2": (D,), "ffn_norm.scale": (D,), "ffn_norm.shift": (D,)}
    shapes = {"item_embedding": (8, D), "embedding_norm.scale": (D,), "embedding_norm.shift": (D,),
              "output_bias": (8,)}
    shapes.update({f"blocks.{k}.{name}": shape for k in (0, 1) for name, shape in block.items()})
    assert {name: p.shape for name, p in params.items()} == shapes
    for name, p in params.items():
        is_complex = name.endswith((".B", ".b_B", ".C"))
        assert p.dtype == (np.complex64 if is_complex else np.float32), name
    assert lrurec.init_params(7, 4, 3, 5)["blocks.1.ffn.W1"].shape == (4, 5)
    assert lrurec.init_params(7)["item_embedding"].shape == (8, 64)


def test_gelu_is_the_one_of_the_normal_distribution():
    x = np.linspace(-6, 6, 241)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert abs(lrurec.gelu_forward(x)[0] - exact).max() < 5e-4    # the tanh form's own error


def test_layer_norm_against_its_definition():
    x, scale, shift = 0.01 * real(5, 6), real(6), real(6, seed=2)
    expected = scale * (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert relative_error(lrurec.layer_norm_forward(x, scale, shift)[0], expected + shift) < 1e-12


def test_rows_without_a_target_carry_no_loss():
    params, items, starts = tiny_params(), np.array([1, 2, 3, 4]), np.zeros(4, bool)
    logits = lrurec.encode(params, items, starts) @ params["item_embedding"].T
    logits += params["output_bias"]
    for targets in np.array([[2, 0, 4, 0], [2, 0, 0, 0], [0, 0, 4, 0]]):
        by_hand = [np.log(np.exp(logits[n]).sum()) - logits[n, targets[n]]
                   for n in np.flatnonzero(targets)]
        loss, _ = lrurec.loss_and_grads(params, items, targets, starts)
        assert loss == pytest.approx(np.mean(by_hand), rel=1e-12)
    loss, grads = lrurec.loss_and_grads(params, items, 0 * items, starts)
    assert loss == 0 and not any(g.any() for g in grads.values())


def test_score_is_the_training_logits_but_never_recommends_nothing():
    params, hidden = tiny_params(), real(2, 3, 4)
    scores = lrurec.score(params, hidden)
    assert (scores[..., 0] == -np.inf).all() and scores.shape == (2, 3, 8)
    by_hand = np.einsum("ijd,vd->ijv", hidden, params["item_embedding"]) + params["output_bias"]
    assert relative_error(scores[..., 1:], by_hand[..., 1:]) < 1e-12


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e4, 0), (1e4, -1e6)])
def test_the_loss_against_its_definition_whatever_the_size_of_the_logits(scale, shift):
    hidden, E, bias = scale * real(9, 4), real(8, 4, seed=2), scale * real(8, seed=3) + shift
    targets = np.array([1, 0, 7, 3, 3, 0, 2, 5, 6])
    n = np.flatnonzero(targets)
    logits = hidden[n] @ E.T + bias
    by_hand = (np.logaddexp.reduce(logits, 1) - logits[np.arange(7), targets[n]]).mean()
    loss, *grads = lrurec.output_loss(hidden, E, bias, targets)
    assert loss == pytest.approx(by_hand, rel=1e-12)
    assert all(np.isfinite(g).all() for g in grads)


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


def test_a_long_history_with_eigenvalues_near_one():
    lam, u = lam_of(3, 0.99999), compl(5000, 3)
    h = lrurec.scan_loop(lam, u, np.zeros(5000, bool))
    for scan in (lrurec.scan, lrurec.scan_recursive):
        assert relative_error(scan(lam, u, np.zeros(5000, bool)), h) < 1e-10


def test_what_a_function_returned_is_not_changed_by_a_later_call():
    params = tiny_params(n_items=40)
    results = everything(params, *batch_of(20), dropout=0.2)
    copies = [r.copy() for r in results]
    everything(params, *batch_of(20, seed=1), dropout=0.2)
    assert all((r == c).all() for r, c in zip(results, copies))


def learn(items, targets, starts, steps, d_model=16):
    """Parameters after full-batch training on items 1..5, and the last loss."""
    params = lrurec.init_params(5, d_model, n_blocks=1, rng=np.random.default_rng(0))
    opt = lrurec.adamw_init(params)
    for _ in range(steps):
        loss, grads = lrurec.loss_and_grads(params, items, targets, starts)
        lrurec.clip_gradients(grads, 5)
        lrurec.adamw_update(params, grads, opt, 0.02, 0)
    return params, loss


def test_the_loss_falls_to_a_markov_chains_entropy_rate_and_not_below():
    rng, V = np.random.default_rng(0), 5
    transition = rng.dirichlet(np.full(V, 0.6), V)

    def sample(users, length):
        state, columns = rng.integers(0, V, users), []
        for _ in range(length):
            columns.append(state)
            state = (rng.random((users, 1)) > transition[state].cumsum(1)).sum(1).clip(0, V - 1)
        rows = 1 + np.stack(columns, 1)
        starts = np.arange(users * (length - 1)) % (length - 1) == 0
        return rows[:, :-1].ravel(), rows[:, 1:].ravel(), starts

    params, _ = learn(*sample(800, 21), steps=80, d_model=8)
    items, targets, starts = sample(1000, 21)
    loss, _ = lrurec.loss_and_grads(params, items, targets, starts)
    cost = -np.log(transition[items - 1, targets - 1])            # of knowing the chain itself
    assert -0.002 < loss - cost.mean() < 0.04, (loss, cost.mean())


def test_the_recurrence_learns_what_no_memoryless_model_can():
    items, place = np.random.default_rng(0).integers(1, 6, 1600), np.arange(1600) % 16
    targets = np.where(place < 3, 0, np.roll(items, 3))           # the item 3 steps ago
    _, loss = learn(items, targets, place == 0, steps=150)
    _, memoryless = learn(items, targets, np.ones(1600, bool), steps=50)
    assert loss < 0.2 and memoryless > math.log(5) - 0.1, (loss, memoryless)


# ---------------------------------------------------------------------------------------------
# The optimizer

def test_decay_groups():
    params = tiny_params()
    before, opt = {name: p.copy() for name, p in params.items()}, lrurec.adamw_init(params)
    lrurec.adamw_update(params, {n: np.zeros_like(p) for n, p in params.items()}, opt, 0.1, 0.5)
    shrunk = {name.split(".", 2)[-1] for name in params if (params[name] != before[name]).any()}
    assert shrunk == {"item_embedding", "lru.nu_log", "lru.theta_log", "lru.gamma_log", "lru.B",
                      "lru.C", "ffn.W1", "ffn.W2"}


def test_clipping():
    grads = {"a": np.array([3.0, 0]), "b": np.array([4j])}
    assert lrurec.clip_gradients(grads, 10) == pytest.approx(5)
    assert grads["a"][0] == 3 and grads["b"][0] == 4j
    assert lrurec.clip_gradients(grads, 1) == pytest.approx(5)
    assert grads["a"][0] == pytest.approx(3 / (5 + 1e-6)) and grads["b"][0].imag < 0.8


# ---------------------------------------------------------------------------------------------
# Files

def test_save_and_load(tmp_path):
    params = tiny_params()
    lrurec.save(tmp_path / "m.npz", params, note={"a": [1, 2.5, "ü"]}, table=np.arange(3))
    again, extra = lrurec.load(tmp_path / "m.npz")
    assert all((again[name] == params[name]).all() for name in params)
    assert extra["note"] == {"a": [1, 2.5, "ü"]} and (extra["table"] == np.arange(3)).all()
    assert os.listdir(tmp_path) == ["m.npz"]


# ---------------------------------------------------------------------------------------------
# Data

def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


GOOD = {  # what the file holds -> columns; each says: user 1 saw 10 at 100, 11 at 200; user 2: 10
    "u.data, tabs": ("1\t10\t5\t100\n1\t11\t3\t200\n2\t10\t1\t50\n", None),
    "ratings.dat, ::": ("1::10::5::100\n1::11::3::200\n2::10::1::50\n", None),
    "RecBole's .inter": ("user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                         "1\t10\t5\t100\n1\t11\t3\t200\n2\t10\t1\t50\n", None),
    "byte-order mark, CRLF, blank lines, spaces, quotes, other column order":
        ("\ufeffts,movieId,userId\r\n100,10,1\r\n\r\n200, 11 , 1\r\n50, \"10\",2", None),
    "Amazon, no header": ("1,10,5.0,100\n1,11,3.0,200\n2,10,1.0,50", None),
    "floating times": ("uid,sid,time\n1,10,100.0\n1,11,2e2\n2,10,50.0", None),
    "extra columns": ("user,x,item,y,time\n1,,10,,100\n1,,11,,200\n2,a,10,\"b,c\",50", None),
    "KuaiRand, by name": ("user_id,video_id,date,time_ms\n1,10,d,100\n1,11,d,200\n2,10,d,50",
                          ["user_id", "video_id", "time_ms"]),
    "by number": ("100;10;1\n200;11;1\n50;10;2", ["3", "2", "1"]),
    "semicolons, decimal commas": ("1;10;3,5;100\n1;11;4,0;200\n2;10;1,5;50", None),
    "gzip, three columns, no header": (gzip.compress(b"1,10,100\n1,11,200\n2,10,50\n"), None),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_same_events_from_every_format(name, tmp_path):
    text, columns = GOOD[name]
    events = reader.read_file(write(tmp_path / "f", text), columns)
    assert [events.user_ids[u] for u in events.users] == ["1", "1", "2"]
    assert [events.item_ids[i] for i in events.items] == ["10", "11", "10"]
    assert events.times.tolist() == [100, 200, 50]


def test_ids_that_are_numbers_are_ordered_as_numbers():
    for raw, expected in ((["10", "9", "1"], ["1", "9", "10"]),
                          (["b", "10", "9"], ["10", "9", "b"]),
                          (["10.0", "9.5", "1"], ["1", "9.5", "10.0"])):
        events = reader.Events(np.zeros(3, int), np.arange(3), np.arange(3), ["u"], raw)
        assert reader.prepare(events, "toy", min_count=0).item_ids[1:] == expected


def test_ids_are_any_text_and_times_are_exact(tmp_path):
    text = 'user,item,time\nJosé,"a, b",1700000000000000001\n用户,c::d,1700000000000000002\n'
    events = reader.read_file(write(tmp_path / "f.csv", text))
    assert events.user_ids == ["José", "用户"] and events.item_ids == ["a, b", "c::d"]
    assert events.times.tolist() == [1700000000000000001, 1700000000000000002]
    no_time = reader.read_file(write(tmp_path / "g.csv", "b,x\na,y\n"))
    assert no_time.times.tolist() == [0, 1], "without times the file's order is time order"


BAD = [  # file name, content, what the line says
    ("f", "", "is empty"), ("f", " \n\n", "is empty"), ("f", "user,item\n", "no events"),
    ("f", "1,2,3\n1\n", "line 2: 1 columns"), ("f", "1,2,x\n", "line 1: time 'x'"),
    ("f", "1,2,nan\n", "line 1: time"), ("f", "1,2,3\n1,2,inf\n", "line 2: time"),
    ("f", "1,,3\n", "empty item id"), ("f", "1,2,3\n , 2,3\n", "line 2: an empty user id"),
    ("f", b"1,2,3\n1,\x002,3\n", "line 2: a NUL byte"), ("f", b"\xff\xfe1\x00", "UTF-16"),
    ("f", b"1,2,3\n\x80\n", "line 2: byte 0x80"), ("f", b"\x89PNG\r\n\x1a\n", "line 1: byte"),
    ("f", "alone\n", "no delimiter"), ("f", '1,2,3\n1,"2"x,3\n', "line 2"),
    ("f.gz", "1,2,3\n", "not gzip"), ("f.gz", b"\x1f\x8b junk", "damaged gzip"),
    ("f.gz", gzip.compress(b"1,2,3\n" * 99)[:-9], "damaged gzip"),
    ("f", "1,2,3\n1,4,5\n", "nobody is left"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_ends_with_2_and_one_line_and_writes_nothing(case, tmp_path, refused):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    error = refused("--data", path, "--out", tmp_path / "run")
    assert path in error and message in error and os.listdir(tmp_path) == [name]


def test_the_reader_and_the_model_loader_survive_random_edits(model, tmp_path):
    rng = np.random.default_rng(0)
    text = b'user,item,time\n' + b'u1,"i,1",100\nu2,i2,3.5\nu1;i3\t::,7\n' * 3
    whole = model.read_bytes()
    for n in range(600):
        source = [text, whole][n % 2]
        content = bytearray(source if n % 5 else rng.bytes(80))
        for _ in range(rng.integers(1, 6)):
            k = rng.integers(len(content))
            content[k:k + rng.integers(0, 3)] = rng.bytes(int(rng.integers(0, 4)))
        path = write(tmp_path / "f", bytes(content[:rng.integers(len(content)) if n % 3 == 0
                                                   else None]))
        try:
            if n % 2:
                train.load_model(path)
            else:
                reader.prepare(reader.read_file(path), path, 0)
        except reader.DataError as error:
            assert path in str(error) and "\n" not in str(error)


def test_no_code_runs_from_a_model_file(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))
    np.savez(tmp_path / "m.npz", format=np.array([Bomb()], object))
    with pytest.raises(reader.DataError, match="not a model file"):
        train.load_model(str(tmp_path / "m.npz"))
    assert not (tmp_path / "exploded").exists()


def test_filtering_and_order():
    # item 3 has one event; then user 2 has one; the repeat of (0, 1) is dropped first
    users, items, times = np.array([(0, 1, 5), (0, 1, 5), (0, 2, 4), (1, 2, 1), (1, 1, 1),
                                    (2, 3, 1), (2, 1, 9)]).T
    events = reader.Events(users, items, times, list("012"), list("0123"))
    data = reader.prepare(events, "toy", min_count=2)
    assert data.item_ids == ["", "1", "2"]
    assert data.items.tolist() == [2, 1, 1, 2] and data.offsets.tolist() == [0, 2, 4]
    by_file = reader.prepare(events, "toy", min_count=2, ties="file")
    assert by_file.items.tolist() == [2, 1, 2, 1]
    drawn = {tuple(reader.prepare(events, "toy", 2, "random", seed).items) for seed in range(9)}
    assert drawn == {(2, 1, 1, 2), (2, 1, 2, 1)}


def test_windows_and_histories_by_hand():
    data = reader.Dataset("toy", np.arange(1, 10), np.array([0, 7, 9]),
                          [str(i) for i in range(10)], [], "")
    rows = reader.training_rows(data, max_len=2)
    assert rows.targets.tolist() == [1, 2, 3, 4, 5, 8, 9]
    assert rows.items.tolist() == [0, 1, 2, 3, 4, 0, 8]
    assert rows.starts.tolist() == [1, 1, 0, 1, 0, 1, 1]
    assert rows.windows.tolist() == [0, 1, 3, 5, 7]
    seen, truth = reader.histories(data, "test", max_len=3)
    assert [s.tolist() for s in seen] == [[4, 5, 6]] and truth.tolist() == [7]
    seen, truth = reader.histories(data, "validation")
    assert [s.tolist() for s in seen] == [[1, 2, 3, 4, 5]] and truth.tolist() == [6]
    batch = [np.concatenate(b) for b in zip(*reader.batches(rows, 2, np.random.default_rng(0)))]
    assert sorted(batch[1].tolist()) == sorted(rows.targets.tolist())
    assert batch[1].tolist() != rows.targets.tolist(), "windows come in random order"


def zip_of(files):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive


def test_ml_100k_sources(tmp_path, monkeypatch):
    """GroupLens is asked twice, then the wheel; a wrong archive is refused and not kept."""
    monkeypatch.setenv("LRUREC_CACHE", str(tmp_path))
    asked = []

    def failing(url="the wheel", timeout=0):
        asked.append((url, timeout))
        raise OSError("no route")

    monkeypatch.setattr(reader, "recbole_wheel", failing)
    monkeypatch.setattr(reader.time, "sleep", lambda seconds: None)
    with pytest.raises(reader.DataError, match="by hand and put it at .*ml-100k.zip"):
        reader.fetch_movielens("ml-100k", opener=failing)
    url, timeout = asked[0]
    assert asked == [(url, timeout), (url, timeout), ("the wheel", 0)]
    assert url.endswith("/ml-100k.zip") and timeout > 0

    archive = zip_of({"ml-100k/u.data": "1\t2\t3\t4\n", "ml-100k/u.item": "2|Fargo|"})
    serve = lambda url, timeout: io.BytesIO(archive.getvalue())   # noqa: E731
    with pytest.raises(reader.DataError, match="100,000 events"):
        reader.fetch_movielens("ml-100k", opener=serve)
    assert os.listdir(tmp_path) == []
    digest = reader.hashlib.sha256(np.array([1, 2, 4], "<i8").tobytes()).hexdigest()
    monkeypatch.setattr(reader, "ML_100K_EVENTS", digest)
    path = reader.fetch_movielens("ml-100k", opener=serve)
    assert reader.parse_archive("ml-100k", path, path).titles == {"2": "Fargo"}
    assert reader.fetch_movielens("ml-100k", opener=failing) == path, "the cache serves"


@pytest.mark.parametrize("name, ratings, titles", [
    ("ml-100k", ("ml-100k/u.data", "1\t2\t3\t4\n"),
     ("ml-100k/u.item", b"1|unknown||\n2|Caf\xe9 (1990)|1-Jan-1990|\n")),
    ("ml-100k", (reader.RECBOLE_FOLDER + ".inter", "user_id:token\titem_id:token\t"
                 "rating:float\ttimestamp:float\n1\t2\t3\t4\n"),
     (reader.RECBOLE_FOLDER + ".item", "item_id:token\tmovie_title\trelease_year\tclass\n"
                                       "1\tunkonwn\t\t\n2\tCaf\u00e9\t1990\t\n")),
    ("ml-1m", ("ml-1m/ratings.dat", "1::2::3::4\n"),
     ("ml-1m/movies.dat", b"1::unknown::\n2::Caf\xe9 (1990)::\n"))])
def test_archives_give_events_and_titles_or_one_clear_line(name, ratings, titles, monkeypatch):
    digest = reader.hashlib.sha256(np.array([1, 2, 4], "<i8").tobytes()).hexdigest()
    monkeypatch.setattr(reader, "ML_100K_EVENTS", digest)
    events = reader.parse_archive(name, zip_of(dict([ratings, titles])), "a.zip")
    assert (events.user_ids, events.item_ids, events.times.tolist()) == (["1"], ["2"], [4])
    assert events.titles == {"1": "unknown", "2": "Caf\u00e9 (1990)"}
    for damaged in ({}, {ratings[0]: "a\tb\tc\td\n"}, {titles[0]: "x\n1"}):
        archive = zip_of({**dict([ratings, titles]), **damaged} if damaged else {})
        with pytest.raises(reader.DataError, match="a.zip is not an archive of " + name):
            reader.parse_archive(name, archive, "a.zip")


# ---------------------------------------------------------------------------------------------
# The program

def test_metrics_against_a_brute_force_ranking():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (40, 9)).astype(float)            # many ties
    seen = [rng.integers(1, 9, 3) for _ in range(40)]
    truth = rng.integers(1, 9, 40)
    expected = []
    for s, history, true in zip(scores, seen, truth):
        candidates = [v for v in range(1, 9) if v not in history]
        better = [v for v in candidates if v != true and s[v] >= s[true]]
        expected.append(len(better) if true in candidates else math.inf)
    rank = train.ranks(scores.copy(), seen, truth)
    assert rank.tolist() == expected
    table = train.metrics(rank)
    assert table["Recall@5"] == np.mean([r < 5 for r in expected])
    assert table["NDCG@5"] == pytest.approx(
        np.mean([1 / math.log2(r + 2) if r < 5 else 0 for r in expected]))
    assert table["MRR"] == pytest.approx(np.mean([1 / (r + 1) for r in expected]))


def test_evaluation_in_groups_is_the_evaluation_of_each_user_alone(monkeypatch):
    params, rng = tiny_params(n_items=20), np.random.default_rng(0)
    data = reader.Dataset("toy", rng.integers(1, 21, 60), np.arange(0, 61, 6),
                          [str(i) for i in range(21)], [], "")
    monkeypatch.setattr(train, "GROUP_ROWS", 10)
    table = train.evaluate(train.model_scorer(params), data, "test", 4)
    rank = []
    for u in range(10):
        *before, true = data.items[6 * u:6 * u + 6]
        state = lrurec.init_state(params)
        for item in before[-4:]:
            x, state = lrurec.step(params, state, np.array([item]))
        rank.append(train.ranks(lrurec.score(params, x), [before[-4:]], np.array([true]))[0])
    assert table == pytest.approx(train.metrics(np.array(rank)))


def test_markov_and_popularity_by_hand():
    data = reader.Dataset("toy", np.array([1, 2, 3, 1, 1] + [2, 3, 2, 1, 1]), np.array([0, 5, 10]),
                          ["", "1", "2", "3"], [], "")
    scorers = train.baseline_scorers(data)
    assert scorers["popularity"]([[2]])[0].tolist() == [0, 1, 3, 2]
    markov = scorers["markov"]([[2], [3], [1]])
    assert markov[0] == pytest.approx([0, 1 / 7, 3 / 7, 2 + 2 / 7])
    assert markov[1].argmax() == 2 and markov[2].argmax() == 2


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


def test_a_whole_tiny_run(tiny, tmp_path, refused, capsys):
    out = tmp_path / "run"
    assert run(*tiny, "--out", out, "--epochs", 12) == 0
    printed, report = capsys.readouterr(), report_in(out)
    assert "Markov chain" in printed.out and printed.err == "", "progress stays out of a pipe"
    assert report["history"][-1]["loss"] < report["history"][0]["loss"] - 0.5
    assert report["validation"]["Recall@10"] == max(h["Recall@10"] for h in report["history"])
    assert set(report) == {"data", "config", "epoch", "seconds", "history", "validation", "test",
                           "baselines"}
    assert sorted(os.listdir(out)) == ["last.npz", "metrics.json", "model.npz"]
    assert run("evaluate", out / "model.npz") == 0
    validation, test = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    row = next(line for line in printed.out.splitlines() if line.startswith("LRURec")).split()
    assert row[1:] == test[1:] and f"{report['validation']['MRR']:.4f}" == validation[-1]
    assert "holds a run" in refused(*tiny, "--out", out)


@pytest.mark.parametrize("n_rows, n_parts", [(1500, 2), (2900, 2), (7500, 8), (11500, 12)])
def test_shards_are_cut_at_the_walls_nearest_to_equal_parts(n_rows, n_parts):
    rng = np.random.default_rng(n_rows)
    items, targets, starts = np.arange(n_rows), rng.integers(9, size=n_rows), np.zeros(n_rows, bool)
    starts[np.append(0, rng.choice(n_rows, n_rows // 50))] = True
    parts = train.shards(items, targets, starts)
    for whole, *cut in zip((items, targets, starts), *parts):
        assert (np.concatenate(cut) == whole).all()
    assert all(part[2][0] for part in parts) and len(parts) == n_parts
    ends = np.cumsum([len(part[0]) for part in parts])[:-1]
    wanted = n_rows / n_parts * np.arange(1, n_parts)
    walls = np.flatnonzero(starts)
    assert all(abs(end - w) == abs(walls - w).min() for end, w in zip(ends, wanted))
    one_user = np.arange(n_rows) == 0
    assert len(train.shards(items, targets, one_user)) == 1


def test_the_gradients_of_the_shards_add_up_to_those_of_the_batch(monkeypatch):
    monkeypatch.setattr(train, "SHARD_ROWS", 9)
    params, batch = tiny_params(n_items=40), batch_of(60)
    batch[1][:20] = 0                              # a shard counts by its targets
    config = {**train.DEFAULTS, "dropout": 0.0, "threads": 1}
    with train.gradient_workers(params, config, 60) as (_, gradients):
        loss, grads = gradients(batch, 0)
    expected, whole = lrurec.loss_and_grads(params, *batch)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert all(relative_error(grads[name], whole[name]) < 1e-10 for name in params)


def test_every_shard_of_every_step_draws_a_dropout_of_its_own(monkeypatch):
    drawn = []

    def loss_and_grads(params, items, targets, starts, dropout, rng):
        drawn.append((dropout, rng.random()))
        return 0.0, {}

    monkeypatch.setattr(train, "SHARD_ROWS", 9)
    monkeypatch.setattr(lrurec, "loss_and_grads", loss_and_grads)
    for seed, step in ((1, 0), (1, 1), (2, 0)):
        config = {**train.DEFAULTS, "dropout": 0.3, "seed": seed, "threads": 1}
        with train.gradient_workers(tiny_params(), config, 60) as (_, gradients):
            gradients(batch_of(60), step)
    assert {dropout for dropout, _ in drawn} == {0.3} and len(set(drawn)) == len(drawn) > 6


@pytest.mark.parametrize("n, can_fork", [(1, True), (2, True), (3, True), (2, False)])
def test_workers_answer_in_order_and_see_shared_arrays_change(monkeypatch, n, can_fork):
    monkeypatch.setattr(train, "CAN_FORK", can_fork and train.CAN_FORK)
    common = train.shared({"x": np.ones((2, 3)), "z": np.ones(9, np.complex64)})
    assert common["x"].shape == (2, 3) and common["z"].dtype == np.complex64

    def work(task):
        if task == 9:
            raise ValueError("nine")
        common["z"][task] = task + common["x"][0, 0]
        return task + common["x"][0, 0]

    with train.workers(work, n) as call:
        for offset in (0, 100):
            common["x"][...] = offset
            assert list(call(range(9))) == [k + offset for k in range(9)]
            assert (common["z"] == np.arange(9) + offset).all()
        with pytest.raises(ValueError, match="nine"):
            list(call(range(7, 10)))


def too_large(*arguments, **options):
    raise MemoryError


def killed_worker(*arguments):
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)


def no_second_fork(fork=getattr(os, "fork", None)):               # os.fork as it is now
    if multiprocessing.active_children():
        raise BlockingIOError(errno.EAGAIN, "no more processes")
    return fork()


needs_fork = pytest.mark.skipif(not train.CAN_FORK, reason="no processes here")


@pytest.mark.parametrize("module, name, fails", [
    (lrurec, "init_params", too_large),
    pytest.param(lrurec, "loss_and_grads", killed_worker, marks=needs_fork),
    pytest.param(os, "fork", no_second_fork, marks=needs_fork)])
def test_out_of_memory_is_one_line_and_leaves_nothing(module, name, fails, tiny, tmp_path, refused,
                                                      monkeypatch):
    monkeypatch.setattr(module, name, fails)
    assert "out of memory" in refused(*tiny, "--out", tmp_path / "r", "--threads", 2)
    for child in multiprocessing.active_children():
        child.join(5)
    assert not multiprocessing.active_children() and not (tmp_path / "r").exists()


@needs_fork
@pytest.mark.parametrize("name, code, n_lines", [("SIGINT", 130, 2), ("SIGKILL", -9, 0)])
def test_no_worker_outlives_the_program(tmp_path, name, code, n_lines):
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job ignores it
    program = python("train.py", *tiny_run(tmp_path, users=400), "--epochs", 1000, "--patience",
                     1000, "--threads", 2, "--out", tmp_path / "r")
    with subprocess.Popen(**program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        while not process.stdout.readline().startswith("epoch"):
            pass
        time.sleep(0.2)                            # amid the second epoch
        if name == "SIGINT":                       # Ctrl-C reaches the workers too
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, error = process.communicate(timeout=10)
    assert (process.returncode, error.count("\n")) == (code, n_lines), error
    # and no worker is left: communicate returned, and they had standard error open


def test_threads_and_resume_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD_ROWS", 5)    # more shards than slots for their gradients
    monkeypatch.setattr(train, "GROUP_ROWS", 40)
    start = tiny_run(tmp_path, items=60)

    def end_of(name):
        """All that came out, but the seconds it took: arrays, numbers."""
        params, extra = lrurec.load(tmp_path / name / "last.npz")
        moments = [value for value in extra.values() if isinstance(value, np.ndarray)]
        report = report_in(tmp_path / name)
        numbers = [report["epoch"], report["validation"], report["test"]]
        return [*params.values(), *moments], numbers + [h["loss"] for h in report["history"]]

    for name, threads, can_fork in (("a", 1, True), ("b", 3, True), ("c", 2, False)):
        monkeypatch.setattr(train, "CAN_FORK", can_fork and train.CAN_FORK)
        assert run(*start, "--out", tmp_path / name, "--epochs", 4, "--threads", threads) == 0
    assert run(*start, "--out", tmp_path / "d", "--epochs", 2) == 0
    assert run("--resume", "--out", tmp_path / "d", "--epochs", 4) == 0
    arrays, numbers = end_of("a")
    assert 0 < numbers[2]["MRR"] < 1
    for name in "bcd":
        others, other_numbers = end_of(name)
        assert other_numbers == numbers and len(others) == len(arrays)
        assert all((a == b).all() for a, b in zip(arrays, others))


def test_a_run_begins_with_its_own_values_and_each_epoch_with_its_own_order(tiny, tmp_path,
                                                                            monkeypatch):
    orders, real_batches = [], reader.batches

    def batches(rows, batch_size, rng):
        orders.append(rng.random())
        return real_batches(rows, batch_size, rng)

    monkeypatch.setattr(reader, "batches", batches)
    for seed in (5, 6):
        assert run(*tiny, "--out", tmp_path / str(seed), "--epochs", 2, "--lr", 0, "--seed", seed,
                   "--n-blocks", 3, "--max-phase", 0.5) == 0
        params, _ = lrurec.load(tmp_path / str(seed) / "last.npz")
        expected = lrurec.init_params(14, 8, n_blocks=3, rng=np.random.default_rng(seed),
                                      max_phase=0.5)
        assert params.keys() == expected.keys()
        assert all((params[name] == expected[name]).all() for name in expected)
    assert len(set(orders)) == 4


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [0.02] * 8), ("cosine", 0.01 + 0.01 * np.cos(np.pi * np.arange(8) / 8))])
def test_step_size_decay_and_clipping_at_every_step(schedule, expected, tiny, tmp_path,
                                                    monkeypatch):
    used, real_update = [], lrurec.adamw_update

    def update(params, grads, opt, lr, weight_decay):
        assert weight_decay == 0.01
        assert lrurec.clip_gradients(grads, np.inf) == pytest.approx(0.1, rel=1e-3)
        used.append(lr)
        real_update(params, grads, opt, lr, weight_decay)

    monkeypatch.setattr(train, "MAX_NORM", 0.1)
    monkeypatch.setattr(lrurec, "adamw_update", update)
    assert run(*tiny, "--out", tmp_path / "r", "--epochs", 2, "--schedule", schedule) == 0
    assert used == pytest.approx(expected)


def ctrl_c(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("happens, code, message", [
    (ctrl_c, 130, "--resume"), (lambda: np.float32(np.nan), 2, "not finite in epoch 2, batch 3")])
def test_a_run_that_ends_amid_an_epoch_keeps_those_before(happens, code, message, tiny, tmp_path,
                                                          capsys, monkeypatch):
    steps, real_step = [], train.train_step

    def step(*arguments):                          # four an epoch
        steps.append(1)
        return happens() if len(steps) == 7 else real_step(*arguments)

    monkeypatch.setattr(train, "train_step", step)
    assert run(*tiny, "--out", tmp_path / "r", "--epochs", 3) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert lrurec.load(tmp_path / "r" / "last.npz")[1]["epoch"] == 1
    assert run("--resume", "--out", tmp_path / "r", "--epochs", 3) == 0


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "0"], "whole number from 1"), (["--dropout", "1"], "below 1"),
    (["--max-phase", "0"], "above 0"), (["--max-phase", "1.5"], "at most 1"),
    (["--ties", "x"], "item"), (["--max-len", "x"], "from 1"), (["--lr", "nan"], "number"),
    (["--data", "/nowhere.csv"], "/nowhere.csv"), (["evaluate", "/nowhere.npz"], "/nowhere.npz"),
    (["--columns", "user"], "USER,ITEM"), (["--threads", "1.5"], "whole number"),
    (["--columns", "00,1"], "USER,ITEM"), (["--columns", "01,1"], "USER,ITEM"),
    (["--columns", "1,2"], "no file of yours"), (["--data", ""], "ml-100k"),
    (["--out", ""], "path"), (["--out", os.path.join(__file__, "run")], "test_lrurec.py"),
    (["evalute", "m.npz"], "evaluate"), (["train", "extra"], "extra"), (["--no-such"], "--no-such"),
    (["recommend", "/nowhere.npz", "1", "--new-users"], "--new-users"),
])
def test_a_mistake_ends_with_2_and_one_line(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_patience_ends_a_run_and_resume_keeps_it(tiny, tmp_path, refused):
    out = tmp_path / "r"
    assert run(*tiny, "--out", out, "--epochs", 40, "--patience", 2) == 0
    report = report_in(out)
    recalls = [h["Recall@10"] for h in report["history"]]
    assert report["epoch"] == 1 + np.argmax(recalls) == len(recalls) - 2
    assert run("--resume", "--out", out) == 0
    assert report_in(out)["history"] == report["history"]
    assert report_in(out)["config"]["patience"] == 2
    assert "--lr" in refused("--resume", "--out", out, "--lr", 0.5)
    params, extra = lrurec.load(out / "model.npz")
    lrurec.save(out / "model.npz", params, **{**extra, "epoch": 99})  # not in last.npz
    assert "--epochs 99" in refused("--resume", "--out", out)
    with open(tiny[1], "a", encoding="utf-8") as file:
        file.write("\nu0,i0,99")
    assert "other data" in refused("--resume", "--out", out)
    os.remove(out / "model.npz")
    assert "no run to resume" in refused("--resume", "--out", out)


def test_runs_without_out_take_folders_of_their_own(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(*tiny, "--epochs", 1) == 0
    assert sorted(os.listdir("runs")) == ["toy", "toy-2"]
    assert run(*tiny, "--epochs", 2, "--resume") == 0
    assert "run in " + os.path.join("runs", "toy-2") in capsys.readouterr().out


def test_without_anybody_to_validate_on_the_last_epoch_is_kept(tmp_path, capsys):
    file = write(tmp_path / "f", "".join(f"{u},{i}\n" for u in range(9) for i in (u % 3, 5)))
    assert run("--data", file, "--out", tmp_path / "r", "--min-count", 0, "--epochs", 3,
               "--patience", 1, *TINY) == 0
    report = report_in(tmp_path / "r")
    assert report["epoch"] == 3 and report["validation"] is None and report["test"] is None
    assert "no user" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Recommending

IDS = ["", "7", "8", "9", "Heat"]
TITLES = ["", "Heat (1995)", "Star Wars (1977)", "Star Trek (1979)", "8"]


@pytest.mark.parametrize("text, item", [
    ("7", 1), ("8", 2), ("Heat", 4), ("heat (1995)", 1), ("star wars", 2), (" TREK ", 3)])
def test_raw_id_beats_title_beats_part_of_a_title(text, item):
    assert train.find_item(text, IDS, TITLES) == item


@pytest.mark.parametrize("text, message", [
    ("star", r"could be 2 items.*Star Wars \(1977\) \[8\]; Star Trek \(1979\) \[9\]"),
    ("Star Wrs (1977)", r"no item.*nearest: Star Wars \(1977\)"), ("", "no item")])
def test_an_unclear_title_is_answered_with_candidates(text, message):
    with pytest.raises(reader.DataError, match=message):
        train.find_item(text, IDS, TITLES)


def test_one_scan_of_a_long_history_is_the_same_as_stepping_through_it():
    params, history = tiny_params(n_items=30), list(np.random.default_rng(0).integers(1, 31, 19))
    scanned, stepped = train.Visitor(params), train.Visitor(params)
    scanned.take(history)
    for item in history:
        stepped.add(item)
    assert relative_error(scanned.states[-1], stepped.states[-1]) < 1e-12
    for a, b in zip(scanned.top(), stepped.top()):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    items, scores, probabilities = scanned.top()
    assert not set(items) & set(history) and 0 not in items and (np.diff(scores) <= 0).all()
    logits = lrurec.score(params, lrurec.encode(params, np.array(history), np.zeros(19, bool)))[-1]
    others = np.setdiff1d(np.arange(1, 31), history)
    assert probabilities.sum() <= 1 + 1e-12
    np.testing.assert_allclose(probabilities, np.exp(logits[items]) / np.exp(logits[others]).sum())


def test_why_leaves_each_event_out():
    params = tiny_params(n_items=30)
    visitor = train.Visitor(params)
    visitor.take([3, 9, 4])
    best, changes = visitor.why()
    assert best == visitor.top()[0][0]
    whole, *without = [
        lrurec.score(params, lrurec.encode(params, np.array(h), np.zeros(len(h), bool)))[-1, best]
        for h in ([3, 9, 4], [9, 4], [3, 4], [3, 9])]
    assert changes == pytest.approx(np.array(without) - whole, rel=1e-9)
    alone = train.Visitor(params)
    alone.add(5)
    assert len(alone.why()[1]) == 1, "without its only event a history is the empty one"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    assert run(*tiny_run(folder), "--out", folder / "run", "--epochs", 6) == 0
    return folder / "run" / "model.npz"


def test_recommend(model, refused, capsys):
    assert run("recommend", model, "i3", "i4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and "after 2 event" in lines[0]
    assert run("recommend", model, "--new-user") == 0 and "after 0" in capsys.readouterr().out
    assert "no item" in refused("recommend", model, "nothing like it")
    assert run("recommend", model, "i3", "--device", "cpu", "i4") == 0, "flags may stand anywhere"
    assert capsys.readouterr().out.splitlines() == lines
    assert "--new-user" in refused("recommend", model, "--new-user", "i3")
    assert run("recommend", model, *(f"i{k}" for k in range(14))) == 0, "nothing is left to show"
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 and printed.err == ""


def test_any_alphabet_in_any_terminal(tmp_path):
    words = "дом кот лес сад пол".split()
    text = "".join(f"u{u},{word},{t}\n" for u in range(6) for t, word in enumerate(words))
    options = {"env": {**os.environ, "PYTHONIOENCODING": "cp1252"}, "capture_output": True}
    file, recommend = write(tmp_path / "f.csv", text), ["recommend", tmp_path / "r" / "model.npz"]
    subprocess.run(**python("train.py", "--data", file, "--out", tmp_path / "r", "--epochs", 1,
                            *TINY), **options, check=True)
    done = subprocess.run(**python("train.py", *recommend), **options, input="дом\n".encode())
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, "cp1252 cannot spell it"
    done = subprocess.run(**python("train.py", *recommend, "дом"), **options)
    assert done.returncode == 0 and b"\\u043a\\u043e\\u0442" in done.stdout


def test_recommend_from_a_pipe_answers_line_by_line(model, refused, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n\ni4\n"))
    assert run("recommend", model) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert len(first.split("\t")) == 10 and "i3" not in first.split("\t")
    assert not {"i3", "i4"} & set(second.split("\t"))
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\nwhat\n"))
    assert "line 2" in refused("recommend", model)


def test_a_session_on_a_terminal(model, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def talk(lines):
        monkeypatch.setattr("sys.stdin", Terminal(lines))
        assert run("recommend", model) == 0
        return capsys.readouterr().out

    def tables(lines):
        return [after.splitlines()[:11] for after in talk(lines).split("    after ")[1:]]

    out = talk("i3\ni5\nundo\ni4\nwhy\nreset\nundo\nwhy\nwhat is this\nhelp\n")
    assert re.findall(r"    after (\d+)", out) == ["1", "2", "1", "2", "0"]
    assert "changes by" in out and "nothing to undo" in out and "no item" in out and " us" in out
    first, _, undone, last = tables("i3\ni5\nundo\ni4\n")
    assert undone == first and last == tables("i3\ni4\n")[1]
    assert "after" not in talk("quit\ni3\n")
    monkeypatch.setattr("builtins.input", ctrl_c)
    assert "after" not in talk("")


def test_inspect(model, capsys):
    assert run("inspect", model) == 0
    out = capsys.readouterr().out
    params, _ = lrurec.load(model)
    lam, _ = lrurec.lam_forward(params["blocks.1.lru.nu_log"], params["blocks.1.lru.theta_log"])
    assert f"block 1: mean |lam| {abs(lam).mean():.2f}" in out
    reals = sum(p.size * (2 if np.iscomplexobj(p) else 1) for p in params.values())
    assert f"in all {reals:,}" in out
    picture = "".join(train.disk(np.array([1, 1j, -1, 0.2, 0.2])))
    assert picture.count("1") == 3 and picture.count("2") == 1


@pytest.mark.parametrize("change, message", [
    (lambda e: e.pop("params/blocks.1.lru.B"), "lacks blocks.1.lru.B"),
    (lambda e: e.pop("json/titles"), "lacks titles"),
    (lambda e: e.update(format=np.array("lrurec 9")), "format 'lrurec 9'"),
    (lambda e: e.update({"params/output_bias": np.zeros(3, np.float32)}), "lacks output_bias of"),
    (lambda e: e.update({"json/digest": np.array('"0"')}), "other data"),
    (lambda e: e.update({"json/titles": np.array("[]")}), "lacks 14 titles"),
    (lambda e: e["params/output_bias"].fill(np.nan), "lacks finite numbers"),
])
def test_a_model_that_does_not_fit_is_one_clear_line(model, change, message, tmp_path, refused):
    with np.load(model) as file:
        entries = dict(file)
    change(entries)
    np.savez(tmp_path / "bad.npz", **entries)
    assert message in refused("evaluate", tmp_path / "bad.npz")


def test_a_model_from_before_the_later_flags_is_as_good(model, tmp_path, capsys):
    with np.load(model) as file:
        entries = dict(file)
    config = json.loads(str(entries["json/config"]))
    entries["json/config"] = np.array(json.dumps(
        {name: value for name, value in config.items() if name not in train.OLDER_RUNS}))
    np.savez(tmp_path / "old.npz", **entries)
    for path in (model, tmp_path / "old.npz"):
        assert run("evaluate", path) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[:len(table) // 2] == table[len(table) // 2:]
    assert train.load_model(tmp_path / "old.npz")[1]["config"] == {**config, **train.OLDER_RUNS}


def test_bench_measures_what_it_says_and_leaves_the_model_alone(tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "timed", lambda work, *options: work() is None or 1e-6)
    functions = {name: getattr(lrurec, name) for names in train.PARTS.values() for name in names}
    assert run("bench", *tiny[:2]) == 0
    out = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r" (\d+)%", out)]
    assert len(shares) == len(train.PARTS) + 1 and 90 < sum(shares) < 110
    assert "ratio" in out and "128 x    100 events" in out and "after  10000 events" in out
    assert all(getattr(lrurec, name) is function for name, function in functions.items())


# ---------------------------------------------------------------------------------------------
# Nothing lost, and the front door

def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(tiny, tmp_path):
    out, start = tmp_path / "killed", [*tiny, "--epochs", 40, "--patience", 99, "--threads", 2]
    assert run(*start, "--out", tmp_path / "whole") == 0
    for epochs_before in (1, 12, 25):              # kill -9, somewhere in the epoch after these
        program = python("train.py", *(["--resume"] if out.exists() else start), "--out", out)
        with subprocess.Popen(**program, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("epoch") and int(line.split()[1]) > epochs_before:
                    process.kill()
                    break
        for name in ("model.npz", "last.npz"):
            lrurec.load(out / name)                # the old one or the new one, never half of one
    assert run("--resume", "--out", out) == 0
    for name in ("model.npz", "last.npz"):
        (params, _), (expected, _) = (lrurec.load(tmp_path / r / name) for r in ("killed", "whole"))
        assert all((params[n] == expected[n]).all() for n in expected)
    assert sorted(os.listdir(out)) == ["last.npz", "metrics.json", "model.npz"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    params, path = tiny_params(), tmp_path / "m.npz"
    lrurec.save(path, params, n=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match=str(path)):
            lrurec.save(path, params, n=2)
        with pytest.raises(OSError, match="other"):
            reader.write_whole(str(tmp_path / "other"), bytes(9999))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lrurec.load(path)[1]["n"] == 1 and os.listdir(tmp_path) == ["m.npz"]


def test_every_command_in_the_readme_parses():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        code = "".join(re.findall(r"^```\n(.*?)^```", file.read(), re.S | re.M))
    lines = [line.partition("  #")[0] for line in code.splitlines() if line.startswith("python ")]
    commands = [part for line in lines for part in line.split("&&")]
    for command in commands:
        words = shlex.split(command.partition(">")[0])
        if words[1] == "train.py":
            train.parse_arguments(words[2:])       # raises SystemExit
        elif words[1] == "test_lrurec.py":
            assert words[2:] in ([], ["mine.py"]) or words[2] in EXERCISES, command
        else:
            assert words[1:4] in (["-m", "pip", "install"], ["-m", "pytest", "-q"]), command
    shown = " ".join(commands)
    assert "test_lrurec.py gelu" in shown and "test_lrurec.py mine.py" in shown
    assert not [name for name in train.FLAGS if "--" + name.replace("_", "-") not in shown]


@pytest.mark.parametrize("command", ["train", "evaluate", "recommend", "inspect", "bench"])
def test_help_shows_examples_that_parse_and_a_default_for_every_setting(command, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments([command, "--help"])
    text = capsys.readouterr().out
    examples = re.findall(r"python train.py (.*)", text)
    assert examples and all(train.parse_arguments(shlex.split(e))[0] == command for e in examples)
    if command == "train":
        for name, value in train.DEFAULTS.items():
            assert "--" + name.replace("_", "-") in text
            assert value in (None, False) or f"default {value}" in " ".join(text.split()), name


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
        out = options.get("out")
        result = wrapped(function(*map(unwrapped, args),
                                  **{name: unwrapped(x) for name, x in options.items()}))
        return out if out is not None else result
    return call


for operator in ("add sub mul truediv pow matmul and or lt le gt ge eq ne neg abs invert getitem "
                 "len radd rsub rmul rtruediv iadd isub imul itruediv ior").split():
    def method(self, *others, name=f"__{operator}__"):
        result = getattr(self.inside, name)(*map(unwrapped, others))
        return self if name[2] == "i" and name != "__invert__" else wrapped(result)
    setattr(DeviceArray, f"__{operator}__", method)


class StandIn:
    """As much of CuPy as we use; the two kernels are done here by the definition."""
    inf, ndarray = np.inf, DeviceArray
    add = type("add", (), {"at": staticmethod(on_device(np.add.at))})
    asarray = staticmethod(lambda x, dtype=None: DeviceArray(
        np.array(x.inside if isinstance(x, DeviceArray) else x, dtype)))

    class cuda:
        class get_current_stream:
            synchronize = staticmethod(lambda: None)

    def __init__(self):
        for name in ("append arange concatenate cumsum empty_like exp flatnonzero full isfinite "
                     "log maximum minimum multiply ones ones_like roll sqrt stack tanh vdot where "
                     "zeros zeros_like").split():
            setattr(self, name, on_device(getattr(np, name)))

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
    lrurec._KERNELS.clear()


def test_the_same_numbers_on_the_stand_in_and_no_wait_inside_a_step(gpu):
    params, batch = tiny_params(n_items=40), batch_of(40)
    gpu("gpu")
    device = {name: lrurec.xp.asarray(p) for name, p in params.items()}
    opt, config = lrurec.adamw_init(device), {**train.DEFAULTS, "dropout": 0.3}
    DeviceArray.reads = 0
    results = everything(device, *batch)
    with train.gradient_workers(device, config, 40) as (params_d, gradients):
        train.train_step(params_d, opt, batch, config, gradients)
    assert DeviceArray.reads == 0, "each wait for the card costs more than the step's kernels"
    results = [lrurec.to_host(result) for result in results]
    gpu("cpu")
    for a, b in zip(results, everything(params, *batch)):
        assert relative_error(a, b) < 1e-12


def test_the_whole_program_on_the_stand_in_and_its_model_on_the_cpu(gpu, tiny, tmp_path,
                                                                    capsys, monkeypatch):
    out, device = tmp_path / "run", ["--device", "gpu"]
    assert run(*tiny, "--out", out, "--epochs", 2, *device) == 0
    assert run("--resume", "--out", out, "--epochs", 3, *device) == 0
    assert run("evaluate", out / "model.npz", *device) == 0
    assert run("recommend", out / "model.npz", "i3", *device) == 0
    on_gpu = capsys.readouterr().out.splitlines()[-10:]
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n"))
    assert run("recommend", out / "model.npz", *device) == 0
    monkeypatch.setattr(train, "timed", lambda work, *options: work() is None or 1e-6)
    assert run("bench", *tiny[:2], *device) == 0
    capsys.readouterr()
    gpu("cpu")
    assert run("recommend", out / "model.npz", "i3") == 0
    assert capsys.readouterr().out.splitlines()[-10:] == on_gpu


def test_a_stray_numpy_call_is_caught_by_the_stand_in():
    z = DeviceArray(np.ones(3))
    for stray in (lambda: np.exp(z), lambda: np.ones(3) * z, lambda: z + np.ones(3),
                  lambda: np.concatenate([z, z]), lambda: z[np.array([0, 1])], lambda: float(z)):
        with pytest.raises(TypeError):
            stray()


def test_without_cupy_or_a_card_one_line_says_what_to_install(monkeypatch, refused):
    assert "cupy" not in sys.modules, "nobody asked for it"
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert 'pip install "cupy' in refused("--device", "gpu")
    card_less = StandIn()

    def zeros(*args):
        raise RuntimeError("no CUDA-capable device is detected")
    card_less.zeros = zeros
    monkeypatch.setitem(sys.modules, "cupy", card_less)
    assert "NVIDIA GPU (no CUDA-cap" in refused("--device", "gpu")
    assert lrurec.xp is np
