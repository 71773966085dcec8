# SPDX-License-Identifier: MIT
"""The check of every gradient, the exercises and their grader, then the tests.

    python test_lrurec.py                        the exercises: which are right, what is next
    python test_lrurec.py gelu                   write answers/gelu.py; from then on, grade it
    python test_lrurec.py gelu --hint            what to ask yourself
    python test_lrurec.py gelu --formula         the answer as a formula
    python test_lrurec.py PATH.py                grade any file
    python test_lrurec.py train gelu scan        a small training, ours and with your functions
    python test_lrurec.py train --ml-100k gelu   train.py's own training with your functions
    python test_lrurec.py check                  every gradient of the whole model
    python test_lrurec.py pytorch                agreement and speed beside PyTorch
    python -m pytest -q                          the tests

Contents
    Numbers to work on
    The check: every gradient of the whole model
    Layers as an exercise shows them
    The grader: what an answer returns beside what is expected
    Hints: what the first wrong tensor looks like, and a table of usual mistakes
    What each function is called with
    Lines and memory of a scan
    The exercises
    Files of answers, and training with them
    For those who know PyTorch
    The commands
    The tests: grader, model, data, settings and evaluation, runs, commands, README, GPU

Needs pytest. Offline, but for `train --ml-100k` and `pytorch`, which fetch ML-100K once. In
float64, but for runs of train.py and where float32 is named.
"""
import argparse
import contextlib
import copy
import csv
import errno
import functools
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import DEFAULT, Mock

import train  # before NumPy: it holds BLAS to one thread

import numpy as np
import pytest

import data as reader
import lrurec

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------------------------------------
# Numbers to work on: generic, since zeros, squares and symmetry hide mistakes

def real(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def compl(*shape, seed=1):
    return real(*shape, seed=seed) + 1j * real(*shape, seed=seed + 100)


STARTS = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0], bool)


def lam_of(H, radius=0.9):
    return radius * np.exp(1j * np.linspace(0.4, 5.1, H))         # generic phases


def tiny_params(n_items=7, n_blocks=2, sizes=(4, 5, 6)):
    """Parameters of a model with D, H, F = sizes."""
    params = lrurec.init_params(n_items, *sizes, n_blocks, np.random.default_rng(1), np.float64)
    for seed, p in enumerate(params.values()):
        p += 0.3 * (compl if np.iscomplexobj(p) else real)(*p.shape, seed=seed)
    return params


def relative_error(a, n):
    """|a - n| / (|a| + |n|): about half of what is usual."""
    scale = np.linalg.norm(a) + np.linalg.norm(n)
    return np.linalg.norm(a - n) / scale if scale > 1e-12 else np.linalg.norm(a - n)


def numeric_gradient(loss, z, delta=1e-5):
    """The gradient of loss(z), a real number, with respect to every entry of z. Where z is complex,
    an entry of the gradient is dL/d(Re z) + i dL/d(Im z). z is left exactly as it was.
    loss: a function of an array like z; z of any shape, real or complex -> an array like z
    Derivative: central differences. Each entry moves by itself, and its slope is
    (loss(z + delta) - loss(z - delta)) / (2 delta). A complex entry moves along 1j too, by
    delta * 1j; the slope found there, times 1j, is added. For losses near 1 the error is about
    delta^2 = 1e-10, and 1e-16 / delta = 1e-11 from rounding.
    """
    grad = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        for direction in (1, 1j) if np.iscomplexobj(z) else (1,):
            old = z[index]
            z[index] = old + delta * direction
            up = loss(z)
            z[index] = old - delta * direction
            down = loss(z)
            z[index] = old
            grad[index] += direction * (up - down) / (2 * delta)
    return grad


# ---------------------------------------------------------------------------------------------
# The check: every gradient of the whole model

def check_batch():
    """items, targets, starts (16,) with all that a batch can hold: items that occur twice, id 0,
    rows without a target; walls before rows 1, 4 and 5, then none."""
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
        error = relative_error(grads[name], numeric_gradient(lambda _: loss_and_grads()[0], p))
        kind = "complex" if np.iscomplexobj(p) else "real"
        print(f"{name:26} {str(p.shape):8} {kind:8} {error:.0e}")
        numbers += lrurec.real_view(p).size
        largest = np.maximum(largest, error)       # nan, if one of them is
    print("Gradients derived by hand were compared with (L(p + 1e-5) - L(p - 1e-5)) / 2e-5, "
          "number by number:\n"
          f"{len(params)} tensors, {numbers} numbers, largest relative error {largest:.0e}")
    return largest


# ---------------------------------------------------------------------------------------------
# Layers as an exercise shows them: two without real views, and one that is an exercise alone

def complex_product_forward(a, w):
    """z = a w and y = Re z, entry by entry.
    a (M,), w (M,) complex -> (z (M,) complex, y (M,) real); cache = (a, w)
    """
    z = a * w
    return (z, z.real), (a, w)


def complex_product_backward(dz, dy, cache):
    """z and y are both outputs: dz (M,) complex is the gradient through z alone, dy (M,) real the
    one through y alone. -> da (M,) complex, dw (M,) complex
    Derivative: y = Re z adds dy to the real part of dz: in all dz + dy. Then da = conj(w) (dz + dy)
    and dw = conj(a) (dz + dy).
    """
    a, w = cache
    dz = dz + dy
    return w.conj() * dz, a.conj() * dz


def complex_in_plainly(x, B, b):
    """out = x B + b.    x (N, D) real, B (D, H), b (H,) complex -> out (N, H) complex
    cache = (x, B)
    """
    return x @ B + b, (x, B)


def complex_out_plainly(h, C, b):
    """out = Re(h C) + b.    h (N, H), C (H, D) complex, b (D,) real -> out (N, D) real
    cache = (h, C)
    """
    return (h @ C).real + b, (h, C)


# ---------------------------------------------------------------------------------------------
# The grader: what an answer returns beside what is expected, tensor by tensor

class Wrong(AssertionError):
    """What the grader found, in the learner's terms."""


class Call(NamedTuple):
    """One call of an answer, and what it should return."""
    arguments: tuple
    expected: dict                # tensors by name, in the order of the computation
    outputs: list                 # what is returned, in this order; [] where all is in place
    note: str = ""
    tolerance: float = 1e-6
    options: dict = {}            # arguments given by keyword


CACHES = {  # the names of what a cache holds, where it is a tuple
    "linear_backward": ["x", "W"], "gelu_backward": ["x", "s"],
    "layer_norm_backward": ["xhat", "rstd", "scale"],
    "cross_entropy_backward": ["exps", "sums", "targets", "weights"],
    "complex_product_backward": ["a", "w"], "lam_backward": ["nu", "theta", "lam"],
    "complex_in_backward": ["x", "B"], "complex_out_backward": ["h", "C"]}
MAY_CHANGE = {"cross_entropy_backward": ("exps",), "adamw_update": ("params", "opt")}
SHOWN_ROWS = 8                    # of a table; a longer one shows wrong tensors alone


def ours(name):
    """Our function of that name: in lrurec or, where only an exercise has it, in this file."""
    return vars(lrurec).get(name) or globals()[name]


def same(a, n, tolerance=1e-6):
    return (type(a) is np.ndarray and a.shape == n.shape and a.dtype == n.dtype
            and relative_error(a, n) < tolerance)         # nan is not


def named_arrays(name, arguments):
    """Every array among the arguments of ours(name), by the name that the learner knows."""
    arrays = {}

    def collect(label, value):
        if isinstance(value, np.ndarray):
            arrays[label] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                collect(f'{label}["{key}"]', entry)
        elif isinstance(value, (tuple, list)):
            names = CACHES.get(name) if label == "cache" else None
            for i, entry in enumerate(value):
                collect(names[i] if names else f"{label}[{i}]", entry)

    for label, value in zip(inspect.signature(ours(name)).parameters, arguments):
        collect(label, value)
    return arrays


def grade(name, function):
    """Grade an answer: more than one call, with other numbers and shapes each time. Raises Wrong;
    an error in the answer stays what it is, with a note of what the call was."""
    with np.errstate(all="ignore"):
        for call in calls(name):
            try:
                grade_call(name, function, call)
            except Exception as error:
                error.add_note(f"(in a call of your {name}{call.note})")
                raise
    for label in {"loss_and_grads": ("items", "targets"), "step": ("items",)}.get(name, ()):
        grade_unknown_ids(name, function, label)
    if name in ("scan", "scan_backward"):
        grade_lines_and_memory(name, function)


def grade_call(name, function, call):
    """Compare what an answer returns for one call with what is expected. A call with other numbers
    of the same shapes goes before it, and what that one returned has to stay as it was."""
    others, arguments = copy.deepcopy(call.arguments), copy.deepcopy(call.arguments)
    for array in named_arrays(name, others).values():
        if array.dtype.kind in "fc":
            array *= 0.7
    earlier = tensors_of(name, function, others, call)
    kept = copy.deepcopy(earlier)
    tensors = tensors_of(name, function, arguments, call)
    for key, array in kept.items():
        if isinstance(array, np.ndarray) and array.tobytes() != earlier[key].tobytes():
            raise Wrong(f"what your {name} returned as {key} was changed by the next call: "
                        "return new arrays")
    after, may_change = named_arrays(name, arguments), MAY_CHANGE.get(name, ())
    for label, array in named_arrays(name, call.arguments).items():
        if not np.array_equal(after.get(label), array) and not label.startswith(may_change):
            raise Wrong(f"your {name} changed {label}, which has to stay as it was")
    compare(name, call, tensors)


def grade_unknown_ids(name, function, label):
    """An id outside 0..7 has to raise a ValueError."""
    call = calls(name)[0]
    for unknown in (8, -1):
        arguments, options = copy.deepcopy((call.arguments, call.options))
        named_arrays(name, arguments)[label][-1] = unknown
        try:
            function(*arguments, **options)
        except ValueError:
            continue
        except IndexError:                         # NumPy's own is not enough
            pass
        raise Wrong(f"your {name} should raise ValueError for id {unknown} of 0..7 in {label}, "
                    "as as_ids does")


def tensors_of(name, function, arguments, call):
    """Call function -> what it returned, by name; a dict of gradients counts as its entries. Of
    adamw_update, what is in its arrays then."""
    result = function(*arguments, **copy.deepcopy(call.options))
    if not call.outputs:
        return adamw_tensors(*arguments[:3])
    several = isinstance(result, (tuple, list)) and len(call.outputs) > 1
    values = result if several else [result]
    if result is None or len(values) != len(call.outputs):
        count = "nothing" if result is None else f"{len(values)} value(s)"
        raise Wrong(f"your {name} returned {count}; it should return {', '.join(call.outputs)}")
    tensors = {}
    for key, value in zip(call.outputs, values):
        if isinstance(value, (int, float, np.generic)):
            value = np.asarray(1.0 * value)        # a loss of 0 too
        by_names = isinstance(value, dict) and key not in call.expected       # dp or grads
        tensors.update(value if by_names else {key: value})
    return tensors


def adamw_tensors(params, grads, opt):
    """All that adamw_update changes, by name."""
    tensors = {"step": np.array(opt["step"])}
    for name, p in params.items():
        tensors |= {f"m: {name}": opt["m"][name], f"v: {name}": opt["v"][name], name: p}
    return tensors


def compare(name, call, given):
    """Raise Wrong, with a table and perhaps a hint, where tensors given are not as expected."""
    expected, title = call.expected, f"your {name} is wrong{call.note}"
    if given.keys() != expected.keys():
        missing, unknown = expected.keys() - given.keys(), given.keys() - expected.keys()
        raise Wrong(f"{title}: it should return gradients by name. Missing: {sorted(missing)}; "
                    f"not wanted: {sorted(map(str, unknown))}")
    wrong = [key for key, n in expected.items() if not same(given[key], n, call.tolerance)]
    if not wrong:
        return
    rows = [title, f"  {'tensor':26} {'shape':8} {'error':>8}"]
    for key in expected if len(expected) <= SHOWN_ROWS else wrong[:SHOWN_ROWS]:
        rows.append(table_row(key, given[key], expected[key], key in wrong))
    if len(wrong) > 1:
        rows.append(f"  first wrong: {wrong[0]}; the other {len(wrong) - 1} perhaps because of it")
    if text := hint(name, call, wrong[0], given):
        rows.append(f"  hint: {text}")
    raise Wrong("\n".join(rows))


def table_row(key, a, n, wrong):
    error, verdict = "", "WRONG" if wrong else "ok"
    if type(a) is np.ndarray and a.shape == n.shape and a.dtype == n.dtype:
        error = f"{relative_error(a, n):.1e}"
        if wrong:
            worst = np.unravel_index(np.argmax(abs(a - n)), n.shape)
            verdict += (f"  at {list(map(int, worst))}: yours {a[worst]:.8g}, "
                        f"expected {n[worst]:.8g}")
    return f"  {key:26} {str(n.shape):8} {error:>8}  {verdict}"


# ---------------------------------------------------------------------------------------------
# Hints, tried in turn: the form of the first wrong tensor; our function with a usual mistake in it;
# our function with one of its arrays changed; plain likenesses. A match is one of all entries.
# Where two mistakes explain it, nothing is said: no hint is better than a wrong one.

def hint(name, call, key, given):
    """What the tensor `key` of those given looks like, or ""."""
    a, n = given[key], call.expected[key]
    right = {other for other, m in call.expected.items() if same(given[other], m, call.tolerance)}
    others = {other: m for other, m in call.expected.items() if other not in right | {key}}
    if text := form(a, n, others):
        return text
    for wrong_versions in (usual_mistakes, changed_arrays):
        of_all, of_first = set(), set()            # what explains all tensors given, or this one
        for sentence, function, arguments in wrong_versions(name, call.arguments):
            try:
                tensors = tensors_of(name, function, arguments, call)
            except Exception:                      # the change makes no sense here
                continue
            equal = {other for other, m in tensors.items() if same(given[other], m, call.tolerance)}
            if len(equal) == len(given):
                of_all.add(sentence)
            elif right | {key} <= equal:
                of_first.add(sentence)
        if sentences := of_all or of_first:
            return sentences.pop() if len(sentences) == 1 else ""
    return likeness(a, n, named_arrays(name, call.arguments), others)


def form(a, n, others):
    """What is wrong with an array before its numbers are, or ""."""
    if type(a) is not np.ndarray:
        return f"it should be an array; it is {'missing' if a is None else 'a ' + type(a).__name__}"
    if np.iscomplexobj(a) and same(np.array(a.real), n):
        return "it should be real: its real part is right, the imaginary part has to go"
    if a.shape != n.shape:
        text = f"its shape is {a.shape}; it should be {n.shape}"
        if a.ndim == n.ndim + 1 and len(a) > 1 and same(a.sum(0), n):
            return text + ": the sum over the rows is missing"
        if same(a.T, n):
            return text + ": yours is transposed"
        same_as = [f": yours is {other}" for other, m in others.items() if same(a, m)]
        return text + "".join(same_as)
    if a.dtype != n.dtype:
        return f"its dtype is {a.dtype}; it should be {n.dtype}"
    if n.dtype.kind == "i":
        return f"it is {a}, and should be {n}: count it up in place"
    if not np.isfinite(a).all():
        return "it is not finite: nan or inf"
    return "" if a.any() else "it is all zeros"


def source_of(name):
    """What MISTAKES edits: our function, without docstring; of loss_and_grads, its helper too."""
    functions = [lrurec.output_loss, ours(name)] if name == "loss_and_grads" else [ours(name)]
    return "\n\n".join("".join(inspect.getsource(function).split('"""')[::2])
                       for function in functions)


def mistaken(name, piece, replacement):
    """Our function of that name, with one piece of its source replaced."""
    namespace = dict(vars(lrurec))
    exec(source_of(name).replace(piece, replacement), namespace)
    return namespace[name]


def usual_mistakes(name, arguments):
    """(sentence, function, arguments): our function with each of its MISTAKES."""
    for sentence, piece, replacement in MISTAKES.get(name, []):
        yield sentence, mistaken(name, piece, replacement), copy.deepcopy(arguments)


def changed_arrays(name, arguments):
    """(sentence, function, arguments): our function with one of its arrays changed."""
    for label, array in named_arrays(name, arguments).items():
        for kinds, sentence, change in ARRAY_CHANGES:
            if array.dtype.kind in kinds and "][" not in label:   # no cache in a cache
                others = copy.deepcopy(arguments)
                named_arrays(name, others)[label][...] = change(array)
                yield sentence.format(label), ours(name), others


ARRAY_CHANGES = [  # kinds of arrays (f and c: numbers, b: starts), what is said, what they become
    ("fc", "missing: {}; 1 in its place gives your numbers", np.ones_like),
    ("c", "missing or too many: a conjugate at {}", np.conj),
    ("c", "missing: the imaginary part of {}; it counts too", np.real),
    ("b", "missing: the walls; without them come your numbers", np.zeros_like),
    ("b", "your walls stand one row too far down", functools.partial(np.roll, shift=1)),
    ("b", "your walls stand one row too far up", functools.partial(np.roll, shift=-1))]


def likeness(a, n, arrays, others):
    """What a tensor that should be n can be taken for, or ""."""
    looks = {f"the order: yours is {other}": m for other, m in others.items()}
    looks |= {f"yours is {label} itself, unchanged": m for label, m in arrays.items()}
    looks |= {"yours is the conjugate of what it should be": n.conj(),
              "yours has its rows in reverse order": n[::-1] if n.ndim else n}
    for sentence, m in looks.items():
        if same(a, m):
            return sentence
    if same(a, n, 1e-5):
        digits = round(-math.log10(relative_error(a, n)))
        return f"right to {digits} digits: a rounded constant, another eps, cancellation, float32?"
    factor = np.vdot(n, a) / np.vdot(n, n)
    if n.size > 2 and same(a, factor * n):
        return f"yours is {np.real_if_close(factor, 1e9):.4g} times what it should be"
    return ""


# What people get wrong, as a teacher would name it: a sentence, a piece of our source, what stands
# in its place. The sentence is said where our function with that edit gives the learner's numbers;
# it says what is right, or begins "missing:" or "too many:". A test asks that each piece occurs
# once, and that each edited function is refused with its own sentence. To be looked up, not read.

MISTAKES = {
"numeric_gradient": [
    ("a complex entry can move along 1 and along 1j", "(1, 1j) if", "(1,) if"),
    ("the slope along 1j is the gradient's imaginary part: times 1j", "direction * (up", "(up"),
    ("the two points are 2 delta apart: divide by that", "(2 * delta)", "delta"),
    ("the two points are z + delta and z - delta, one on each side",
     "- down) / (2 * delta)", "- loss(z)) / delta")],
"linear_backward": [
    ("dW is a sum over the rows, not a mean", "x.T @ dout", "x.T @ dout / len(x)"),
    ("db is a sum over the rows, not a mean", "dout.sum(0)", "dout.mean(0)")],
"dropout_backward": [
    ("what was kept was multiplied by 1/(1 - p); mask holds that",
     "dout * mask", "dout * (mask > 0)"),
    ("mask is 0 where x was dropped: the slope is mask, not 1 - mask",
     "dout * mask", "dout * (1 - mask)")],
"gelu_backward": [
    ("the product rule: x enters out through s too", "s * (1 + x * r * (1 - s))", "s"),
    ("the product rule: x enters out directly too, with slope s",
     "s * (1 + x * r * (1 - s))", "s * x * r * (1 - s)"),
    ("the product rule: x enters out directly, with slope s, and through s too",
     "s * (1 + x * r * (1 - s))", "1"),
    ("missing: the slope of y, c (1 + 3 a x^2)", "r = 2 * GELU_C + 6 *", "r = 2 + 0 *"),
    ("the slope of x^3 is 3 x^2", "6 * GELU_C", "2 * GELU_C"),
    ("s is the sigmoid of 2 y: that 2 belongs to its slope", "2 * GELU_C + 6", "GELU_C + 3"),
    ("s = (1 + tanh(y)) / 2: that 1/2 belongs to its slope", "2 * GELU_C + 6", "4 * GELU_C + 12"),
    ("tanh(y) is 2 s - 1, not s: its slope is 1 - (2 s - 1)^2",
     "s * (1 + x * r * (1 - s))", "s + x * r / 4 * (1 - s * s)")],
"layer_norm_backward": [
    ("x enters xhat through the row's mean too", "dxhat - row_mean(dxhat)", "dxhat.copy()"),
    ("x enters xhat through rstd too", "dx -= xhat *", "xhat *"),
    ("x enters xhat through the row's mean and through rstd too",
     "dx = dxhat - row_mean(dxhat)", "return rstd * dxhat, (dout * xhat).sum(0), dout.sum(0)"),
    ("an entry moves rstd by its own xhat: multiply the last mean by xhat",
     "xhat * row_mean", "row_mean"),
    ("the last mean is that of dxhat * xhat, not of dxhat", "(dxhat * xhat)", "(dxhat)"),
    ("where xhat grows, rstd falls: the last term is subtracted", "dx -= xhat", "dx += xhat"),
    ("rstd = var^(-1/2) has the slope -1/2 var^(-3/2): rstd^3",
     "dx -= xhat *", "dx -= xhat / rstd *")],
"cross_entropy_backward": [
    ("missing: the target's own logit, -1 in its column", "-= dloss * weights", "-= 0"),
    ("the weight belongs to the softmax too", "dloss * weights / sums", "dloss / sums"),
    ("the loss subtracts the target's logit: -1 in its column",
     "-= dloss * weights", "+= dloss * weights"),
    ("the target's column is softmax - 1, not -1 alone",
     "-= dloss * weights", "= -dloss * weights"),
    ("target v is column v: column 0 is a column like any other", "targets]", "targets - 1]")],
"complex_product_backward": [
    ("y = Re z reaches the loss too: dy adds to Re dz", "dz + dy", "dz"),
    ("y is the real part: dy adds to Re dz, not to Im dz", "dz + dy", "dz + 1j * dy"),
    ("missing: both conjugates; z changes by a c, and L by Re(conj(dz) a c)",
     "w.conj() * dz, a.conj() * dz", "w * dz, a * dz"),
    ("too many: a factor 1/2; dL/d(Re z) + i dL/d(Im z) is twice Wirtinger's derivative",
     "dz = dz + dy", "dz = (dz + dy) / 2")],
"lam_backward": [
    ("nu = exp(nu_log) changes by nu times the change of nu_log", "-nu * conj", "-conj"),
    ("theta moves lam by i lam: take Re(i z) = -Im z", ".imag", ".real"),
    ("lam is an exponential: its slope is lam itself", "dlam.conj() * lam", "dlam.conj()")],
"scan_backward_loop": [
    ("dlam pairs g_n with h of the row before", "h[n - 1].conj()", "h[n].conj()"),
    ("dlam takes g_n, with what comes back from later rows, not dh_n",
     "1].conj() * g[n]", "1].conj() * dh[n]"),
    ("what comes back is added to row n - 1's own dh", "] += lam", "] = lam"),
    ("row 0 has no row before it: h[-1] is the last row's", "- 1, 0, -1)", "- 1, -1, -1)"),
    ("g_n needs g_{n+1}: from the last row to the first",
     "range(len(h) - 1, 0, -1)", "range(1, len(h))")],
"scan": [
    ("from an odd row to the next, lam acts twice: lam^2", "complex) ** 2", "complex)"),
    ("a wall before row 2m+1 keeps u_{2m} from it", "pairs[starts[1::2]] = 0", "pass"),
    ("a wall before either row is a wall before the pair: its odd row too", "| starts[1::2]", ""),
    ("a wall before an even row keeps the odd row before it away",
     "from_odd[starts[2::2]] = 0", "pass"),
    ("a pair has the input of its odd row too", "pairs += u[1::2]", "pass"),
    ("an even row has its own input too", "h[2::2] += from_odd", "h[2::2] = from_odd")],
"scan_backward": [
    ("dlam takes g_n, with what comes back from later rows, not dh_n", "* g[1:]", "* dh[1:]"),
    ("dlam pairs g_n with h of the row before", "h[:-1].conj() * g[1:]", "h[1:].conj() * g[1:]"),
    ("a wall before row n separates h_{n-1} from g_n in dlam too",
     "products[starts[1:]] = 0", "pass"),
    ("g_n needs g_{n+1}: from the last row to the first",
     "dh[::-1], next_starts[::-1])[::-1]", "dh, starts)")],
"lru_backward": [
    ("gamma = exp(gamma_log) changes by gamma times the change of gamma_log",
     '"u"].conj()', '"u"].conj() / cache["gamma"]'),
    ("dgamma_log takes du, with what comes back from later rows, not dh",
     ".conj() * du", ".conj() * dh"),
    ("gamma multiplies what goes in: dgamma_log takes u, not h", '"u"].conj()', '"h"].conj()'),
    ("the residual is the block's, not the LRU's", "return dx,", "return dx + dout,")],
"block_backward": [
    ("missing: the residual; x also goes round the feed-forward network",
     '"linear1"])', '"linear1"]); dx = 0'),
    ("missing: the residual; x also goes round the LRU",
     "LRU_NAMES, dlru))", "LRU_NAMES, dlru)); dx = 0"),
    ("what goes round the feed-forward network is dx of the norm, not dout",
     '"linear1"])', '"linear1"]); dx = dout.copy()')],
"backward": [
    ("an item that occurs twice gets both rows' dx: see np.add.at",
     "xp.add.at(dE, items, dx)", "dE[items] += dx"),
    ("row 0 of E is a row like any other", "items, dx)", "items, dx); dE[0] = 0"),
    ("go through the blocks from the last to the first",
     "reversed(range(len(block_caches)))", "range(len(block_caches))"),
    ("missing: the dropout of the embedding", "dropout_backward(dx, mask)", "dx"),
    ("E gets what has come back through the blocks, not dhidden", "items, dx)", "items, dhidden)")],
"loss_and_grads": [
    ("take the mean over the rows with a target, not over all N",
     "xp.maximum(weights.sum(), 1)", "len(weights)"),
    ("take the mean over the rows with a target, not the sum", "xp.maximum(weights.sum(), 1)", "1"),
    ("a row without a target carries no loss", "(targets > 0)", "(targets >= 0)"),
    ("missing: the output's share of dE; E is used twice", 'grads["item_embedding"] += dE', "pass"),
    ("missing: the input's share of dE; E is used twice",
     'grads["item_embedding"] += dE', 'grads["item_embedding"] = dE'),
    ("pass dropout and rng to forward", "starts, dropout, rng)\n    loss", "starts)\n    loss")],
"adamw_update": [
    ("leave the decay out of g: it changes p alone, not m and v", "real_view(grads[name])",
     "real_view(grads[name]) + weight_decay * real_view(params[name]) * name.endswith(DECAYED)"),
    ("missing: the decay, 1 - lr weight_decay", "p *= 1 - lr * weight_decay", "pass"),
    ("only what ends with one of DECAYED decays", "if name.endswith(DECAYED)", "if True"),
    ("m starts at 0 and is too small: mhat is m / (1 - beta1^t)", "m / (1 - beta1 ** t)", "m"),
    ("v starts at 0 and is too small: vhat is v / (1 - beta2^t)", "v / (1 - beta2 ** t)", "v"),
    ("t counts this step too: it is 1 in the first", 't = opt["step"]', 't = opt["step"] - 1'),
    ("eps is added to the root, not under it", "xp.sqrt(vhat) + eps", "xp.sqrt(vhat + eps)"),
    ("a complex entry is two real ones, each with its own g^2, not |g|^2",
     "g * g", "xp.repeat(abs(grads[name]) ** 2, g.size // grads[name].size, -1)"),
    ("beta1 belongs to m, beta2 to v", "beta1, beta2 = betas", "beta2, beta1 = betas")],
"step": [
    ("missing: the residual, x + y after the LRU", 'x + y, p["lru_norm', 'y, p["lru_norm'),
    ("missing: the residual, x + y after the feed-forward network",
     'x + y, p["ffn_norm', 'y, p["ffn_norm'),
    ("missing: gamma, in u = gamma * (x B + b_B)", 'xp.exp(p["lru.gamma_log"]) * z', "z"),
    ("take the output from the new state", "(new_state[k]", "(state[k]"),
    ("each block has a state of its own: state[k]", "* state[k]", "* state[0]")]}


# ---------------------------------------------------------------------------------------------
# What each function is called with: two sets of numbers and shapes, or more. A gradient should be
# what central differences give, for a random projection of the forward's output as the loss. All
# of these look alike: numbers, our forward, and what is expected, in the order of the computation,
# so that the first wrong tensor is the one nearest to the mistake

AGAIN = " with other numbers and shapes (the calls before were right)"


def backward_call(forward, inputs, more=(), note="", outputs=None):
    """The call of a backward function. forward() -> out, cache. inputs: the arrays that it reads,
    by the names of their gradients. more: arguments after the cache."""
    outs, cache = forward()
    outs = outs if isinstance(outs, tuple) else (outs,)
    douts = [np.array((compl if np.iscomplexobj(out) else real)(*np.shape(out), seed=9 + k))
             for k, out in enumerate(outs)]

    def loss(_):                                   # of inputs that numeric_gradient moves in place
        new, _ = forward()
        new = new if isinstance(new, tuple) else (new,)
        return sum(np.sum(dout.conj() * out).real for dout, out in zip(douts, new))

    expected = {key: numeric_gradient(loss, z) for key, z in inputs.items()}
    return Call((*douts, cache, *more), expected, outputs or list(inputs), note)


def layers(N, D, H):
    """A forward for each layer's backward, and numbers to call it with."""
    return {
        "linear_backward": (lrurec.linear_forward, dict(x=real(N, D), W=real(D, H), b=real(H))),
        "gelu_backward": (lrurec.gelu_forward, dict(x=2 * real(N, D))),
        "layer_norm_backward": (
            lrurec.layer_norm_forward, dict(x=real(N, D), scale=real(D), shift=real(D, seed=2))),
        "complex_product_backward": (
            complex_product_forward, dict(a=compl(H), w=compl(H, seed=2))),
        "lam_backward": (
            lrurec.lam_forward, dict(nu_log=real(H), theta_log=real(H, seed=2))),
        "complex_in_backward": (
            complex_in_plainly, dict(x=real(N, D), B=compl(D, H), b=compl(H))),
        "complex_out_backward": (
            complex_out_plainly, dict(h=compl(N, H), C=compl(H, D), b=real(D)))}


def layer_calls(name):
    for sizes, note in (((5, 6, 4), ""), ((7, 3, 2), AGAIN)):
        forward, inputs = layers(*sizes)[name]
        yield backward_call(lambda: forward(*inputs.values()),
                            {"d" + key: z for key, z in inputs.items()}, note=note)


def dropout_calls():
    for p, x in ((0.4, real(5, 6)), (0, real(5, 6)), (0.2, real(8, 3))):
        yield backward_call(
            lambda: lrurec.dropout_forward(x, p, np.random.default_rng(3)), {"dx": x},
            note=f" for p = {p}" + ("" if p else ": the mask is None"))


def cross_entropy_calls():
    for N, V, note in ((5, 5, ""), (8, 3, AGAIN)):
        logits, weights = 3 * real(N, V + 1), abs(real(N))
        targets = (5 * np.arange(N) + 1) % (V + 1)
        weights[targets == 0] = 0
        yield backward_call(
            lambda: lrurec.cross_entropy_forward(logits.copy(), targets, weights),
            {"dlogits": logits}, note=note)


def walls_of(starts):
    rows = np.flatnonzero(starts).tolist()
    return f"walls before rows {rows if len(rows) < 30 else '...'} of {len(starts)}"


def scan_calls():
    """Any N, any walls, any |lam|."""
    for N in (11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 100, 700):
        for p_wall, radius in itertools.product((0.3, 0, 1), (0.9, 0.3, 0.9999)):
            starts, H = np.random.default_rng(N).random(N) < p_wall, 5 if N % 2 else 3
            lam, u = lam_of(H, radius), compl(N, H)
            yield Call((lam, u, starts), {"h": lrurec.scan_loop(lam, u, starts)}, ["h"],
                       f" for |lam| = {radius}, {walls_of(starts)}", 1e-12)


def scan_backward_calls():
    for N, H in ((11, 4), (1, 4), (2, 4), (64, 3)):
        starts = STARTS if N == 11 else np.random.default_rng(N).random(N) < 0.3
        lam, dh = lam_of(H), compl(N, H)
        h = lrurec.scan_loop(lam, compl(N, H, seed=2), starts)
        dlam, du = lrurec.scan_backward_loop(dh, lam, h, starts)
        yield Call((dh, lam, h, starts), {"du": du, "dlam": dlam}, ["dlam", "du"],
                   f" with {walls_of(starts)}", 1e-12)


def lru_calls():
    for N, D, H in ((11, 3, 4), (8, 2, 3)):
        inputs = {"dx": real(N, D), "dnu_log": real(H) - 1, "dtheta_log": real(H, seed=3),
                  "dgamma_log": real(H, seed=4), "dB": compl(D, H), "db_B": compl(H),
                  "dC": compl(H, D), "db_C": real(D)}
        yield backward_call(
            lambda: lrurec.lru_forward(*inputs.values(), STARTS[:N]),
            {key: inputs[key] for key in reversed(inputs)}, outputs=list(inputs),
            note=f" with {walls_of(STARTS[:N])}")


def block_calls():
    for N, dropout, sizes in ((11, 0.3, (4, 5, 6)), (8, 0.0, (3, 4, 5))):
        p, x = lrurec.blocks(tiny_params(n_blocks=1, sizes=sizes))[0], real(N, sizes[0])
        yield backward_call(
            lambda: lrurec.block_forward(x, p, STARTS[:N], dropout, np.random.default_rng(2)),
            {**{name: p[name] for name in reversed(p)}, "dx": x}, outputs=["dx", "dp"],
            note=f" with dropout {dropout}, {walls_of(STARTS[:N])}")


def model_calls():
    for N, n_blocks, dropout, sizes in ((11, 2, 0.3, (3, 2, 4)), (8, 1, 0.0, (4, 3, 3))):
        params = tiny_params(n_blocks=n_blocks, sizes=sizes)
        items = np.random.default_rng(4).integers(0, 7, N)        # without the last one, 7
        names = [name for name in reversed(params) if name != "output_bias"]
        yield backward_call(
            lambda: lrurec.forward(params, items, STARTS[:N], dropout, np.random.default_rng(6)),
            {name: params[name] for name in names}, [params["item_embedding"]],
            outputs=["grads"], note=f" with {n_blocks} blocks, dropout {dropout}, "
                                    f"items {items.tolist()}, {walls_of(STARTS[:N])}")


def loss_calls():
    """Ours is what is expected here: the check compares it with central differences."""
    for N, n_blocks, dropout, has_targets in ((16, 2, 0.3, 1), (9, 1, 0.0, 1), (4, 1, 0.0, 0)):
        params = tiny_params(n_blocks=n_blocks)
        items, targets, starts = (array[:N] for array in check_batch())
        targets *= has_targets
        loss, grads = lrurec.loss_and_grads(params, items, targets, starts, dropout,
                                            np.random.default_rng(5))
        yield Call((params, items, targets, starts),
                   {"loss": np.array(loss), **{name: grads[name] for name in reversed(params)}},
                   ["loss", "grads"], f" with dropout {dropout}, targets {targets.tolist()}",
                   options={"dropout": dropout, "rng": np.random.default_rng(5)})


def adamw_calls():
    """The third step, then the first of other numbers; eps and betas are not the usual ones."""
    for sizes, earlier_steps in (((4, 5, 6), 2), ((3, 2, 4), 0)):
        params = tiny_params(n_blocks=1, sizes=sizes)
        for name in ("item_embedding.scale", "blocks.0.lru.C.bias"):  # not as DECAYED asks
            params[name] = real(3)
        grads = {name: p[::-1] + 1 for name, p in params.items()}
        opt = lrurec.adamw_init(params)
        numbers, options = (0.1, 0.5), {"betas": (0.8, 0.95), "eps": 0.1}
        for _ in range(earlier_steps):
            lrurec.adamw_update(params, grads, opt, *numbers, **options)
            grads = {name: 2 * g * g for name, g in grads.items()}
        after = copy.deepcopy((params, grads, opt))
        lrurec.adamw_update(*after, *numbers, **options)
        yield Call((params, grads, opt, *numbers), adamw_tensors(*after), [],
                   f" after {earlier_steps} right steps", 1e-12, options)


def step_calls():
    """One event at a time, for some users, gives what encode gives for their histories."""
    for n, n_users, n_blocks in ((8, 3, 2), (1, 3, 2), (4, 2, 1)):
        params = tiny_params(n_blocks=n_blocks)
        histories = np.random.default_rng(2).integers(0, 8, (n_users, n + 1))
        histories[0, -1] = 0                       # "nothing yet" is an item like any
        starts = np.tile(np.arange(n + 1) == 0, (n_users, 1))
        _, before = lrurec.encode(params, histories[:, :-1].ravel(), starts[:, :-1].ravel(), True)
        hidden, state = lrurec.encode(params, histories.ravel(), starts.ravel(), True)
        yield Call((params, before, histories[:, -1]), {"state": state, "hidden": hidden[n::n + 1]},
                   ["hidden", "state"], f" after {n} events of each of {n_users} users")


def cubic_loss(z):
    w = (compl if np.iscomplexobj(z) else real)(*z.shape, seed=5)
    return np.sum(w.conj() * z ** 3).real


def difference_calls():
    """Of a cubic, with a delta of 0.1: no other formula gives the same numbers."""
    for z, delta in ((compl(3), 0.1), (real(3, 2), 0.1), (compl(2, 2), 1e-5)):
        yield Call((cubic_loss, z), {"gradient": numeric_gradient(cubic_loss, z.copy(), delta)},
                   ["gradient"], f" for {z.dtype} z, delta = {delta}, loss = Re(sum conj(w) z^3)",
                   options={"delta": delta})


CALLS = {  # of the functions that are not in layers
    "numeric_gradient": difference_calls, "dropout_backward": dropout_calls,
    "cross_entropy_backward": cross_entropy_calls, "scan_backward_loop": scan_backward_calls,
    "scan": scan_calls, "scan_backward": scan_backward_calls, "lru_backward": lru_calls,
    "block_backward": block_calls, "backward": model_calls, "loss_and_grads": loss_calls,
    "adamw_update": adamw_calls, "step": step_calls}


@functools.cache
def calls(name):
    return list(CALLS[name]() if name in CALLS else layer_calls(name))


# ---------------------------------------------------------------------------------------------
# Lines and memory of a scan: what its values do not show

def cost(function, arguments):
    """The lines that Python executes in one call, and the most bytes that are in use during it."""
    lines, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return trace

    tracemalloc.start()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return lines, peak


def grade_lines_and_memory(name, function):
    """Refuse a scan that runs too many lines of Python, or holds too much. From N rows to 4 N,
    log N grows by a constant: the growth from 1,024 to 4,096 rows, divided by that from 256 to
    1,024, is 1 for log N, 2 for the square root of N, 4 for N."""
    right_but = f"your {name} gives the right values, but "

    def arguments(N, walls):
        u, lam, starts = compl(N, 2), lam_of(2), walls & (np.arange(N) % 8 == 0)
        return (lam, u, starts) if name == "scan" else (u, lam, u, starts)

    for walls in (True, False):
        try:
            (few, _), (some, _), (many, peak) = (
                cost(function, arguments(N, walls)) for N in (256, 1024, 4096))
        except RecursionError:
            raise Wrong(f"{right_but}it calls itself once for each row, which is too deep for "
                        "Python: the exercise asks for growth like log N") from None
        if many - some > 1.5 * (some - few):
            raise Wrong(
                f"{right_but}Python executes {few:,} lines for N = 256, {some:,} for 1,024 and "
                f"{many:,} for 4,096. The exercise asks for growth like log N, the same from each "
                "of these to the next: array operations on all rows that halve or double something")
        ratio = peak / (4096 * 2 * 16)             # of h; right ones: up to 14; N x N bools: 128
        if ratio > 30:
            raise Wrong(f"{right_but}at N = 4,096 it needs {ratio:.0f} times the memory of h: does "
                        "an array hold something for each pair of rows?")


# ---------------------------------------------------------------------------------------------
# The exercises, from one layer to the whole model. A file is built from lrurec.py: signatures,
# docstrings up to "Derivative:", the forwards, what may be called. A record holds the rest

class Exercise(NamedTuple):
    """What the file of an exercise needs besides lrurec.py."""
    minutes: int
    functions: list               # to write
    question: str                 # --hint: what to ask yourself
    task: str = "the gradients with respect to the forward's inputs"
    given: list = None            # functions shown whole; None: the forwards of the backwards
    may_call: list = None         # of lrurec; None: what ours calls
    told: str = ""                # in place of a docstring that would give the answer away
    formula: str = ""             # --formula, where no docstring has it behind "Derivative:"


EXERCISES = {
"differences": Exercise(20, ["numeric_gradient"],
    """What is a slope, if all you can do is to call loss? Move one entry of z by a small delta to
both sides; np.ndindex(z.shape) goes through all entries. A complex entry can move in two
directions, along 1 and along 1j: which of the two slopes is the real part of the gradient, and
what is the other?""",
    task="the gradient of any loss, by central differences. Most exercises are graded with "
    "it, so you need not take our word for them. Where you move an entry of z, put back what stood "
    "there: z + delta - delta is not always z",
    given=[], may_call=[]),
"linear": Exercise(15, ["linear_backward"],
    """How does one entry of W reach the loss? W[i, o] touches out[n, o] in every row n, by
x[n, i]. Write that as a sum over n, and the sum as a matrix product. Shapes then leave one way to
write it. And b[o]?"""),
"dropout": Exercise(5, ["dropout_backward"],
    "Each entry is multiplied by a number that does not depend on x. Which?",
    told="dout (N, D), mask (N, D) or None -> dx (N, D)"),
"gelu": Exercise(20, ["gelu_backward"],
    """out is a product of two things that depend on x: first the product rule. Then ds/dx: what
is the slope of (1 + tanh(y)) / 2, written with s itself? Last the slope of y."""),
"layer_norm": Exercise(45, ["layer_norm_backward"],
    """In how many ways does x[n, d] reach the loss? Directly, through the row's mean, and through
its rstd. Take dxhat first, the gradient of xhat, as if xhat = (x - mean) * rstd stood alone; then
ask how mean and rstd move with one entry of x. scale and shift are easy."""),
"cross_entropy": Exercise(20, ["cross_entropy_backward"],
    """One row, weight 1: the loss is log of a sum, minus one logit. What is the derivative of
log(sum_v exp(logit_v)) with respect to one logit? You have met it: softmax. From the cache:
softmax = exps / sums. Then the target's own logit, the weight, and dloss.""",
    task="the gradient with respect to logits. exps alone of all inputs may be overwritten",
    told="dloss, a scalar -> dlogits (N, V+1)"),
"complex_product": Exercise(20, ["complex_product_backward"],
    """Let w change by a small complex c. How does z change? Put that into Re(conj(dz) c), and
bring it to the form Re(conj(something) c): the something is dw. What does y = Re z add to the
gradient of z, before all this?"""),
"lam": Exercise(20, ["lam_backward"],
    """Let nu_log change by a small real e. By what does lam change, as a multiple of lam? Put
that into Re(conj(dlam) * change), the change of L; what stands before e is the gradient. The same
for theta_log."""),
"complex_linear": Exercise(25, ["complex_in_backward", "complex_out_backward"],
    """In: it is linear_backward with complex numbers in it. Take one entry of B: z = a w was the
exercise complex_product. Which factor gets a conjugate? What is left of a complex gradient when x
can change along the real axis alone?
Out: y = Re(h C), and the gradient of z = h C is dout + 0i. From there on it is z = a w again,
summed over rows or columns. Which factor gets a conjugate in dh, and which in dC?""",
    given=[complex_in_plainly, complex_out_plainly], may_call=[],
    formula="""In: dx = Re(dout conj(B)^T), dB = x^T dout, db = sum over rows of dout.
Out: dh = dout conj(C)^T, dC = conj(h)^T dout, db = sum over rows of dout."""),
"scan_backward_loop": Exercise(30, ["scan_backward_loop"],
    """In which ways does h_n reach the loss? Through row n's own output, which is dh_n, and
through h_{n+1} = lam h_n + u_{n+1}, unless a wall stands there. Call the whole gradient of h_n g_n.
In which order of rows can you find it? Then u_n and lam are one product away.""",
    task="the gradients of scan_loop, by a loop over the rows",
    given=[lrurec.scan_loop], may_call=[],
    told="""dh (N, H) is the gradient of h through each row's own output alone; lam (H,) and
h (N, H) are those of scan_loop; all complex; starts (N,)
-> dlam (H,) complex, du (N, H) complex""",
    formula=inspect.getdoc(lrurec.scan_backward_loop)),
"scan": Exercise(120, ["scan"],
    """Rows 0 and 1, 2 and 3, ... are pairs. Suppose somebody gave you h of all odd rows: how would
you get the even ones, all at once? And the odd rows alone: what recurrence do they obey, with which
eigenvalue, which input and which walls? It is the same problem at half the length. (Another way:
let each row collect what 1, 2, 4, ... rows before it have to give.)""",
    task="the result of scan_loop in about log N array operations, without an N x N array. The "
    "grader counts the lines that Python executes: they may grow like log N. A recursion that "
    "solves its halves one after the other runs as many lines as there are rows, which is not "
    "enough here. The result has to agree to 1e-12, for |lam| from .3 to .9999",
    given=[lrurec.scan_loop],
    told="""The result of scan_loop: h_n = lam h_{n-1} + u_n, without the first term where
a wall stands before row n.
lam (H,) complex, u (N, H) complex, starts (N,) bool -> h (N, H) complex""",
    formula=inspect.getdoc(lrurec.scan).partition("\n\n")[2]),
"scan_backward": Exercise(30, ["scan_backward"],
    """Write g_n = dh_n + conj(lam) g_{n+1} with m = N - 1 - n for n: which recurrence is it? Where
does a wall before row n + 1 stand, when the rows are read backwards? dlam is a sum of products that
needs no loop.""",
    task="the result of scan_backward_loop at the cost of scan",
    given=[lrurec.scan_loop],
    told="""The result of scan_backward_loop: g_n = dh_n + conj(lam) g_{n+1}, without the last
term where a wall stands before row n + 1; du = g; dlam = sum of conj(h_{n-1}) g_n over the rows
n >= 1 without a wall.
dh (N, H), lam (H,), h (N, H) of scan_loop, starts (N,) -> dlam (H,), du (N, H)"""),
"lru": Exercise(25, ["lru_backward"],
    """Bottom to top: out, h, u, z and gamma, lam. Each line of the forward has its backward
already, but for u = gamma * z. Find du first. gamma_log is real: by what does u change when it
changes by a small e?"""),
"block": Exercise(25, ["block_backward"],
    """Read the forward from its last line to its first; each line has its backward. The one new
thing: x goes two ways where x + y is formed, through y and directly. What does that mean for its
gradient?"""),
"model": Exercise(25, ["backward"],
    """Bottom to top again: blocks from the last to the first, then norm, dropout, and the rows of
E. If an item stands in three rows, what is the gradient of its row of E?""",
    task="the gradients of the parameters, from that of hidden",
    told="""dhidden (N, D), caches from forward, E (V+1, D) the item embedding
-> grads, a dict: item_embedding, embedding_norm.scale, embedding_norm.shift and, for NAME in
BLOCK_NAMES, "blocks.k.NAME". Row 0 of E is a row like any other. Of E itself only shape and
dtype matter."""),
"loss": Exercise(25, ["loss_and_grads"],
    """Three parts: forward; the loss of logits; backward. Between them logits = hidden E^T +
output_bias is a linear layer: dhidden, and a gradient of E. In how many ways does E reach the loss?
Which weights of the rows turn the sum into a mean over those with a target?""",
    task="the loss of the whole model and its gradients",
    given=[],
    may_call=["as_ids", "forward", "backward", "cross_entropy_forward", "cross_entropy_backward"],
    told="""items (N,) int, targets (N,) int (0: no loss in this row), starts (N,) bool, rng a
NumPy Generator where dropout > 0 -> loss, grads: a dict like params
hidden = forward(...); logits = hidden E^T + output_bias, E being params["item_embedding"];
loss is the mean cross-entropy over the rows with a target. If no row has one, loss and all
gradients are 0. Raises ValueError for an item or a target outside 0..V, as as_ids does.""",
    formula="""weights = (targets > 0) / number of targets; dhidden = dlogits E, doutput_bias =
sum over rows of dlogits. E is tied, used twice, so two gradients add up: dE = dlogits^T hidden +
the dE of backward."""),
"adamw": Exercise(25, ["adamw_update"],
    """What is t in the first call? In which order do decay and step come? How does a complex
parameter become an array of real numbers, of the same shape as its m and v, so that what is written
there is written into the parameter?""",
    task="a step of AdamW, all in place: write into the arrays, replace none",
    given=[lrurec.adamw_init],
    told=inspect.getdoc(lrurec.adamw_update) + """
With t = 1 in the first step, for each parameter p and its gradient g:
    m <- beta1 m + (1 - beta1) g         mhat = m / (1 - beta1^t)
    v <- beta2 v + (1 - beta2) g^2       vhat = v / (1 - beta2^t)
opt["step"], which counts the steps, is yours to count up; grads are not changed.""",
    formula="""Add 1 to opt["step"] first: it is t. p and g as real_view shows them, then m and v,
then the decay, then the step, each written into its array (*=, +=, -=, [:] =); g stays."""),
"step": Exercise(25, ["step"],
    """Which line of the forward looks at another row? All others work on one row as they do on
many. What takes its place when the state before is given? May that state change?""",
    task="one more event for each user, from the state after the events before",
    given=[lrurec.forward, lrurec.lru_forward, lrurec.block_forward, lrurec.init_state],
    formula="""new_state[k] = lam * state[k] + gamma * (x B + b_B) in each block k, in a new array;
all else as in block_forward without dropout. as_ids raises the ValueError.""")}

NAMES = [name for exercise in EXERCISES.values() for name in exercise.functions]

NOTES = {  # a word, and what a learner is told where it occurs
    "": """Sizes: N rows of a batch, V items (ids 1..V; id 0 is "nothing yet"), D model width,
H complex state width, F feed-forward width, K blocks; M, I and O any width. Rows count from 0.
dname is the gradient of the loss L with respect to name. xp is NumPy. Leave the inputs unchanged,
unless you are told otherwise.""",
    "starts": """Walls: the rows of all users stand one after another, and where starts[n] is True
the state is zero before row n. A wall always stands before row 0, whatever starts[0] says.""",
    "complex": """Complex numbers: a complex z is two real ones, and dz = dL/d(Re z) + i dL/d(Im z);
no factor 2. So where z changes by a small complex c, L changes by Re(conj(dz) c). With a = p + iq,
the product z = a w is a real 2x2 matrix acting on w:

    [Re z]   [p  -q] [Re w]
    [Im z] = [q   p] [Im w]"""}
FILE = '''"""Exercise {exercise}, about {minutes} minutes

{task}

To grade this file:       python test_lrurec.py {exercise}
What to ask yourself:     python test_lrurec.py {exercise} --hint
The answer as a formula:  python test_lrurec.py {exercise} --formula

{notes}
"""
import math

import numpy as np

xp = np


{body}
'''


def told(name):
    """What a learner is told of a function: the docstring, but for its derivative."""
    for exercise in EXERCISES.values():
        if name in exercise.functions and exercise.told:
            return exercise.told
    return inspect.getdoc(ours(name)).partition("\nDerivative: ")[0]


def formula(exercise):
    """What --formula shows."""
    return exercise.formula or inspect.getdoc(ours(exercise.functions[0])).partition(
        "\nDerivative: ")[2].strip()


def heading(name):
    """A function as a learner sees it: its signature and docstring."""
    doc = textwrap.indent(told(name), "    ").strip()
    return (f'def {name}{inspect.signature(ours(name))}:\n    """{doc}\n    """\n'
            "    # your lines here\n")


def helper_text(name):
    """The import of what may be called, and what it does."""
    value = getattr(lrurec, name)
    if inspect.isfunction(value):
        text = f"{name}{inspect.signature(value)}\n{textwrap.indent(told(name), '    ')}"
    else:
        text = textwrap.fill(f"{name} = {value!r}", 94)
    return f"from lrurec import {name}\n{textwrap.indent(text, '# ')}"


def exercise_text(name):
    """An exercise file: the task, what is given, what may be called."""
    exercise = EXERCISES[name]
    asked, given = exercise.functions, exercise.given
    if given is None:
        given = [ours(function.replace("backward", "forward")) for function in asked]
    parts = [heading(function) for function in asked]
    if given:
        parts += ["# ---- Given\n", *map(inspect.getsource, given)]
    callers = given if exercise.may_call is not None else [*given, *map(ours, asked)]
    called = {word for function in callers for word in function.__code__.co_names}
    called.update(exercise.may_call or ())
    constants = {word for word in re.findall(r"\w+", "\n".join(parts)) if word.isupper()}
    helpers = [helper for helper, value in vars(lrurec).items()
               if helper in called | constants and value not in given and helper not in asked
               and (inspect.isfunction(value) or helper.isupper())]
    if helpers:
        parts += ["# ---- From lrurec: you may call these\n", *map(helper_text, helpers)]
    body = "\n\n".join(parts).rstrip()
    task = textwrap.fill(f"Write {' and '.join(asked)}: {exercise.task}.", 96)
    notes = "\n\n".join(note for word, note in NOTES.items() if word in body)
    return FILE.format(exercise=name, minutes=exercise.minutes, task=task, notes=notes, body=body)


# ---------------------------------------------------------------------------------------------
# Files of answers, and training with them

FOLDER = "answers"


def path_of(word):
    """gelu -> answers/gelu.py; the path of a file stays what it is."""
    return os.path.join(FOLDER, f"{word}.py") if word in EXERCISES else word


def load_answers(path):
    """What exercises ask for, of the functions in a file, by name; not what it imports of ours."""
    values = runpy.run_path(path)
    return {name: values[name] for name in NAMES
            if callable(values.get(name)) and values[name] is not ours(name)}


def grade_file(path, show=print):
    """Grade the answers in a file, and show what is found -> "right", "wrong", "empty", "error" or,
    after Ctrl-C, "stopped". An error is shown as Python shows it, cut to the file."""
    word = os.path.basename(path).removesuffix(".py")
    if word in EXERCISES and Path(path).read_text("utf-8", "replace") == exercise_text(word):
        show(f"{path}: the body is still empty")
        return "empty"
    try:
        answers = load_answers(path)
        asked = EXERCISES[word].functions if word in EXERCISES else answers
        missing = [name for name in asked if name not in answers]
        if missing or not answers:
            raise Wrong(f"there is no {', '.join(missing) or 'function of an exercise'} in it")
        for name, function in answers.items():
            grade(name, function)
            show(f"{path}: {name}: right")
    except Wrong as error:
        show(f"{path}: WRONG: {error}")
        return "wrong"
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        shown = traceback.TracebackException.from_exception(error)
        shown.stack[:] = [frame for frame in shown.stack if frame.filename == path]
        show("".join(shown.format(chain=False)).rstrip())
        return "stopped" if isinstance(error, KeyboardInterrupt) else "error"
    return "right"


def open_or_grade(word):
    """Write answers/NAME.py the first time; grade it, and any file, from then on -> exit code."""
    path = path_of(word)
    if os.path.exists(path):
        return int(grade_file(path) != "right")
    os.makedirs(FOLDER, exist_ok=True)
    with open(path, "x", encoding="utf-8") as file:
        file.write(exercise_text(word))
    print(f"Wrote {path}. Fill in the empty body, then: python test_lrurec.py {word}")
    return 0


def list_exercises():
    """Print the exercises, grade those in answers/, and say what is next -> exit code."""
    hours = sum(exercise.minutes for exercise in EXERCISES.values()) / 60
    print(f"The exercises with their minutes: {hours:.0f} hours in all. You may "
          "begin at the core,\ncomplex_product to lru, which is half of the time. Answers lie in "
          f"{FOLDER}/; Ctrl-C skips\none that does not end.\n")
    left = []
    for name, exercise in EXERCISES.items():
        print(f"  {name:18} {exercise.minutes:4}  {', '.join(exercise.functions):42}  ", end="",
              flush=True)                          # before it is graded, which may take for ever
        verdict, path = "", path_of(name)
        if os.path.exists(path):
            verdict = grade_file(path, show=lambda text: None)
        print(verdict)
        if verdict != "right":
            left.append(name)
    print(f"\n{len(EXERCISES) - len(left)} of {len(EXERCISES)} right. Next:\n"
          f"    python test_lrurec.py {left[0] if left else 'train --ml-100k'}")
    return 0


def in_rows(function):
    """function; but what it returns has its rows one after another, as real_view needs them."""
    def row_by_row(value):
        if isinstance(value, dict):
            return {name: row_by_row(entry) for name, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(map(row_by_row, value))
        return np.asarray(value, order="C") if isinstance(value, np.ndarray) else value
    return lambda *arguments, **options: row_by_row(function(*arguments, **options))


IN_TRAINING = [name for name in NAMES if hasattr(lrurec, name)
               and name not in ("scan_backward_loop", "step")]


def put_in_place(paths):
    """Put the functions in the files in place of lrurec's -> their names. As often as there are
    files: a file imports from lrurec what other exercises ask for, and gets the learner's only
    when that is in place."""
    names = set()
    for path in len(paths) * paths:
        for name, function in load_answers(path).items():
            if name in IN_TRAINING:
                setattr(lrurec, name, in_rows(function))
                names.add(name)
    return sorted(names, key=IN_TRAINING.index)


STEPS = 90                        # of the small training


def train_small():
    """Train a small model to recall the item of 3 steps ago -> losses, eigenvalues before, after"""
    params = lrurec.init_params(5, 16, n_blocks=1, rng=np.random.default_rng(0), dtype=np.float64)
    opt, losses, rng = lrurec.adamw_init(params), [], np.random.default_rng(1)
    p = lrurec.blocks(params)[0]
    before, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
    for _ in range(STEPS + 1):
        items = rng.integers(1, 6, (32, 32))
        targets = np.zeros_like(items)             # 0: nothing to recall yet
        targets[:, 3:] = items[:, :-3]
        starts = np.arange(items.size) % 32 == 0
        loss, grads = lrurec.loss_and_grads(params, items.ravel(), targets.ravel(), starts)
        lrurec.clip_gradients(grads, 5.0)
        lrurec.adamw_update(params, grads, opt, 1e-2, 0.01)
        losses.append(float(loss))
    after, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
    return losses, before, after


def show_curves(our_losses, your_losses):
    print("\nRecall the item of 3 steps ago, one of 5. A model without memory cannot get below\n"
          "log 5 = 1.609.\n\nstep    ours  yours   o ours, x yours, * both")
    for n in range(0, len(our_losses), 10):
        line = [" "] * 51
        for loss, mark in ((our_losses[n], "o"), (your_losses[n], "x")):
            column = round(20 * min(loss, 2.5)) if loss == loss else 50       # nan: the far right
            line[column] = mark if line[column] == " " else "*"
        print(f"{n:4}  {our_losses[n]:6.3f} {your_losses[n]:6.3f}   {''.join(line).rstrip()}")


def train_with(paths, on_ml_100k):
    """Train once with ours and once with the functions in the files, right or wrong; print both
    losses and, where they are right, the eigenvalues. Or run train.py with them -> exit code."""
    verdicts = {path: grade_file(path) for path in paths}
    if {"error", "stopped"} & {*verdicts.values()}:
        return 1
    if not on_ml_100k:
        our_losses, _, _ = train_small()
    names = put_in_place([path for path in paths if verdicts[path] != "empty"])
    if not names:
        print(f"There is nothing to train with. A training uses {', '.join(IN_TRAINING)}.")
        return 1
    print(f"Your functions in the model: {', '.join(names)}", flush=True)
    if on_ml_100k:                                 # in float64, as they were graded
        print("Some minutes, in a new folder of runs/. Do not --resume it after Ctrl-C, whatever "
              "is said then: it would go on with our functions.", flush=True)
        lrurec.init_params = functools.partial(lrurec.init_params, dtype=np.float64)
        return train.main(["train"])
    your_losses, before, after = train_small()
    show_curves(our_losses, your_losses)
    if "wrong" in verdicts.values():
        print("\nA falling loss proves nothing: a wrong gradient often learns too, sometimes "
              "faster,\nand you would never know. The grader tells.")
        return 1
    print("\nThe circle is |lam| = 1; a digit counts the eigenvalues in its place.\n"
          f"{'Before':44}and after")
    for row in zip(train.disk(before), train.disk(after)):
        print(f"{row[0]:44}{row[1]}")
    return 0


# ---------------------------------------------------------------------------------------------
# For those who know PyTorch: the same model, forward only, in the same letters

def torch_scan(lam, u, starts):
    """h of rows u, as lrurec.scan finds it: the odd rows by the same recursion over pairs of rows,
    then each even row from the odd one before it."""
    import torch
    if len(u) == 1:
        return u
    even, odd, passes = u[0::2], u[1::2], ~starts[:, None]
    pairs = odd + lam * passes[1::2] * even[:len(odd)]
    odd = torch_scan(lam * lam, pairs, starts[0:len(u) - 1:2] | starts[1::2])
    h = torch.empty_like(u)
    h[1::2] = odd
    h[0] = u[0]
    h[2::2] = even[1:] + lam * passes[2::2] * odd[:len(even) - 1]
    return h


def torch_loss(params, items, targets, starts, dropout=0.0):
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
        h = torch_scan(lam, u, starts)
        C = torch.stack([C.real, -C.imag], 1).flatten(0, 1)
        y = torch.view_as_real(h).flatten(1) @ C + b_C
        x = norm(x + F.dropout(y, dropout), f"blocks.{k}.lru_norm")
        y = F.dropout(F.gelu(x @ W1 + b1, approximate="tanh"), dropout) @ W2 + b2
        x = norm(x + F.dropout(y, dropout), f"blocks.{k}.ffn_norm")
    logits = x @ params["item_embedding"].T + params["output_bias"]
    return logits, F.cross_entropy(logits, targets, ignore_index=0)


def torch_differences():
    """{name: relative difference} of logits, loss and every gradient, in float64."""
    import torch
    params, rng = tiny_params(), np.random.default_rng(4)
    items, targets = rng.integers(0, 8, 11), rng.integers(0, 8, 11)
    tensors = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    logits, loss = torch_loss(tensors, *map(torch.tensor, (items, targets, STARTS)))
    loss.backward()
    our_loss, grads = lrurec.loss_and_grads(params, items, targets, STARTS)
    our_logits = lrurec.score(params, lrurec.encode(params, items, STARTS))
    pairs = {"logits": (our_logits[:, 1:], logits.detach().numpy()[:, 1:]),
             "loss": (our_loss, loss.item())}
    pairs |= {f"gradient of {name}": (g, tensors[name].grad.numpy()) for name, g in grads.items()}
    return {name: relative_error(a, n) for name, (a, n) in pairs.items()}


def compare_with_pytorch():
    """Print how well lrurec and PyTorch agree, and the time of a step of each."""
    if not importlib.util.find_spec("torch"):
        print("PyTorch is not installed: python -m pip install torch")
        return 1
    import torch
    print(f"PyTorch {torch.__version__}, NumPy {np.__version__}, float64: relative differences")
    for name, difference in torch_differences().items():
        print(f"  {name:40} {difference:.1e}")
    config, rng = {**train.DEFAULTS, "dropout": 0.2, "seed": 0}, np.random.default_rng(0)
    dataset = reader.load_dataset("ml-100k")
    batches = list(reader.batches(reader.training_rows(dataset, 200), 128, rng))[:6]
    params = lrurec.init_params(len(dataset.item_ids) - 1, rng=rng)
    tensors = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    opt, pool = lrurec.adamw_init(params), ThreadPoolExecutor(config["threads"])
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-3, weight_decay=0.01, eps=1e-9)
    torch.set_num_threads(config["threads"])

    def numpy_step(batch):
        _, grads = train.gradients(pool, params, batch, config, opt["step"])
        lrurec.clip_gradients(grads, train.MAX_NORM)
        lrurec.adamw_update(params, grads, opt, lr=1e-3, weight_decay=0.01)

    def torch_step(batch):
        optimizer.zero_grad()
        torch_loss(tensors, *map(torch.tensor, batch), dropout=0.2)[1].backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), train.MAX_NORM)
        optimizer.step()

    print("\nML-100K, batches of 128 windows of 200, dropout 0.2, float32, "
          f"{config['threads']} threads: ms a step\n  NumPy  PyTorch  ratio")
    for _ in range(3):                             # alternately: other programs disturb both
        ms = []
        for step in (numpy_step, torch_step):
            step(batches[0])                       # the first one warms up
            begin = time.perf_counter()
            for batch in batches:
                step(batch)
            ms.append(1000 * (time.perf_counter() - begin) / len(batches))
        print(f"  {ms[0]:5.0f}  {ms[1]:7.0f}  {ms[1] / ms[0]:5.2f}", flush=True)
    return 0


# ---------------------------------------------------------------------------------------------
# The commands

def main(arguments=None):
    """Run a command of this file -> exit code. argparse itself ends with 2."""
    parser = argparse.ArgumentParser(
        prog="test_lrurec.py", usage="python test_lrurec.py [WORD ...]", allow_abbrev=False,
        description=__doc__.partition("\n\nContents")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="a command, exercises, .py files")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--hint", action="store_true", help="what to ask yourself")
    shown.add_argument("--formula", action="store_true", help="the answer as a formula")
    parser.add_argument("--ml-100k", action="store_true", help="train on ML-100K")
    args = parser.parse_intermixed_args(arguments)
    words = args.words
    if words == ["check"]:
        return int(not check_gradients() < 1e-6)
    if words == ["pytorch"]:
        return compare_with_pytorch()
    training = words[:1] == ["train"]
    if training:                                   # without a name: with all that is in answers/
        words = words[1:] or [name for name in EXERCISES if os.path.exists(path_of(name))]
        if not words:
            parser.error(f"there is no exercise in {FOLDER}/ to train with")
    elif args.ml_100k:
        parser.error("--ml-100k goes with train: python test_lrurec.py train --ml-100k gelu")
    for word in words:
        if word not in EXERCISES and not word.endswith(".py"):
            parser.error(f"{word!r} is neither a .py file nor an exercise (choose from "
                         f"{', '.join(EXERCISES)}); check and pytorch stand alone, "
                         "train comes first")
        if (training or word not in EXERCISES) and not os.path.exists(path_of(word)):
            parser.error(f"there is no {path_of(word)}")
    if args.hint or args.formula:
        if not words or not EXERCISES.keys() >= set(words):
            parser.error("--hint and --formula go with an exercise, such as gelu --hint")
        for word in words:
            print(EXERCISES[word].question if args.hint else formula(EXERCISES[word]))
        return 0
    if training:
        return train_with([path_of(word) for word in words], args.ml_100k)
    if not words:
        return list_exercises()
    return max(map(open_or_grade, words))


# ---------------------------------------------------------------------------------------------
# The tests

def program(*arguments):
    """Run train.py with these arguments, in this process -> exit code"""
    return train.main([str(a) for a in arguments])


@pytest.fixture
def refused(capsys):
    """As program, where it is to refuse: exit code 2 -> the one line that it says."""
    def refused_program(*arguments):
        capsys.readouterr()
        code, error = program(*arguments), capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error[:-1].isprintable(), (code, error)
        return error
    return refused_program


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.fixture
def tiny(tmp_path):
    """Flags of a run that takes a tenth of a second. Its users walk round a ring of 60 items."""
    events = [f"u{u},i{(7 * u + t) % 60},{t}\n" for u in range(30) for t in range(12)]
    flags = "--d-model 8 --batch-size 8 --lr 0.02 --dropout 0.1 --seed 3".split()
    return ["--data", write(tmp_path / "toy.csv", "user,item,time\n" + "".join(events)), *flags]


def report_in(folder):
    return json.loads((folder / "metrics.json").read_text())


def dataset(items, offsets, V):
    ids, users = ["", *map(str, range(1, V + 1))], [str(u) for u in range(len(offsets) - 1)]
    return reader.Dataset("toy", np.array(items), np.array(offsets), users, ids, ids, "digest")


# ---------------------------------------------------------------------------------------------
# The grader

EDITS = [(name, piece, replacement, f"\n  hint: {sentence}\n")
         for name, mistakes in MISTAKES.items() for sentence, piece, replacement in mistakes]
EDITS += [  # likewise: a function, a piece of its source, what stands in its place, what is said
    ("gelu_backward", "return ", "", "returned nothing"),
    ("linear_backward", ", dout.sum(0)", "", "returned 2 value"),
    ("linear_backward", "dout.sum(0)", "dout", "the sum over the rows"),
    ("linear_backward", "dout @ W.T, x.T @ dout", "x.T @ dout, dout @ W.T", "yours is dW"),
    ("linear_backward", "x.T @ dout", "dout.T @ x", "yours is transposed"),
    ("linear_backward", "dout.sum(0)", "dout.sum(0).astype('f4')", "is float32"),
    ("linear_backward", "dout.sum(0)", "dout.sum(0) * xp.nan", "not finite"),
    ("linear_backward", "dout @ W.T", "3 * dout @ W.T", "yours is 3 times"),
    ("linear_backward", "dout @ W.T", "1.00001 * dout @ W.T", "right to 5 digits"),
    ("linear_backward", "return", "x *= 2; return", "changed x, which"),
    ("dropout_backward", "dout * mask",
     "xp.multiply(dout, mask, out=globals().setdefault('kept', +dout))", "by the next call"),
    ("block_backward", "return dx, dp", "return dx, {}", "Missing: ['f"),
    ("step", "as_ids(params, items)", "as_ids(params, items % 8)", "raise ValueError for id 8"),
    ("scan", "if starts[1:]", "starts = starts & False\n    if starts[1:]", "missing: the walls"),
    ("scan", "N, a =", "for n in range(math.isqrt(len(u))): pass\n    N, a =", "Python executes"),
    ("scan", "N, a =", "xp.ones((len(u), len(u)), bool)\n    N, a =", "the memory of h")]


@pytest.mark.parametrize("name, piece, replacement, said", EDITS)
def test_a_usual_mistake_and_any_other_is_refused_with_its_sentence(name, piece, replacement, said):
    count = source_of(name).count(piece)
    assert count == 1, f"MISTAKES of {name}: {piece!r} occurs {count} times in our source"
    with pytest.raises(Wrong) as found:
        grade(name, mistaken(name, piece, replacement))
    assert said in f"{found.value}\n"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A function that writes our own answer into answers/; lrurec is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(globals(), "STEPS", 10)
    os.mkdir(FOLDER)
    for name in IN_TRAINING:
        monkeypatch.setattr(lrurec, name, ours(name))

    def solve(exercise, more=""):
        sources = [inspect.getsource(ours(name)) for name in EXERCISES[exercise].functions]
        text = "\n".join([exercise_text(exercise), "from lrurec import *", *sources, more])
        Path(path_of(exercise)).write_text(text)
    return solve


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_file_withholds_its_formula_and_with_our_answer_is_right(exercise, answers):
    text = exercise_text(exercise)
    assert formula(EXERCISES[exercise]) not in text and "Derivative:" not in text
    assert text.isascii() and max(map(len, text.splitlines())) <= 2 + 100
    answers(exercise)
    assert grade_file(path_of(exercise)) == "right"


def test_the_list_grades_what_is_there_and_says_what_is_next(answers, capsys):
    answers("gelu")
    answers("lam", "def lam_backward(dlam, cache):\n    raise KeyboardInterrupt")
    assert main(["linear"]) == 0 and main([]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"(\S+) +\d+ +\S+ +(\w+)\n", out) == [
        ("linear", "empty"), ("gelu", "right"), ("lam", "stopped")]
    assert out.endswith("1 of 18 right. Next:\n    python test_lrurec.py differences\n")


def test_an_error_in_an_answer_is_python_s_traceback_cut_to_its_file(answers, capsys):
    answers("dropout", "def dropout_backward(dout, mask):\n    return dout * maks")
    assert main(["dropout"]) == 1
    out = capsys.readouterr().out
    assert out.count("  File ") == out.count(f'  File "{path_of("dropout")}", line ') == 1
    assert out.endswith("NameError: name 'maks' is not defined\n"
                        "(in a call of your dropout_backward for p = 0.4)\n")


@pytest.mark.parametrize("dout, code, said", [
    ("dout", 0, "|lam| = 1"), ("-dout", 1, "A falling loss proves nothing")])
def test_a_training_shows_both_curves_right_or_wrong(dout, code, said, answers, capsys):
    for exercise in ("model", "block"):            # which call the learner's own lru_backward
        answers(exercise)
    answers("lru", "ours = lru_backward\n"
                   f"def lru_backward(dout, cache):\n    return ours({dout}, cache)")
    assert main(["train", "model", "block", "lru"]) == code
    out = capsys.readouterr().out
    assert "in the model: lru_backward, block_backward, backward\n" in out and said in out
    curves = re.findall(r"^ +\d+ +(\S+) +(\S+) +[ox* ]+$", out, re.M)
    assert [ours == yours for ours, yours in curves] == [True, code == 0]


@pytest.mark.parametrize("words, said", [
    ("gelu lam --hint", "nu_log change by"), ("gelu --formula", "dx = dout"),
    ("no_such", "'no_such' is neither a"), ("no.py", "there is no no.py"),
    ("--hint", "go with an exercise"), ("gelu --ml-100k", "goes with train"),
    ("train", "there is no exercise in"), ("train --ml-100k gelu", "there is no answers")])
def test_what_a_command_says(words, said, answers, capsys):
    with contextlib.suppress(SystemExit):          # argparse's own
        assert main(words.split()) == 0
    assert said in "".join(capsys.readouterr())


def test_pytorch_gives_the_same_logits_loss_and_gradients():
    pytest.importorskip("torch")
    differences = torch_differences()
    assert max(differences.values()) < 1e-12, differences


# ---------------------------------------------------------------------------------------------
# The model, its optimizer and its file

def test_every_gradient_of_the_whole_model_agrees_with_central_differences(capsys):
    assert check_gradients() < 1e-6
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        "34 tensors, 414 numbers, largest relative error [0-9]e-[01][0-9]", last), last


@pytest.mark.parametrize("factor", [1, 1 + 1e-5, np.nan])
def test_the_check_fails_where_a_gradient_is_off_by_a_hundred_thousandth(factor, monkeypatch):
    _, grads = lrurec.loss_and_grads(
        tiny_params(), *check_batch(), dropout=0.3, rng=np.random.default_rng(7))
    grads["blocks.0.lru.nu_log"] *= factor
    in_order = iter(grads.values())                # in place of differences: they take seconds
    monkeypatch.setitem(globals(), "numeric_gradient", lambda loss, p: next(in_order))
    assert (check_gradients() < 1e-6) == (factor == 1)


def test_step_goes_on_where_encode_stops():
    params, (items, _, starts) = tiny_params(), check_batch()
    hidden, states = lrurec.encode(params, items, starts, return_state=True)
    by_step, ends = [], []
    for segment in np.split(items, np.flatnonzero(starts)):
        state = lrurec.init_state(params)
        for item in segment:
            x, state = lrurec.step(params, state, np.array([item]))
            by_step.append(x[0])
        ends.append(state[:, 0])
    assert relative_error(np.stack(by_step), hidden) < 1e-12
    assert relative_error(np.stack(ends, 1), states) < 1e-12


def test_scan_loop_gives_the_example_in_its_docstring():
    h = lrurec.scan_loop(np.array([0.5j]), np.array([[2], [1], [4 + 0j]]), np.array([0, 0, 1]))
    assert h.ravel().tolist() == [2, 1 + 1j, 4]


def test_all_scans_agree_with_the_loops_for_any_length_and_walls():
    lam, rng = lam_of(3), np.random.default_rng(0)
    for N, share in itertools.product((*range(1, 35), 127, 128, 129), (0, 0.3, 1)):
        u, dh, starts = compl(N, 3), compl(N, 3, seed=2), rng.random(N) < share
        h = lrurec.scan_loop(lam, u, starts)
        for scan in (lrurec.scan, lrurec.scan_recursive):
            given = scan(lam, u, starts)
            assert relative_error(given, h) < 1e-12, (scan.__name__, N)
            assert not np.shares_memory(given, u), "the caller's own array"
        expected = lrurec.scan_backward_loop(dh, lam, h, starts)
        for a, b in zip(lrurec.scan_backward(dh, lam, h, starts), expected):
            assert a.shape == b.shape and relative_error(a, b) < 1e-12, N


def test_float32_stays_accurate_over_a_very_long_history():
    N, lam = 50_000, lam_of(2, 0.99999).astype(np.complex64)
    u, dh, starts = compl(N, 2), compl(N, 2, seed=2), np.zeros(N, bool)
    h = lrurec.scan_loop(lam.astype(complex), u, starts)
    expected = h, *lrurec.scan_backward_loop(dh, lam.astype(complex), h, starts)
    h32 = lrurec.scan(lam, u.astype(lam.dtype), starts)
    given = h32, *lrurec.scan_backward(dh.astype(lam.dtype), lam, h32, starts)
    for a, b in zip(given, expected):              # powers of lam in float32 give errors of 2e-4
        assert a.dtype == np.complex64 and relative_error(a, b) < 2e-5


def test_nothing_passes_a_wall_and_the_future_never_reaches_the_past():
    params, items = tiny_params(), np.array([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4])
    integers = STARTS.astype(int).tolist()         # may be given too
    hidden, segment = lrurec.encode(params, items, integers), np.cumsum(STARTS)
    for n in range(11):
        changed = items.copy()
        changed[n] = items[n] % 7 + 1
        moved = (lrurec.encode(params, changed, STARTS) != hidden).any(1)
        expected = (segment == segment[n]) & (np.arange(11) >= n)
        assert moved.tolist() == expected.tolist(), n


@pytest.mark.parametrize("max_phase", [1, 0.2])
def test_eigenvalues_start_uniformly_on_their_part_of_the_ring(max_phase):
    params = lrurec.init_params(50, 32, 2000, rng=np.random.default_rng(0), max_phase=max_phase)
    for p in lrurec.blocks(params):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        area = (abs(lam) ** 2 - 0.8 ** 2) / (0.99 ** 2 - 0.8 ** 2)
        turn = np.angle(lam) % (2 * math.pi) / (2 * math.pi * max_phase)
        for uniform in (area, turn):
            assert np.quantile(uniform, [0.25, 0.5, 0.75]) == pytest.approx(
                [0.25, 0.5, 0.75], abs=0.04)
            assert [uniform.min(), uniform.max()] == pytest.approx([0, 1], abs=0.01)
        assert np.exp(2 * p["lru.gamma_log"]) == pytest.approx(1 - abs(lam) ** 2, rel=1e-3)


def test_sizes_and_phases_are_the_published_ones_in_single_precision():
    params = lrurec.init_params(6)
    assert params["item_embedding"].shape == (7, 64) and len(lrurec.blocks(params)) == 2
    assert params["blocks.1.lru.C"].shape == (128, 64) and params["blocks.1.ffn.b1"].shape == (256,)
    assert 0.9 < np.exp(params["blocks.0.lru.theta_log"]).max() / (2 * math.pi) <= 1
    assert {name.rpartition(".")[2] for name, p in params.items() if p.dtype == np.complex64} == {
        "B", "b_B", "C"}
    assert {p.dtype for p in params.values()} == {np.dtype("f4"), np.dtype("c8")}


def test_gelu_is_within_5e_4_of_the_exact_one():
    x = np.linspace(-6, 6, 241)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert abs(lrurec.gelu_forward(x)[0] - exact).max() < 5e-4


def test_score_against_its_definition_and_nobody_is_recommended_nothing():
    params, hidden = tiny_params(), real(2, 3, 4)
    expected = np.einsum("ijd,vd->ijv", hidden, params["item_embedding"]) + params["output_bias"]
    scores = lrurec.score(params, hidden)
    assert (scores[..., 0] == -np.inf).all()
    assert relative_error(scores[..., 1:], expected[..., 1:]) < 1e-12


NO_ITEMS = r"integers in 0\.\.7, one or more"


@pytest.mark.parametrize("ids, message", [
    ([-1, 1], NO_ITEMS), ([8, 1], NO_ITEMS), ([1.0, 2.0], NO_ITEMS), ([True, False], NO_ITEMS),
    ([], NO_ITEMS), ([1], "reshape"), ([1, 2, 3], "reshape")], ids=str)
def test_ids_that_are_no_items_or_too_few_or_too_many_are_refused(ids, message):
    params, two, walls = tiny_params(), [1, 2], np.ones(2, bool)
    for function, *arguments in ((lrurec.encode, ids, walls),
                                 (lrurec.step, lrurec.init_state(params, 2), ids),
                                 (lrurec.loss_and_grads, two, ids, walls),
                                 (lrurec.loss_and_grads, ids, two, walls),
                                 (lrurec.loss_and_grads, ids, ids, walls)):
        with pytest.raises(ValueError, match=message):
            function(params, *arguments)


@pytest.mark.parametrize("rows, logits, sizes", [
    (256, 2 ** 26, [37]), (10, 2 ** 26, [10, 10, 10, 7]), (256, 60, [10, 10, 10, 7]),
    (256, 1, 37 * [1])])
@pytest.mark.parametrize("scale, n_targets", [(1, 37), (1e4, 37), (1, 1), (1, 0)])
def test_the_loss_and_its_gradients_by_their_definition_in_chunks_of_any_size(
        rows, logits, sizes, scale, n_targets, monkeypatch):
    hidden, E, bias = scale * real(37, 3), real(6, 3), scale * (real(6) - 100)
    targets = np.random.default_rng(0).integers(0, 6, 37)         # where 0, the row has no loss
    targets[n_targets:] = 0
    weights = (targets > 0) / max(1, np.count_nonzero(targets))
    z = hidden @ E.T + bias
    log_softmax = z - np.logaddexp.reduce(z, 1, keepdims=True)
    dz = weights[:, None] * (np.exp(log_softmax) - np.eye(6)[targets])
    expected = (-weights @ log_softmax[np.arange(37), targets], dz @ E, dz.T @ hidden, dz.sum(0))
    forward = Mock(wraps=lrurec.cross_entropy_forward)
    monkeypatch.setattr(lrurec, "cross_entropy_forward", forward)
    monkeypatch.setattr(lrurec, "ROWS_PER_CHUNK", rows)
    monkeypatch.setattr(lrurec, "LOGITS_PER_CHUNK", logits)
    for given, right in zip(lrurec.output_loss(hidden, E, bias, targets), expected):
        assert relative_error(given, right) < 1e-9
    assert [len(call.args[0]) for call in forward.mock_calls] == sizes


def test_chunks_are_small_enough_for_a_million_items():
    assert 2 ** 24 <= lrurec.LOGITS_PER_CHUNK <= 2 ** 27, "in float32, 64 to 512 MB"


@pytest.mark.parametrize("p, n_dropped", [(0.3, 77), (0.75, 192), (0.001, 0), (0.9999, 255)])
def test_dropout_rounds_its_rate_to_256ths_and_keeps_the_expectation(p, n_dropped):
    out, _ = lrurec.dropout_forward(np.ones((1001, 999)), p, np.random.default_rng(0))
    assert set(np.unique(out)) <= {0, 256 / (256 - n_dropped)}
    assert (out == 0).mean() == pytest.approx(n_dropped / 256, abs=0.002 * p)


def everything(params, items, targets, starts):
    """All that the model's functions return for a batch."""
    loss, grads = lrurec.loss_and_grads(params, items, targets, starts)
    hidden, state = lrurec.encode(params, items, starts, return_state=True)
    x, stepped = lrurec.step(params, state, np.arange(1, 1 + state.shape[1]))
    return [loss, *grads.values(), hidden, state, x, stepped, lrurec.score(params, x)[:, 1:]]


def batch_of(N):
    rng = np.random.default_rng(0)
    return rng.integers(0, 41, N), rng.integers(0, 41, N), rng.random(N) < 0.1


def test_float32_agrees_with_float64():
    params = tiny_params(n_items=40)
    single = {name: p.astype(np.complex64 if np.iscomplexobj(p) else np.float32)
              for name, p in params.items()}
    for a, b in zip(everything(single, *batch_of(200)), everything(params, *batch_of(200))):
        assert a.dtype == (np.complex64 if np.iscomplexobj(b) else np.float32)
        assert relative_error(a, b) < 1e-4


def test_three_steps_of_adamw_by_its_equations():
    """One decayed complex entry, z = x + iy, as two real numbers; with the default betas and eps"""
    params, lr, decay = {"blocks.0.lru.C": np.array([[0.3 - 0.4j]])}, 0.1, 0.5
    opt, m, v = lrurec.adamw_init(params), np.zeros(2), np.zeros(2)
    p = np.array([0.3, -0.4])
    for t, g in enumerate((1e-9 + 2j, -3e-9 + 1j, 2e-9 + 0j), 1):
        lrurec.adamw_update(params, {"blocks.0.lru.C": np.array([[g]])}, opt, lr, decay)
        m = 0.9 * m + 0.1 * np.array([g.real, g.imag])
        v = 0.999 * v + 0.001 * np.array([g.real, g.imag]) ** 2
        p = p * (1 - lr * decay)
        p = p - lr * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-9)
        assert params["blocks.0.lru.C"].view(float)[0] == pytest.approx(p, rel=1e-12), t
    assert opt["step"] == 3


def test_biases_and_norms_do_not_decay():
    params = tiny_params()
    before, grads = copy.deepcopy(params), {name: 0 * p for name, p in params.items()}
    lrurec.adamw_update(params, grads, lrurec.adamw_init(params), 0.1, 0.5)
    shrunk = {name.split(".", 2)[-1] for name in params if (params[name] != before[name]).any()}
    assert shrunk == {"item_embedding", "lru.nu_log", "lru.theta_log", "lru.gamma_log", "lru.B",
                      "lru.C", "ffn.W1", "ffn.W2"}


@pytest.mark.parametrize("max_norm, factor", [(10, 1), (1, 1 / (5 + 1e-6))])
def test_gradients_are_clipped_by_their_norm_over_all_arrays(max_norm, factor):
    grads = {"a": np.array([3.0, 0]), "b": np.array([4j])}
    assert lrurec.clip_gradients(grads, max_norm) == pytest.approx(5)
    assert grads["a"][0] == 3 * factor and grads["b"][0] == 4j * factor


def test_pickled_objects_are_not_loaded(tmp_path):
    lrurec.save(tmp_path / "m.npz", {"p": np.array([{}])})
    with pytest.raises(ValueError, match="m.npz is not a model file"):
        lrurec.load(tmp_path / "m.npz")


# ---------------------------------------------------------------------------------------------
# Data

# Every right file says: user 1 saw item 10, then 11; user 2 saw 10
EVENTS = "1,11,200\n1,10,100\n2,10,50\n"
PLAIN = "user,item,time\n" + EVENTS
RIGHT_FILES = {  # content, then columns and delimiter where they are given
    "gzip": [gzip.compress(PLAIN.encode())],
    "usual names in any case": ["reviewerID,Movie Id,unix_review-time\n" + EVENTS],
    **{f"delimiter {text!r}": [PLAIN.replace(",", text)] for text in ("\t", "::", ";", "|", " ")},
    "by number, the item first": ["11::1::5.0::200\n10::1::4.0::100\n10::2::1.0::50\n", "2,1,4"],
    "by name": ["when,what,x,who\n200,11,,1\n100,10,,1\n50,10,,2\n", "who,what,when"],
    "one time of a usual name": ["user,item,clock,date\n1,11,7,200\n1,10,8,100\n2,10,9,50\n"],
    "no time, the order of lines": ["user,item\n1,10\n2,10\n1,11\n"],
    "blanks, several and at the ends": ["1 11  200 \n1 10 100\n2 10 50 \n", "1,2,3"],
    "BOM, CRLF, blank lines, quotes": ['\ufeff\r\nuser, item ,time,x\r\n1, "11",200,"a, b"\r\n\r\n'
                                       ' , \r\n"1",10,100,\r\n2,10,"50",c'],
    "quotes in tab-separated titles": [
        'user\titem\ttime\ttitle\n1\t11\t200\t"Heroes\n1\t10\t100\tMix 12"\n2\t10\t50\tb\n'],
    "two delimiters, one has the names": ["user,item,time,a|b\n1,11,200,\n1,10,100,\n2,10,50,\n"],
    "two delimiters, one is given": ["1;10;3,5\n1;11;4,0\n2;10;2,5\n", "1,2", ";"],
    "numbers as times": ["user,item,time\n1,11,2e2\n1,10,100.5\n2,10,-7\n"],
    "dates as times": ["user,item,time\n1,11,2024-05-01 12:30:00.1\n1,10,2024-05-01T14:30+02:00 \n"
                       "2,10,2024-05-01 12:00 UTC\n"]}


@pytest.mark.parametrize("name", RIGHT_FILES)
def test_every_right_file_gives_the_same_data(name, tmp_path):
    content, *given = RIGHT_FILES[name]
    path = write(tmp_path / ("f.gz" if name == "gzip" else "f"), content)
    data = reader.load_dataset(path, 0, **dict(zip(["columns", "delimiter"], given)))
    assert (data.user_ids, data.item_ids) == (["1", "2"], ["", "10", "11"])
    assert data.items.tolist() == [1, 2, 1] and data.offsets.tolist() == [0, 2, 3]
    numbers = np.array([1, 2, 1] + [0, 2, 3], "<i8").tobytes()
    assert data.digest == hashlib.sha256(numbers + b"\x0010" + b"\x0011").hexdigest()


WRONG_FILES = {  # content, what the message says, and the columns where they are given
    "empty": ("\n \n", "f is empty"), "a header alone": ("user,item\n", "a header but no events"),
    "no header": ("1,10,9\n", "line 1: no header .*1 '1', 2 '10', 3 '9'. Give --columns USER,ITEM"),
    "a header without a time": ("user,item,is_read\n1,2,1\n", "no column has .* the time.*'is_"),
    "two times": ("user,item,date,time_ms\n1,2,3,4\n", "several .* time: 'date', 'time_ms'"),
    "number 0": ("0,1\n0,2\n", "no column 0: they are numbered from 1", "0,1"),
    "a header by number": ("item,x\n1,2\n", "'item' looks like a header, but by number", "2,1"),
    "another header by number": ("who,what,when\n1,2,3\n", "'when'.*is a header, give", "1,2,3"),
    "two delimiters": ("u;a;3,5\n", "at ',' or ';': give one as --delimiter.*u;a;3,5'", "1,2"),
    "few fields": ("a,b,x\n1,2,\n1,2\n", "line 3: 2 fields, but the first line has 3", "a,b"),
    "an empty field too many": ("a,b,x\n1,2,\n1,R, T,\n", "line 3: 4 .*stands in quotes", "a,b"),
    "the header again": ("who,what\n1,2\nwho,what\n", "line 3: a header again, 'who'", "who,what"),
    "a usual header below": ("1,2\nItem_ID,userId\n", "line 2: a header again", "1,2"),
    "a quote over lines": ('time,user,item\n1,1,2\n"2,1,3\n3",1,4\n', "line 3: .*check its quotes"),
    "text after a quote": ('user,item\n1,"2"x\n', "line 2: .*check its quotes"),
    "an id that begins with a quote": ('user,item\n1,"""2"""\n', "line 2: the id '\"2\"' holds"),
    "a quote in an id between tabs": ('1\t2\n1\t12"\n', "line 2: the id '12\"' holds", "1,2"),
    **{f"id {raw!r}": (f"user,item,time\n1,{raw},3\n", "line 2: .* marks a missing value")
       for raw in ("", "NaN", "null", "None", "N/A", "\\N")},
    **{f"time {raw!r}": (f"user,item,time\n1,2,3\n1,4,{raw}\n", "line 3: the time .*finite numbers")
       for raw in ("nan", "inf", "1_0", "", "2024-05-01")},
    "another date": ("user,item,time\n1,2,01/02/2019\n", "line 2: the time.*to_datetime.*format="),
    "nobody left": ("1,4\n", "nobody is left with 5 .*--min-count.*item from column 2", "1,2"),
    "Latin-1": (b"user,item\n1,Caf\xe9\n", "cannot be read .'utf-8' codec.*in UTF-8"),
    "gzip, cut off": (gzip.compress(PLAIN.encode())[:-9], "cannot be read .*its name ends in .gz")}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_every_wrong_file_is_refused_in_a_line_with_its_path(name, tmp_path):
    content, message, *columns = WRONG_FILES[name]
    path = write(tmp_path / ("f.gz" if name.startswith("gzip") else "f"), content)
    with pytest.raises(reader.DataError, match=message) as error:
        reader.load_dataset(path, columns=columns[0] if columns else None)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_an_item_without_a_title_has_its_id(tmp_path):
    path = write(tmp_path / "f", PLAIN)
    # The titles' first line has both names if it is divided at commas, too
    titles = write(tmp_path / "t", "item|title|x,item,title\n10|Rock, The|y\n11| |\n\n12|Other|\n")
    data = reader.load_dataset(path, 0, titles=titles, delimiter="|")
    assert data.titles == ["", "Rock, The", "11"]
    assert data.report[-1] == "titles: for 1 of 2 items"


def test_the_report_says_what_was_read_and_dropped(tmp_path):
    path = write(tmp_path / "f", "user,iid,ts\n1,10,2001-09-08\n1,9,2001-09-09\n1,8,2001-09-09\n"
                                 "1,9,2001-09-10\n1,7,2001-09-11\n1,9,2001-09-12\n2,9,2001-09-12\n"
                                 "2,10,2001-09-13\n2,8,2001-09-14T03:46+02:00\n"
                                 "3,5,2002-01-01\n3,8,2002-01-01\n4,8,2002-01-01\n5,8,2002-01-01\n")
    assert reader.load_dataset(path, min_count=2).report == (
        "columns: user from user, item from iid, time from ts",
        "first event: '1', '10', '2001-09-08'",
        f"{path}: 2 users, 3 items, 7 events from 2001-09-08 00:00 to 2001-09-14 01:46",
        "dropped: 1 repeats; 2 events of items and 3 events of users with fewer than 2",
        "20% of events have the same time as their user's previous event",
        "1 of 2 test items are already in their user's history: they count as misses without "
        "--rank-seen")


def test_times_that_look_like_seconds_or_milliseconds_are_shown_as_dates():
    assert reader.dates(1334448000, 1334534400) == ["2012-04-15 00:00", "2012-04-16 00:00"]
    assert reader.dates(1334448000000, 1334534400000) == ["2012-04-15 00:00", "2012-04-16 00:00"]
    assert reader.dates(20120415.0, 1334448000.0) == ["20120415", "1334448000"]


@pytest.mark.parametrize("raw_ids, ascending", [
    ("10 9 1", "1 9 10"), ("b 10 9", "10 9 b"), ("1 01", "01 1"), ("10.0 9.5 1", "1 9.5 10.0"),
    ("09007199254740993 9007199254740992", "9007199254740992 09007199254740993"),
    ("用户 c::d José", "José c::d 用户")])
def test_ids_ascend_as_numbers_where_all_are_numbers(raw_ids, ascending, tmp_path):
    lines = ["user,item", *(f"{raw},{raw}" for raw in raw_ids.split())]
    data = reader.load_dataset(write(tmp_path / "f", "\n".join(lines)), 0)
    assert data.item_ids[1:] == data.user_ids == ascending.split()


# User 0's second 7 at time 5 is dropped, and the second of user 2's two x in a row; then x, which
# has one event left; then user 2, who has 9 alone. So 9 has one event left, and stays: 10 events.
# Ids are in order of text, since x is no number: 10, 6, 7, 8, 9 are 1, 2, 3, 4, 5
TIED = ("user,item,time\n2,x,3\n0,9,5\n0,7,5\n0,8,5\n0,6,5\n0,10,4\n0,10,6\n1,10,1\n1,8,2\n1,7,3\n"
        "1,6,4\n0,7,5\n2,9,6\n2,x,4\n")
DRAWN = np.argsort(np.random.default_rng(2).permutation(10)[:4])


@pytest.mark.parametrize("ties, items", [
    ("item", [2, 3, 4, 5]), ("file", [5, 3, 4, 2]), ("random", [[5, 3, 4, 2][k] for k in DRAWN])])
def test_repeats_and_rare_ids_are_dropped_and_ties_are_ordered(ties, items, tmp_path):
    data = reader.load_dataset(write(tmp_path / "f", TIED), 2, ties, seed=2)
    assert data.item_ids == ["", "10", "6", "7", "8", "9"] and data.user_ids == ["0", "1"]
    assert data.items.tolist() == [1, *items, 1] + [1, 4, 3, 2]
    assert data.offsets.tolist() == [0, 6, 10]


# Items 1 to 14, in histories of 7, 2, 3 and 2 events
FOUR_USERS = dataset(range(1, 15), [0, 7, 9, 12, 14], 14)


def test_training_rows_by_hand():
    rows = reader.training_rows(FOUR_USERS, max_len=2)
    assert rows.items.tolist() == [0, 1, 2, 3, 4, 0, 8, 0, 0, 13]
    assert rows.targets.tolist() == [1, 2, 3, 4, 5, 8, 9, 10, 13, 14]
    assert rows.starts.tolist() == [1, 1, 0, 1, 0, 1, 1, 1, 1, 1]
    assert rows.windows.tolist() == [0, 1, 3, 5, 7, 8, 10]
    assert reader.training_rows(FOUR_USERS).windows.tolist() == [0, 5, 7, 8, 10]


def test_histories_by_hand():
    histories, truth = reader.histories(FOUR_USERS, "test", max_len=3)
    assert [h.tolist() for h in histories] == [[4, 5, 6], [10, 11]] and truth.tolist() == [7, 12]
    histories, truth = reader.histories(FOUR_USERS, "validation")
    assert [h.tolist() for h in histories] == [[1, 2, 3, 4, 5], [10]] and truth.tolist() == [6, 11]
    histories = reader.full_histories(FOUR_USERS, max_len=3)
    assert [h.tolist() for h in histories] == [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]
    with pytest.raises(ValueError, match="split must be 'validation' or 'test' .got 'train'"):
        reader.histories(FOUR_USERS, "train")


def zip_of(files):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive.getvalue()


# In each of these archives user 1 saw item 1 at 5 s and item 2 at 4 s; two titles are in Latin-1
GROUPLENS = {"ml-100k/u.data": "1\t1\t3\t5\n1\t2\t3\t4\n",
             "ml-100k/u.item": b"2|Caf\xe9 (1990)|1-Jan-1990|\n1|unknown||\n"}
ML_1M = {"ml-1m/ratings.dat": "1::1::3::5\n1::2::3::4\n",
         "ml-1m/movies.dat": b"2::Caf\xe9 (1990)::x|y\n1::unknown::x\n"}
COPY = "recbole/dataset_example/ml-100k/ml-100k"
RECBOLE = {COPY + ".inter": "user_id:token\titem_id:token\ttimestamp:float\n1\t1\t5\n1\t2\t4\n",
           COPY + ".item": "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
                           "1\tunkonwn\t\n2\tCafé\t1990\n"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder that is not there yet, and a pip that gives RecBole's copy"""
    def pip(command, **_):
        write(Path(command[command.index("--dest") + 1], "recbole.whl"), zip_of(RECBOLE))
        return subprocess.CompletedProcess(command, 0)

    two_events = np.array([1, 1, 5, 1, 2, 4], "<i8")              # user, item, time
    monkeypatch.setattr(reader, "ML_100K_EVENTS", hashlib.sha256(two_events).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("LRUREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name, answer, said", [
    ("ml-100k", zip_of(GROUPLENS), "movielens/ml-100k.zip"),
    ("ml-1m", zip_of(ML_1M), "movielens/ml-1m.zip"),
    ("ml-100k", b"<html>log in", "with pip"), ("ml-100k", zip_of({}), "with pip"),
    ("ml-100k", zip_of({**GROUPLENS, "ml-100k/u.data": "1\t2\t3\t4\n"}), "with pip"),
    ("ml-100k", OSError("no route"), "no route; fetching the copy in recbole==1.2.1 with pip"),
    ("ml-100k", http.client.IncompleteRead(b""), "with pip")],
    ids=["GroupLens", "ML-1M", "no archive", "no members", "other events", "no route", "cut off"])
def test_every_archive_gives_the_same_data_and_is_fetched_once(name, answer, said, cache, capsys):
    opener = Mock(side_effect=[io.BytesIO(answer) if isinstance(answer, bytes) else answer])
    reader.read_movielens(name, opener)
    data = reader.load_dataset(name, 0)            # out of the cache
    assert os.listdir(cache) == [f"{name}.zip"]
    assert data.user_ids == ["1"] and data.items.tolist() == [2, 1]
    assert data.titles == ["", "unknown", "Café (1990)"]
    assert data.report[0] == f"{name}: 1 users, 2 items, 2 events from 4 to 5"
    assert capsys.readouterr().err.endswith(said + "\n")
    write(cache / f"{name}.zip", "cut off")
    with pytest.raises(reader.DataError, match="zip: not an archive .*delete it"):
        reader.load_dataset(name)


def test_where_both_fail_nothing_is_kept_and_the_way_by_hand_is_shown(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "first\nno network\n")
    monkeypatch.setattr(subprocess, "run", Mock(return_value=failed))
    with pytest.raises(reader.DataError, match="cannot be fetched .*no route; pip: no n") as error:
        reader.read_movielens("ml-100k", Mock(side_effect=OSError("no route")))
    assert str(error.value).endswith(f"ml-100k.zip by hand and put it at {cache / 'ml-100k.zip'}")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(cache, capsys):
    write(cache, "a file where the folder should be")
    events, _ = reader.read_movielens("ml-1m", lambda url, timeout: io.BytesIO(zip_of(ML_1M)))
    assert events.times.tolist() == [5, 4] and "ml-1m is not kept" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Settings, the command line, evaluation

@pytest.mark.parametrize("settings, message", [
    ({"epohcs": 3}, "no setting 'epohcs': choose from"), ({"epochs": None}, "got None"),
    ({"lr": math.nan}, "--lr must be a number >= 0.0 .got nan."), ({"lr": math.inf}, "got inf"),
    ({"dropout": 1}, "--dropout must be a number from 0.0 to 0.99 .got 1."),
    ({"max_len": 10 ** 20}, "--max-len must be an integer from 1 to 2147483647 .got 1000000"),
    ({"rank_seen": "no"}, "--rank-seen must be True or False .got 'no'"),
    ({"data": "ml100k"}, "ml100k is not a file; known by name are ml-100k and ml-1m"),
    ({"ties": "no"}, "ties must be one of item, file, random .got 'no'"),
    ({"columns": "user"}, "--columns USER,ITEM.,TIME. must be different names .*got 'user'"),
    ({"columns": "a,,b"}, "got 'a,,b'"), ({"columns": "a,a:token"}, "must be different"),
    ({"data": "ml-100k", "columns": "1,2"}, "the columns of ml-100k are known"),
    ({"title_columns": "1,2"}, "--title-columns are those of --titles"),
    ({"titles": "f"}, "f, line 1: no header names .* title.*3 'time'. Give --title-columns"),
    ({"titles": "f", "title_columns": "user,time"}, "f: no title for an item of .*f"),
    ({"delimiter": "::"}, "--delimiter '::' is not in the first line"), ({"delimiter": ""}, "''")])
def test_a_wrong_setting_is_refused(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "f", PLAIN)
    with pytest.raises(reader.DataError, match=message):
        train.load_data(train.configure(**{"data": "f", "min_count": 0, **settings}))


def test_the_shell_hands_over_only_what_was_typed_which_goes_before_what_was_saved():
    words = "--max-len none --lr 0.1 --rank-seen --epochs 7 --ties file".split()
    typed = {"max_len": None, "lr": 0.1, "rank_seen": True, "epochs": 7, "ties": "file"}
    assert train.parse_arguments(words)[1] == typed and train.parse_arguments([])[1] == {}
    saved = {"max_len": None, "epochs": 9, "schedule": "a setting of long ago"}
    assert train.configure(saved, epochs=7) == {**train.DEFAULTS, "max_len": None, "epochs": 7}


def test_the_defaults_are_the_official_protocol_in_load_dataset_too():
    official = {"min_count": 5, "ties": "item", "rank_seen": False}
    assert official.items() <= train.DEFAULTS.items()
    for name, p in inspect.signature(reader.load_dataset).parameters.items():
        assert name == "source" or p.default == train.DEFAULTS[name], name


def test_only_four_settings_of_a_run_may_differ_when_it_is_resumed():
    may_differ = []
    for name, value in train.DEFAULTS.items():
        with contextlib.suppress(reader.DataError):
            train.configure({**train.DEFAULTS, name: "another"}, **{name: value})
            may_differ.append(name)
    assert may_differ == ["data", "epochs", "patience", "threads"]


@pytest.mark.parametrize("words, message", [
    ("--epohcs 3", "unrecognized arguments: --epohcs 3 (see python train.py train --help)"),
    ("--epochs 0", "--epochs must be an integer from 1 to 2147483647 (got 0)"),
    ("--data ../t --columns what,called --min-count 0", "no user has the 3 events of a test"),
    ("--out last.npz", "last.npz exists: choose another --out, continue its run with --resume "),
    ("--resume no", "last.npz: No such file or directory: --resume takes the folder of a run"),
    ("--resume . --lr 7", "--lr is 7.0 here, but it was 0.006 in training: leave it out, or"),
    ("evaluate no", "no: No such file or directory: give the model.npz of a run"),
    ("inspect .", ". is a folder: give "),
    ("inspect last.npz", "last.npz is for --resume alone): give the model.npz of a run"),
    ("compare no", "metrics.json: No such file or directory: give the folders of finished runs"),
    ("recommend model.npz --user u1 --all-users", "give titles or ids, or --user, or --all-users"),
    ("recommend model.npz --top 0 i3", "--top must be an integer >= 1 (got 0)"),
    ("recommend model.npz i3 --data f", "--data goes with --user or --all-users"),
    ("recommend model.npz --user no", "no user 'no' among those of ")])
def test_a_mistake_is_one_line_and_leaves_nothing(words, message, model, refused, monkeypatch):
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(reader, "read_movielens", Mock(side_effect=AssertionError("fetched")))
    files = os.listdir()
    assert message in refused(*words.split()) and os.listdir() == files


@pytest.mark.parametrize("imports, n_warnings", [("numpy, train", 1), ("train, numpy", 0)])
def test_blas_has_one_thread_and_numpy_imported_first_is_a_warning(imports, n_warnings):
    env = {**os.environ, **dict.fromkeys(train.BLAS_THREADS, "4")}
    show = f"import os, {imports}; print({{os.environ[name] for name in train.BLAS_THREADS}})"
    done = subprocess.run([sys.executable, "-c", show], cwd=HERE, env=env, capture_output=True,
                          text=True)
    assert done.stdout == "{'1'}\n" and done.stderr.count("UserWarning: NumPy") == n_warnings


def test_progress_stays_on_one_line_of_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.progress(100 * "x")
    assert capsys.readouterr().err == f"\r{79 * 'x'}\r"


# 40 users with 5 events each, of 60 items: some of them twice
FORTY_USERS = dataset(np.random.default_rng(0).integers(1, 61, 200), range(0, 201, 5), 60)


def rank_by_hand(scores, true, history, rank_seen):
    """Rank of the true item by brute force, over items 1, 2, ..."""
    left_out = set() if rank_seen else set(history)
    others = [v for v in range(1, len(scores)) if v not in left_out and v != true]
    return math.inf if true in left_out else sum(scores[v] >= scores[true] for v in others)


@pytest.mark.parametrize("rank_seen", [False, True])
def test_metrics_are_those_of_ranks_by_brute_force(rank_seen):
    model = train.model_scorer(tiny_params(60))

    def scorer(seen):
        scores = model(seen).round(2)              # so that some tie
        scores[:, 0] = 9                           # "nothing" is never ahead
        return scores

    r = np.array([rank_by_hand(scorer([history])[0], true, history, rank_seen)
                  for _, *history, true in FORTY_USERS.items.reshape(40, 5)])
    values = {"MRR": 1 / (r + 1)}
    for k in (1, 5, 10, 20, 50):
        values[f"Recall@{k}"] = r < k
        values[f"NDCG@{k}"] = np.where(r < k, 1 / np.log2(r + 2), 0)
    errors = {name: np.std(values[name]) / 40 ** 0.5 for name in ("Recall@10", "NDCG@10")}
    table = train.evaluate(scorer, FORTY_USERS, "test", 3, 2, rank_seen)           # two threads
    assert table.pop("users") == 40 and table.pop("error") == pytest.approx(errors)
    assert table == pytest.approx({name: np.mean(each) for name, each in values.items()})


def test_a_scorer_s_array_is_kept_another_shape_is_refused_and_nan_is_ahead_of_nothing():
    table = np.tile(np.arange(61.0), (40, 1))
    train.evaluate(lambda seen: table[:len(seen)], FORTY_USERS, "test")
    assert (table == np.arange(61.0)).all()
    with pytest.raises(ValueError, match=r"here \(16, 61\) \(got \(16, 9\)"):
        train.evaluate(lambda seen: np.zeros((len(seen), 9)), FORTY_USERS, "test")
    nans = train.evaluate(lambda seen: np.full((len(seen), 61), np.nan), FORTY_USERS, "test")
    assert nans["Recall@50"] == 0


@pytest.mark.parametrize("histories", [[], [[1], []], [1, 2], np.array([1, 2])], ids=str)
def test_a_model_scores_only_lists_of_histories(histories):
    with pytest.raises(ValueError, match="a list of histories, each of one item or more"):
        train.model_scorer(tiny_params())(histories)


def test_markov_and_popularity_by_hand():
    items = np.array([1, 2, 3, 1, 1] + [2, 3, 2, 1, 1], np.int8)  # too small for pairs of items
    data = dataset(items, [0, 5, 10], 99)
    scorers = train.baseline_scorers(data)
    assert scorers["popularity"]([[2]])[0, :4].tolist() == [0, 1, 3, 2]
    markov = scorers["Markov"]([data.items[5:6], [3], [1], [1, 2]])
    assert markov[0, :4] == pytest.approx([0, 1 / 7, 3 / 7, 2 + 2 / 7])
    assert markov[1].argmax() == 2 and markov[2].argmax() == 2 and (markov[3] == markov[0]).all()


# ---------------------------------------------------------------------------------------------
# A run, interrupted and resumed

@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a run whose settings differ from the defaults."""
    folder = tmp_path_factory.mktemp("whole")
    events = [f"u{u};i{(u + t) % 40};{t // 3}\n" for u in range(30) for t in range(12)]
    file = write(folder / "f", "who;what;when\nu0;rare;9\nu1;rare;9\n" + "".join(events))
    titles = write(folder / "t", "what;called\ni3;Rock, The (1996)\ni6;Дом\n")
    return ["--data", file, "--titles", titles, *(
        "--columns who,what,when --delimiter ; --title-columns what,called --ties random "
        "--min-count 2 --rank-seen --max-len 7 --epochs 40 --patience 3 --seed 3 --d-model 8 "
        "--batch-size 8 --lr 0.006 --dropout 0.1 --average 0.9 --threads 1").split()]


@pytest.fixture(scope="module")
def model(flags):
    """The model of that run, which patience has ended."""
    run = Path(flags[1]).parent / "run"
    assert program(*flags, "--out", run) == 0
    return run / "model.npz"


def test_the_best_epoch_is_kept_and_patience_ends_the_run(model):
    report = report_in(model.parent)
    recalls = [epoch["Recall@10"] for epoch in report["history"]]
    assert report["epoch"] == recalls.index(max(recalls)) + 1 == len(recalls) - 3 > 1
    steps = train.read_state(model.parent)["opt"]["step"]
    assert steps == 8 * len(recalls), "2 windows a user, 8 in a batch"


def test_report_and_screen_show_the_metrics_of_the_saved_model_and_of_the_baselines(model, capsys):
    assert program("--resume", model.parent) == program("evaluate", model) == 0
    printed, report = capsys.readouterr().out, report_in(model.parent)
    params, _ = train.read_model(model)
    data = reader.load_dataset(report["config"]["data"], 2, "random", 3, "who,what,when",
                               delimiter=";")
    for text in data.report[0], f"best epoch {report['epoch']},", "LRURec, standard error over 30 ":
        assert text in printed
    assert report["data"] == {"name": data.name, "users": 30, "items": 41, "events": 362,
                              "digest": data.digest}
    scorer, baselines = train.model_scorer(params), train.baseline_scorers(data)
    for name, table, scorer, split in (
            ("popularity", report["baselines"]["popularity"], baselines["popularity"], "test"),
            ("Markov", report["baselines"]["markov"], baselines["Markov"], "test"),
            ("LRURec", report["test"], scorer, "test"), ("test", report["test"], scorer, "test"),
            ("validation", report["validation"], scorer, "validation")):
        assert table == train.evaluate(scorer, data, split, 7, rank_seen=True)
        numbers = "".join(f"{table[metric]:10.4f}" for metric in train.SHOWN)
        assert f"\n{name:10}{numbers}\n" in printed


# The loss of each of ten epochs, four steps of AdamW each. Made by
#     python -m pytest -s -k golden
GOLDEN = [2.49980672, 2.47654314, 2.47012252, 2.46080889, 2.44704824,
          2.42950911, 2.43598473, 2.42642701, 2.3880002, 2.40615824]


def test_a_training_in_float64_gives_the_golden_losses(tmp_path, monkeypatch):
    events = [f"{u},{(u + t * t) % 11},{t}\n" for u in range(12) for t in range(9)]
    config = train.configure(
        data=write(tmp_path / "golden.csv", "user,item,time\n" + "".join(events)), max_len=5,
        d_model=4, n_blocks=1, max_phase=0.5, dropout=0.3, lr=0.02, weight_decay=0.5,
        batch_size=6, epochs=10, seed=1)
    monkeypatch.setattr(lrurec, "init_params", functools.partial(lrurec.init_params, dtype=float))
    monkeypatch.setattr(train, "MAX_NORM", 0.5)    # so that most gradients are clipped
    state = train.fit(train.load_data(config), config, tmp_path)
    losses = [round(epoch["loss"], 8) for epoch in state["history"]]
    print(losses)
    assert losses == pytest.approx(GOLDEN, abs=1e-6)


@pytest.mark.parametrize("n_rows, walls, cuts", [
    (1000, [400, 590], [590]), (5900, [100, 2000, 3000], [3000]), (9000, [], []),
    (6100, [100, 1500, 1600, 3000, 3110, 4000, 5000], [1500, 3000, 5000])])
def test_shards_are_cut_at_the_walls_nearest_to_equal_parts(n_rows, walls, cuts):
    rows = np.arange(n_rows)
    batch = rows, rows + 1, np.isin(rows, walls)
    parts = train.shards(*batch)
    assert [items[0] for items, _, _ in parts] == [0, *cuts]
    for whole, *cut in zip(batch, *parts):
        assert (np.concatenate(cut) == whole).all()


@pytest.mark.parametrize("average", [0, 0.3])
def test_the_model_is_the_running_mean_over_all_steps(average, tiny, tmp_path, monkeypatch):
    config = train.configure(data=tiny[1], d_model=4, batch_size=8, lr=0.2, average=average)
    data = train.load_data(config)
    mean, real_update = train.new_state(data, config)["model"], lrurec.adamw_update

    def update(params, grads, opt, *numbers):
        real_update(params, grads, opt, *numbers)
        d = min(average, (1 + opt["step"]) / (10 + opt["step"]))
        for name, p in params.items():
            mean[name] = d * mean[name] + (1 - d) * p

    monkeypatch.setattr(lrurec, "adamw_update", update)
    for epochs in (1, 2):
        state = train.fit(data, {**config, "epochs": epochs}, tmp_path, resume=epochs == 2)
        assert all(relative_error(state["model"][name], m) < 1e-6 for name, m in mean.items())


def end_of(run):
    """All that came out of a run but its seconds: the history, and the bits of all arrays."""
    history = [{**epoch, "seconds": 0} for epoch in report_in(run)["history"]]
    files = [lrurec.load(run / name)[0] for name in ("model.npz", "last.npz")]
    return history, [array.tobytes() for arrays in files for array in arrays.values()]


ENDS = {  # of a run in its second epoch: module, name, what stands there instead; what is said
    "Ctrl-C between the two files": (
        lrurec, "save", Mock(wraps=lrurec.save, side_effect=[DEFAULT, KeyboardInterrupt]),
        "interrupted; completed epochs are saved, continue with: "),
    "no memory": (lrurec, "clip_gradients", Mock(side_effect=MemoryError), "out of memory: lower"),
    "nan in loss and weights": (train, "MAX_NORM", np.nan, "not finite in epoch 2: lower --lr"),
    "nan in the scores": (lrurec, "score", Mock(return_value=np.full((1, 2), np.nan)),
                          "scores are not finite: train with a lower --lr"),
    "a full disk": (np, "savez", Mock(side_effect=OSError(errno.ENOSPC, "No space left")),
                    "run cannot be written (No space left)")}


@pytest.mark.parametrize("module, name, value, message", ENDS.values(), ids=ENDS)
def test_a_run_that_ends_in_an_epoch_keeps_those_before_and_goes_on(
        module, name, value, message, flags, model, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert program(*flags, "--epochs", 1, "--out", run) == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, name, value)
        assert program("--resume", run, "--epochs", 40) == (130 if name == "save" else 2)
    assert message in capsys.readouterr().err
    metrics = [] if name in ("save", "savez") else ["metrics.json"]    # gone before a new model
    assert sorted(os.listdir(run)) == ["last.npz", *metrics, "model.npz"]
    assert len(train.read_state(run)["history"]) == 1
    assert program("--resume", run, "--epochs", 40, "--threads", 3) == 0
    assert end_of(run) == end_of(model.parent), "neither the end nor the threads change a bit"


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("how, code", [("SIGKILL", -9), ("SIGINT", 130), ("closed pipe", 2)])
def test_a_process_that_is_ended_goes_on_to_the_same_bits(how, code, flags, model, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job ignores it
    run = tmp_path / "the run"
    command = [sys.executable, "train.py", *flags, "--threads", "2", "--out", str(run)]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert any("run in" in line for line in process.stdout)       # it can now be resumed
        if how == "closed pipe":
            process.stdout.close()
        else:
            process.send_signal(getattr(signal, how))
        error = process.stderr.read()
    assert process.returncode == code, error
    assert code == -9 or f"continue with: python train.py --resume '{run}'\n" in error
    assert program("--resume", run) == 0 and end_of(run) == end_of(model.parent)


def test_no_two_runs_share_a_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [program(*tiny, "--epochs", 1) for _ in range(2)] == [0, 0]
    assert sorted(os.listdir("runs")) == ["toy", "toy-2"]
    with pytest.raises(reader.DataError, match="toy exists: choose another --out"):
        train.new_folder("runs/toy", "toy.csv")    # made by another since --out was checked


def test_fit_leaves_its_settings_alone_and_refuses_what_does_not_belong_together(
        tiny, tmp_path, capsys):
    config = train.configure(data=tiny[1], epochs=1, d_model=2)
    data, more = train.load_data(config), {**config, "epochs": 2}
    state = train.fit(data, config, tmp_path)      # which exists, but holds no run
    # 30 windows have 288 events
    assert state["config"]["batch_size"] == round(1400 * 30 / 288) and config["batch_size"] is None
    for _ in range(2):
        assert len(train.fit(data, more, tmp_path, resume=True)["history"]) == 2
    assert capsys.readouterr().out.count("nothing left to train after 2 epochs") == 1
    for message, *arguments in (
            ("holds a run: give resume=True, or another folder", data, config, tmp_path),
            ("the settings name ml-100k, but these data are", data, {}, tmp_path / "other"),
            ("--lr is 0.5 here, but it was", data, {**config, "lr": 0.5}, tmp_path, True),
            ("has other events than", data._replace(digest=""), config, tmp_path, True)):
        with pytest.raises(reader.DataError, match=message):
            train.fit(*arguments)


def test_the_same_data_may_come_from_another_place_but_no_other_data(tiny, tmp_path, refused):
    moved, run = tmp_path / "moved.csv", tmp_path / "run"
    assert program(*tiny, "--epochs", 1, "--out", run) == 0
    os.rename(tiny[1], moved)
    assert "toy.csv is not there any more: say where it is with --data" in refused("--resume", run)
    assert program("--resume", run, "--epochs", 2, "--data", moved, "--batch-size", "none") == 0
    assert report_in(run)["config"]["data"] == str(moved)
    other = write(tmp_path / "other.csv", moved.read_text() + "\nu0,i0,99")
    for command in (["--resume", run], ["evaluate", run / "model.npz"],
                    ["recommend", run / "model.npz", "--all-users"]):
        assert "has other events than the training had" in refused(*command, "--data", other)


# ---------------------------------------------------------------------------------------------
# recommend, compare, inspect

TITLES = ["", "Heat (1995)", "Star Wars (1977)", "Star Trek (1979)", "8", "Wars of Stars (1980)",
          "Heat (1995), the making of", "Godfather, The (1972)", "Godfather: Part II, The (1974)"]
FIND = train.item_finder(["", "7", "8", "9", "Heat", "n", "6", "g", "G"], TITLES)


@pytest.mark.parametrize("text, found", [
    ("8", 2), ("Heat", 4), ("g", 7), ("G", 8),                    # an id, before any title
    ("heat (1995)", 1), (" TREK ", 3), ("wars star", 2), ("making of HEAT", 6),
    ("the godfather", 7), ("tar", "no item 'tar': give an id, or whole words of a title"),
    ("?!", "no item '?!': give an id, or whole words of a title"),
    ("star", "'star' matches 2 items: Star Wars (1977) [8]; Star Trek (1979) [9]: give more words, "
             "or the id in brackets")])
def test_an_item_is_found_by_its_id_its_title_or_whole_words_of_it(text, found):
    try:
        assert FIND(text) == found
    except reader.DataError as error:
        assert str(error) == found


def best_after(model, raw_ids, top):
    """What to recommend after these raw ids, by hand: a list of [rank, raw id, title, score].
    The model sees the last max_len; without rank_seen, none of all is recommended."""
    params, info = train.read_model(model)
    history = [info["item_ids"].index(raw) for raw in raw_ids] or [0]
    scores = train.model_scorer(params)([history[-(info["config"]["max_len"] or 0):]])[0]
    left_out = set() if info["config"]["rank_seen"] else set(history)
    best = sorted(set(range(1, len(scores))) - left_out, key=lambda v: -scores[v])[:top]
    return [[str(n), info["item_ids"][v], info["titles"][v], pytest.approx(scores[v], abs=1e-3)]
            for n, v in enumerate(best, 1)]


def test_recommend_says_what_it_understood_and_what_is_best_after_it(model, capsys):
    assert program("recommend", model, "--top", 99, *"i0 i1 i2 i4 i5".split(), "the rock") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "after: ..., i1, i2, i4, i5, Rock, The (1996)"
    best = best_after(model, "i0 i1 i2 i4 i5 i3".split(), 99)
    for line, (rank, _, title, score) in zip(lines, best, strict=True):
        assert line.startswith(f"{rank:>2}  {title} ") and float(line.split()[-1]) == score


def test_items_come_a_line_each_and_an_empty_line_starts_again(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\nwhat?\nдом\n\ni5\n"))
    assert program("recommend", model, "--top", 1) == 2, "a line named no item"
    out, err = capsys.readouterr()
    assert err == "no item 'what?': give an id, or whole words of a title\n"
    lines, histories = out.splitlines(), [[], ["i3"], ["i3", "i6"], [], ["i5"]]
    assert lines[::2] == ["after: nothing yet", "after: Rock, The (1996)",
                          "after: Rock, The (1996), Дом", "after: nothing yet", "after: i5"]
    best = [best_after(model, history, 1)[0] for history in histories]
    assert [float(line.split()[-1]) for line in lines[1::2]] == [score for *_, score in best]


def test_no_title_ends_a_command_whatever_the_encoding_of_its_output(model, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert program("recommend", model, "дом") == 0
    assert b"after: \\u0414" in sys.stdout.buffer.getvalue()


def edited(path, to, part, name, value):
    """Save the model at path to another one, with a new value in its arrays, JSON or config."""
    arrays, extra = lrurec.load(path)
    {"arrays": arrays, "json": extra, "config": extra["config"]}[part][name] = value
    lrurec.save(to, arrays, **extra)
    return to


@pytest.mark.parametrize("name, value", [
    ("rank_seen", False), ("rank_seen", True), ("max_len", None)])
def test_recommend_for_users_of_the_data_as_csv(name, value, model, tmp_path, capsys):
    path = edited(model, tmp_path / "m.npz", "config", name, value)
    data = train.load_data(train.read_model(path)[1]["config"])
    histories = {user: [data.item_ids[v] for v in events]
                 for user, events in zip(data.user_ids, reader.full_histories(data))}
    for flags, users in ((["--all-users"], histories), (["--user", "u7"], ["u7"])):
        assert program("recommend", path, *flags, "--top", 40) == 0
        head, *rows = csv.reader(capsys.readouterr().out.splitlines())
        assert head == ["user", "rank", "item", "title", "score"]
        assert [[*row[:4], float(row[4])] for row in rows] == [
            [user, *row] for user in users for row in best_after(path, histories[user], 40)]


@pytest.mark.parametrize("part, name, value", [
    ("json", "item_ids", []), ("json", "config", 7), ("config", "lr", "fast"),
    ("arrays", "output_bias", np.zeros(41)), ("arrays", "output_bias", np.full(42, np.nan)),
    ("arrays", "blocks.1.lru.B", np.zeros((3, 3)))])
def test_a_damaged_model_file_is_one_line(part, name, value, model, tmp_path, refused):
    path = edited(model, tmp_path / "bad.npz", part, name, value)
    assert "bad.npz: not a model (" in refused("inspect", path)


def test_compare_prints_each_run_the_mean_and_the_deviation_but_not_of_other_data(
        tmp_path, monkeypatch, refused, capsys):
    monkeypatch.chdir(tmp_path)
    for name, users, recall in (("a", 9, 0.1), ("b", 9, 0.3), ("other", 8, 0.3)):
        os.mkdir(name)
        report = {"data": {"users": users, "items": 5, "events": 60},
                  "config": {"rank_seen": name == "other"},
                  "validation": dict.fromkeys(train.SHOWN, recall),
                  "test": dict.fromkeys(train.SHOWN, recall / 2)}
        write(tmp_path / name / "metrics.json", json.dumps(report))
    assert program("compare", "a", "b", "a/") == 0, "a counts once"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[::7] for line in lines if "Recall" not in line] == [      # name, last
        ["validation"], ["a", "0.1000"], ["b", "0.3000"], ["mean", "0.2000"], ["±", "0.1414"],
        ["test"], ["a", "0.0500"], ["b", "0.1500"], ["mean", "0.1000"], ["±", "0.0707"]]
    assert ("a: 9 users, 5 items, 60 events; other: 8 users, 5 items, 60 events, with --rank"
            in refused("compare", "a", "other"))


def test_inspect_prints_sizes_half_lives_and_the_disk_of_each_block(model, tmp_path, capsys):
    nu_log = np.log(np.log(2) / np.arange(1, 17))  # |lam| = exp(-exp(nu_log)): half-lives 1 to 16
    path = edited(model, tmp_path / "m.npz", "arrays", "blocks.1.lru.nu_log", nu_log)
    assert program("inspect", path) == 0
    out = capsys.readouterr().out
    assert ("block 1: mean |lam| 0.8737 (from 0.50 to 0.96); half-life in events: median 8.50, "
            "10 % below 2.50, 10 % above 14.50, longest 16.0\n") in out
    assert len(out.splitlines()) == 1 + 2 * (1 + 21)


def test_the_disk_shows_the_circle_and_how_many_eigenvalues_are_where():
    picture = train.disk(np.array([1, 1j, -1, *[-0.5] * 12]))
    assert picture[0][20] + picture[10][0] + picture[10][40] + picture[10][10] == "1119"
    assert picture[3] == picture[17] and picture[3].strip(" .") == ""


# ---------------------------------------------------------------------------------------------
# The front door

def test_every_command_in_the_readme_parses():
    readme = Path(HERE, "README.md").read_text("utf-8")
    one_a_line = readme.replace("\\\n", "").replace("&& ", "\n")
    commands = re.findall(r"^python (train|test_lrurec)\.py(.*?)(?:  #|>|$)", one_a_line, re.M)
    assert len(commands) > 20
    for file, text in commands:
        words = shlex.split(text)
        if file == "test_lrurec":
            assert {*words} <= {*EXERCISES, "check", "pytorch", "train", "--ml-100k", "--hint"}
        else:
            with contextlib.suppress(SystemExit):                 # of --help
                train.parse_arguments(words)       # raises DataError


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    """On other data: users who walk round a ring of items, with numbers as ids."""
    items = (np.arange(60)[:, None] * 7 + np.arange(12)) % 120 + 1
    ring = dataset(items.ravel(), range(0, 721, 12), 120)._replace(name="ml-100k")
    monkeypatch.setattr(train, "load_dataset", lambda *settings: ring)
    monkeypatch.chdir(tmp_path)
    readme = Path(HERE, "README.md").read_text("utf-8")
    block, = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    exec(block, {})
    assert {*os.listdir("runs/notebook")} == {"last.npz", "model.npz"}


# ---------------------------------------------------------------------------------------------
# The GPU, on machines without one: a stand-in for CuPy whose arrays refuse NumPy

class DeviceArray(np.ndarray):
    """Operators work on it alone, NumPy's functions where the stand-in calls them."""
    in_stand_in = False                            # within one of its functions
    waits = 0                                      # for the card: each copy to the host is one
    __float__ = __index__ = None                   # say .get() where one is wanted

    def __array_function__(self, function, types, args, options):
        assert DeviceArray.in_stand_in, f"{function} was given a device array"
        return super().__array_function__(function, types, args, options)

    def __array_wrap__(self, result, context=None, _=False):
        if context and not DeviceArray.in_stand_in:
            function, arguments, _ = context
            assert np.ndarray not in map(type, arguments), f"{function} mixes host and device"
        return result.view(DeviceArray)

    def __bool__(self):
        return bool(self.get())

    def get(self):
        DeviceArray.waits += 1
        return np.array(self)


class StandIn:
    """As much of CuPy as we use, on one thread; the two kernels are done here by the definition."""
    inf, ndarray, add = np.inf, DeviceArray, np.add

    def __getattr__(self, name):
        def call(*args, **options):
            assert np.ndarray not in map(type, args), f"{name} was given an array of the host"
            DeviceArray.in_stand_in = True
            result = getattr(np, name)(*args, **options)
            DeviceArray.in_stand_in = False
            return self.asarray(result)
        return call

    def asarray(self, x, dtype=None):
        return np.array(x, dtype).view(DeviceArray)

    def ElementwiseKernel(self, inputs, outputs, body, name):
        return getattr(self, name)                 # one of the two below

    def lru_scan(self, lam, starts, N, H, h, size):
        assert (N, H, size) == (*h.shape, h.size) and type(starts) is type(lam) is DeviceArray
        h[:] = lrurec.scan_loop(lam, h, starts)

    def random_bytes(self, seed, size):
        assert type(seed) is int
        return self.asarray(np.random.default_rng(seed).integers(256, size=size))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", StandIn())
    yield lrurec.use_device
    lrurec.use_device("cpu")


def test_the_gpu_and_back_gives_the_same_objects(gpu):
    def swapped():
        return lrurec.xp, lrurec.scan, lrurec.random_bytes, lrurec.ROWS_PER_CHUNK

    before = swapped()
    gpu("gpu")
    assert not any(a is b for a, b in zip(swapped(), before))
    with pytest.raises(AssertionError, match="zeros_like.* was given a device array"):
        np.zeros_like(lrurec.xp.ones(3))           # the stand-in notices
    gpu("cpu")
    assert all(a is b for a, b in zip(swapped(), before))


def test_a_device_in_use_leaves_a_scan_of_ones_own_in_place_and_another_is_refused(monkeypatch):
    monkeypatch.setattr(lrurec, "scan", lrurec.scan_loop)
    lrurec.use_device("cpu")
    assert lrurec.scan is lrurec.scan_loop
    with pytest.raises(ValueError, match="device must be 'cpu' or 'gpu', not 'tpu'"):
        lrurec.use_device("tpu")


def test_the_same_numbers_come_from_the_stand_in(gpu):
    params, batch = tiny_params(n_items=40), batch_of(40)
    expected = everything(params, *batch)
    gpu("gpu")
    device = {name: lrurec.xp.asarray(p) for name, p in params.items()}
    for a, b in zip(everything(device, *batch), expected):
        assert relative_error(a.get(), b) < 1e-12


def test_the_whole_program_runs_on_the_stand_in_and_no_step_waits_for_it(
        gpu, tiny, tmp_path, capsys, monkeypatch):
    def quick(work, repeat):                       # of bench: made-up times
        if repeat != 3:                            # no training step
            work()
        return float(repeat)                       # 3 ms for 8,000 rows: 2,666,667 a second

    monkeypatch.setattr(train, "median_ms", quick)
    monkeypatch.setattr(train, "DEFAULTS", {**train.DEFAULTS, "data": tiny[1], "threads": 1})
    monkeypatch.setattr("sys.stdin", io.StringIO("i3\n"))
    run, model, waits = tmp_path / "run", tmp_path / "run" / "model.npz", []
    for command in (["--epochs", 1, "--batch-size", 15, "--average", 0.9, "--out", run],
                    ["--epochs", 1, "--batch-size", 5, "--average", 0.9, "--out", tmp_path / "5"],
                    ["--resume", run, "--epochs", 2], ["bench"], ["recommend", model],
                    ["recommend", model, "--user", "u3"], ["recommend", model, "i3"],
                    ["evaluate", model]):
        DeviceArray.waits = 0
        assert program(*command, "--device", "gpu") == 0
        waits.append(DeviceArray.waits)
    assert waits[0] == waits[1], "three times the steps, but no more waits for the card"
    printed = capsys.readouterr().out
    assert re.findall("([0-9,]+) items +2,666,667", printed) == ["1,349", "10,000", "100,000"]
    assert "  after  10000 events                100000             20000\n" in printed


@pytest.mark.parametrize("cupy, reason", [(None, "cupy"), (object(), "no attribute 'zeros'")])
def test_without_cupy_or_a_card_one_line_says_what_to_install(cupy, reason, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    error = refused("--device", "gpu")
    assert reason in error and 'pip install "cupy' in error and lrurec.xp is np


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):        # a learner's names may be of any alphabet
        stream.reconfigure(errors="backslashreplace")
    try:
        exit_code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        exit_code = 130
    except BrokenPipeError:                        # a pipe into head, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 1
    sys.exit(exit_code)
