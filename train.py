# SPDX-License-Identifier: MIT
"""The program: train LRURec, evaluate a saved model, recommend with it, look inside.

    python train.py                      train on ML-100K with the defaults, start to finish
    python train.py COMMAND --help       the flags of a command

First the settings, the evaluation and the training; then a run's files and the commands. The model
is in lrurec.py; filtering, splits and batches are in data.py.
"""
import os
import sys
import warnings

# Our own threads share the work, so BLAS gets one. It reads these when NumPy is first imported
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
                "VECLIB_MAXIMUM_THREADS")
if "numpy" in sys.modules and not any(os.environ.get(name) == "1" for name in BLAS_THREADS):
    warnings.warn("NumPy was imported before train.py and uses several BLAS threads: training can "
                  "be ten times slower. Import train first, or set OPENBLAS_NUM_THREADS=1")
os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))

import argparse
import collections
import contextlib
import csv
import ctypes
import glob
import json
import math
import re
import shlex
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import lrurec
from data import (NAMES, DataError, batches, full_histories, histories, load_dataset, printable,
                  training_rows)

# ---- The settings of a run

LARGE = 2 ** 31 - 1
SETTINGS = {
    # name: (default, type, allowed, help); allowed: the ends of a range, or choices, or () for any
    "data": ("ml-100k", str, (), "a file of interactions, ml-100k or ml-1m"),
    "columns": (None, str, (), "USER,ITEM[,TIME]: names of a header; without one numbers from 1"),
    "titles": (None, str, (), "a file of item ids and titles"),
    "title_columns": (None, str, (), "ITEM,TITLE of --titles, as in --columns"),
    "min_count": (5, int, (0, LARGE), "drop items, then users, with fewer events; 0 keeps all"),
    "ties": ("item", str, ("item", "file", "random"), "order at equal times: item, file or random"),
    "rank_seen": (False, bool, (False, True), "also rank and recommend what is in the history"),
    "max_len": (200, int, (1, LARGE), "events of a history, or none for all"),
    "d_model": (64, int, (1, 65536), "model width"),
    "n_blocks": (2, int, (1, 1000), "number of blocks"),
    "max_phase": (0.01, float, (1e-9, 1), "fraction of the circle where the eigenvalues start"),
    "dropout": (0.5, float, (0, 0.99), "dropout rate"),
    "lr": (2e-3, float, (0, 1000), "learning rate of AdamW"),
    "schedule": ("constant", str, ("constant", "cosine"), "of --lr: constant, or cosine to 0"),
    "weight_decay": (0.01, float, (0, 1000), "weight decay of AdamW"),
    "average": (0.0, float, (0, 0.999999), "decay of the running mean of the weights; 0: no mean"),
    "batch_size": (None, int, (1, LARGE), "windows in a batch; none: about 1,400 events' worth"),
    "epochs": (50, int, (1, LARGE), "maximum number of epochs"),
    "patience": (15, int, (1, LARGE), "stop after so many epochs without a better Recall@10"),
    "seed": (42, int, (0, LARGE), "random seed"),
    "threads": (os.cpu_count() or 1, int, (1, 1024), "threads; the results do not depend on it"),
}
DEFAULTS = {name: default for name, (default, *_) in SETTINGS.items()}
MAY_CHANGE = ("data", "epochs", "patience", "threads")            # on --resume; data: its path
FIXED = [name for name in SETTINGS if name not in MAY_CHANGE]

BATCH_EVENTS = 1400           # events in a batch of the default size, about
SHARD_ROWS = 2000             # rows of a shard of a batch, about
GROUP = 16                    # users evaluated at once
MAX_NORM = 5.0                # gradients are clipped to this norm, as published
KS = (1, 5, 10, 20, 50)
BEST = "Recall@10"            # on validation: picks the epoch that is kept
SHOWN = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")


def flag(name):
    return "--" + name.replace("_", "-")


def settle(given, saved=None, fixed=()):
    """All settings: the defaults, then those saved, then those given, dicts -> dict.
    Raises DataError for a wrong one, and where one of `fixed` is not as saved."""
    config = {**DEFAULTS, **(saved or {}), **given}
    for name, value in config.items():
        check_setting(name, value)
    for name in ("data", "titles"):                # a run may be resumed from another directory
        if config[name] not in (None, *NAMES):
            config[name] = os.path.abspath(config[name])
    for name in fixed:
        if config[name] != saved[name]:
            raise DataError(f"{flag(name)} is {config[name]} here, but it was {saved[name]} so "
                            "far: leave it out, or start a new run")
    return config


def check_setting(name, value):
    """Raises DataError unless the setting may have this value."""
    if name not in SETTINGS:
        raise DataError(f"no setting {name!r}: choose from {', '.join(SETTINGS)}")
    default, kind, allowed, _ = SETTINGS[name]
    if value is None and (default is None or name == "max_len"):
        return
    if kind in (int, float):
        low, high = allowed
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        right = is_number and low <= value <= high                # False for nan
        noun = "an integer" if kind is int else "a number"
        wanted = f"{noun} from {low} to {high}"
    elif allowed:
        right, wanted = value in allowed, f"one of {', '.join(map(str, allowed))}"
    else:
        right, wanted = isinstance(value, str), "text"
    if not right:
        raise DataError(f"{flag(name)} must be {wanted} (got {value!r})")


# ---- Evaluation

def leave_out(scores, seen, rank_seen):
    """Set the scores (users, V+1) of "nothing" and, without rank_seen, of what is in each user's
    history to -inf, in place. seen: a list of histories."""
    scores[:, 0] = -np.inf
    if not rank_seen:
        for row, history in zip(scores, seen):
            row[history] = -np.inf


def ranks(scores, seen, truth, rank_seen):
    """The rank, from 0, of each user's true item among the items that are not left out.
    scores (users, V+1), overwritten; seen: a list of histories; truth (users,) -> (users,) float.
    A tie counts against us; a true item that is left out has infinite rank."""
    leave_out(scores, seen, rank_seen)
    true_scores = scores[np.arange(len(truth)), truth]
    behind = scores < true_scores[:, None]         # where a score is nan, nothing is
    rank = (~behind).sum(1) - 1.0                  # without the true item itself
    rank[np.isneginf(true_scores)] = np.inf
    return rank


def metrics(rank):
    """Ranks from 0 (users,) -> {"Recall@k", "NDCG@k" for k in KS, "MRR": means over users, "error":
    the standard errors of Recall@10 and NDCG@10, "users": their number}"""
    values = {}
    for k in KS:
        values[f"Recall@{k}"] = rank < k
        values[f"NDCG@{k}"] = (rank < k) / np.log2(rank + 2)
    values["MRR"] = 1 / (rank + 1)
    means = {name: float(each.mean()) for name, each in values.items()}
    errors = {name: float(values[name].std() / math.sqrt(len(rank))) for name in (BEST, "NDCG@10")}
    return {**means, "error": errors, "users": len(rank)}


def evaluate(scorer, data, split, max_len=None, threads=1, rank_seen=False):
    """Metrics on split, "validation" or "test", of a scorer: a function from a list of histories,
    their last max_len events, to scores (users, V+1). Raises ValueError for another split, for
    scores of another shape and where no user has enough events."""
    seen, truth = histories(data, split, max_len)

    def group_ranks(first):
        group = slice(first, first + GROUP)
        scores = np.array(scorer(seen[group]), float)             # a copy to overwrite
        wanted = len(seen[group]), len(data.item_ids)
        if scores.shape != wanted:
            raise ValueError(f"scores must be (users, V+1), here {wanted} (got {scores.shape})")
        return ranks(scores, seen[group], truth[group], rank_seen)

    with ThreadPoolExecutor(threads) as pool:
        return metrics(np.concatenate(list(pool.map(group_ranks, range(0, len(seen), GROUP)))))


def model_scorer(params):
    """The model as a scorer for evaluate."""
    def scorer(seen):
        if not len(seen) or any(np.ndim(history) != 1 or not len(history) for history in seen):
            raise ValueError("a scorer takes a list of histories, each of one event or more, as in "
                             "[[50, 100]]; a new user's is [0]")
        lengths = [len(history) for history in seen]
        ends = np.cumsum(lengths)
        starts = np.isin(np.arange(ends[-1]), ends - lengths)     # a wall before each history
        hidden = lrurec.encode(params, np.concatenate(seen), starts)
        return lrurec.to_host(lrurec.score(params, hidden[lrurec.xp.asarray(ends - 1)]))
    return scorer


def baseline_scorers(data):
    """Popularity, and a first-order Markov chain with popularity as tie-break, as scorers."""
    rows, size = training_rows(data), len(data.item_ids)
    popularity = np.bincount(rows.targets, minlength=size).astype(float)
    fraction = popularity / (len(rows.targets) + 1)               # < 1: it breaks ties only
    transitions = rows.items.astype(np.int64) * size + rows.targets
    pairs, counts = np.unique(transitions, return_counts=True)    # in ascending order

    def by_popularity(seen):
        return np.tile(popularity, (len(seen), 1))

    def by_markov(seen):
        scores = np.tile(fraction, (len(seen), 1))
        for user, history in enumerate(seen):
            last = int(history[-1])
            first, end = np.searchsorted(pairs, [last * size, (last + 1) * size])
            scores[user, pairs[first:end] % size] += counts[first:end]
        return scores

    return {"popularity": by_popularity, "Markov": by_markov}


# ---- Training

def fit(data, config, folder, run=None):
    """Train until epochs or patience run out -> run, the state of the training, a dict: config,
    digest (of the data), params, opt, history (a dict per epoch), and model, which is validated
    and saved: with config["average"] a running mean of params, else params itself.

    config names what differs from DEFAULTS, or from the config of run, a state to continue, which
    is changed. After every epoch folder holds model.npz (the best epoch) and last.npz (all that
    continuing needs). Raises DataError for a wrong config and for a loss that is not finite.
    """
    run, rows = prepare_run(data, config, folder, run)
    config, history = run["config"], run["history"]
    with ThreadPoolExecutor(config["threads"]) as pool, ctrl_c_sets_a_flag() as stop:
        while (len(history) < config["epochs"]
               and len(history) - best_epoch(history) < config["patience"]):
            begin = time.perf_counter()
            loss = train_epoch(run, rows, pool, stop)
            validation = evaluate(model_scorer(run["model"]), data, "validation",
                                  config["max_len"], config["threads"], config["rank_seen"])
            epoch, seconds = len(history) + 1, time.perf_counter() - begin
            history.append({"epoch": epoch, "loss": loss, BEST: validation[BEST],
                            "NDCG@10": validation["NDCG@10"], "seconds": seconds})
            save_run(folder, run, data, validation)
            mark = "*" if best_epoch(history) == epoch else " "
            print(f"epoch {epoch:3d}  loss {loss:.4f}  validation {BEST} {validation[BEST]:.4f} "
                  f"{mark}  {seconds:.1f} s", flush=True)         # what is printed is saved
            if stop.is_set():
                raise KeyboardInterrupt
    return run


def train_epoch(run, rows, pool, stop):
    """One more epoch: a step of AdamW for each batch of windows, in random order -> mean loss."""
    config, params, opt = run["config"], run["params"], run["opt"]
    epoch, begin, losses = len(run["history"]) + 1, time.perf_counter(), []
    n_batches = math.ceil((len(rows.windows) - 1) / config["batch_size"])
    n_steps = config["epochs"] * n_batches         # of the whole training
    rng = np.random.default_rng([config["seed"], epoch])          # for the order of the windows
    for batch in batches(rows, config["batch_size"], rng):
        lr = learning_rate(config, opt["step"] / n_steps)
        losses.append(train_step(pool, params, opt, batch, config, lr))
        if config["average"]:
            move_mean(run["model"], params, opt["step"], config["average"])
        seconds = (n_steps - opt["step"]) * (time.perf_counter() - begin) / len(losses)
        progress(f"epoch {epoch}/{config['epochs']}  batch {len(losses)}/{n_batches}  "
                 f"at most {seconds:.0f} s to go")
        if stop.is_set():
            raise KeyboardInterrupt
    progress("")
    loss = float(lrurec.to_host(lrurec.xp.stack(losses)).mean())  # waits for the GPU
    if not (math.isfinite(loss) and finite(params)):
        raise DataError(f"the loss is not finite in epoch {epoch}: lower --lr")
    return loss


def train_step(pool, params, opt, batch, config, lr):
    """One step of AdamW, in place -> the batch's mean loss."""
    loss, grads = gradients(pool, params, batch, config, opt["step"])
    lrurec.clip_gradients(grads, MAX_NORM)
    lrurec.adamw_update(params, grads, opt, lr, config["weight_decay"])
    return loss


def gradients(pool, params, batch, config, step):
    """Mean loss and gradients of a batch (items, targets, starts) -> loss, grads.

    The pool's threads work on shards of the batch, since NumPy releases the interpreter's lock.
    The shards, their dropout and the order of the sums depend on batch, seed and step alone: the
    number of threads does not change a bit of the result.
    """
    parts, n_targets = shards(*batch), np.count_nonzero(batch[1])

    def shard_gradients(k):
        rng = np.random.default_rng([config["seed"], step, k])
        loss, grads = lrurec.loss_and_grads(params, *parts[k], config["dropout"], rng)
        weight = np.count_nonzero(parts[k][1]) / n_targets        # its share in the batch's mean
        for g in grads.values():
            g *= weight
        return weight * loss, grads

    run_all = pool.map if config["threads"] > 1 else map          # a profiler sees one thread
    results = run_all(shard_gradients, range(len(parts)))
    loss, grads = next(results)
    for shard_loss, shard_grads in results:
        loss = loss + shard_loss
        for name, g in shard_grads.items():
            grads[name] += g
    return loss, grads


def shards(items, targets, starts):
    """Cut a batch at the walls nearest to equal shares -> a list of (items, targets, starts), each
    of about SHARD_ROWS rows; on a GPU one of all rows."""
    N = len(items)
    n_parts = 2 * max(1, round(N / SHARD_ROWS / 2))               # even: two threads end together
    if lrurec.xp is not np:
        n_parts = 1
    walls, cuts = np.append(0, np.flatnonzero(starts)), {0, N}
    for k in range(1, n_parts):
        nearest = abs(walls - k * N / n_parts).argmin()
        cuts.add(int(walls[nearest]))
    cuts = sorted(cuts)
    return [(items[a:b], targets[a:b], starts[a:b]) for a, b in zip(cuts, cuts[1:])]


def learning_rate(config, done):
    """done: the share of all steps, from 0 to 1, before this one."""
    if config["schedule"] == "cosine":
        return config["lr"] * (0.5 * (1 + math.cos(math.pi * done)))
    return config["lr"]


def move_mean(mean, params, step, decay):
    """mean <- mean + (1 - d)(p - mean), in place; d rises to decay: early weights fade soon."""
    d = min(decay, (1 + step) / (10 + step))
    for name, p in params.items():
        mean[name] += (1 - d) * (p - mean[name])


def prepare_run(data, config, folder, run):
    """All that fit does before its first epoch -> run, rows. Raises DataError."""
    if run is None:
        config = settle(config, {"data": data.name, **data.settings}, data.settings)
    else:
        config = settle(config, run["config"], FIXED)
        if data.digest != run["digest"] or not os.path.exists(os.path.join(folder, "model.npz")):
            raise DataError(f"{data.name} and {folder} must be the data and the folder of the run")
    histories(data, "validation")                  # raises where there is nobody to validate on
    rows = training_rows(data, config["max_len"])
    if config["batch_size"] is None:
        n_windows = len(rows.windows) - 1
        config["batch_size"] = max(1, round(BATCH_EVENTS * n_windows / len(rows.items)))
    os.makedirs(folder, exist_ok=True)
    if run is None:
        rng = np.random.default_rng(config["seed"])
        params = lrurec.init_params(len(data.item_ids) - 1, config["d_model"],
                                    n_blocks=config["n_blocks"], max_phase=config["max_phase"],
                                    rng=rng)
        model = {name: p.copy() for name, p in params.items()} if config["average"] else params
        run = {"digest": data.digest, "params": params, "model": model,
               "opt": lrurec.adamw_init(params), "history": []}
    run["config"] = config
    return run, rows


def best_epoch(history):
    """The first epoch of the best validation; 0 before the first epoch."""
    recalls = [epoch[BEST] for epoch in history]
    return recalls.index(max(recalls)) + 1 if recalls else 0


def finite(params):
    return all(bool(lrurec.xp.isfinite(p).all()) for p in params.values())


# ---- A run's files

def save_run(folder, run, data, validation):
    """model.npz, if this epoch is the best, then last.npz. Raises OSError."""
    common = {"config": run["config"], "digest": run["digest"], "epoch": len(run["history"])}
    if best_epoch(run["history"]) == common["epoch"]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "metrics.json"))       # of the model before
        lrurec.save(os.path.join(folder, "model.npz"), run["model"], **common,
                    validation=validation, item_ids=data.item_ids, titles=data.titles)
    groups = {"": run["params"], "m/": run["opt"]["m"], "v/": run["opt"]["v"]}
    if run["config"]["average"]:
        groups["mean/"] = run["model"]
    arrays = {prefix + name: p for prefix, group in groups.items() for name, p in group.items()}
    lrurec.save(os.path.join(folder, "last.npz"), arrays, **common, step=run["opt"]["step"],
                history=run["history"])


@contextlib.contextmanager
def reading(path, problem):
    """Whatever a missing, damaged or harmful file raises in this block becomes a DataError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds {problem} ({type(error).__name__}: {error})") from None


def read_run(folder):
    """What save_run wrote into last.npz -> run. Raises DataError."""
    refuse_empty(folder)
    path = os.path.join(folder, "last.npz")
    with reading(path, "no run to resume: start one in a new folder, without --resume"):
        arrays, info = lrurec.load(path)

        def group(prefix):
            return {name: arrays[prefix + name] for name in arrays if "/" not in name}

        config, params = settle(info["config"]), group("")
        best_epoch(info["history"])                # raises where the history is none
        return {"config": config, "digest": info["digest"], "params": params,
                "model": group("mean/") if config["average"] else params,
                "opt": {"step": info["step"], "m": group("m/"), "v": group("v/")},
                "history": info["history"]}


def read_model(path):
    """A model.npz of save_run -> params, info: a dict of config, digest, epoch, validation,
    item_ids and titles. Raises DataError."""
    def layout(arrays):
        return {name: (array.shape, array.dtype) for name, array in arrays.items()}

    with reading(path, "no valid model: give a model.npz that `python train.py train` wrote"):
        params, saved = lrurec.load(path)
        names = "config", "digest", "epoch", "validation", "item_ids", "titles"
        info = {name: saved[name] for name in names}
        info["config"] = settle(info["config"])
        for name in ("item_ids", "titles"):
            info[name] = [printable(str(text)) for text in info[name]]
        E = params["item_embedding"]
        like = lrurec.init_params(len(E) - 1, E.shape[1], n_blocks=len(lrurec.blocks(params)))
        if layout(params) != layout(like) or not finite(params):
            raise ValueError("not the names, shapes and types of a model, or not finite")
        if not len(E) == len(info["item_ids"]) == len(info["titles"]):
            raise ValueError("not as many ids and titles as items")
    return params, info


def refuse_empty(folder):
    """Raises DataError for an empty folder: making it is how a run claims it."""
    if os.path.isdir(folder) and not os.listdir(folder):
        raise DataError(f"{folder} is empty: a run was killed there in its first epoch, or one is "
                        "in its first epoch now; if none is, delete the folder")


def new_folder(out, data):
    """Make a new run's folder: out, or the first free of runs/NAME, runs/NAME-2, ... Only one run
    can make it, so two never share one. Raises DataError."""
    name = os.path.basename(data).split(".")[0] or "data"
    folder, n = out or os.path.join("runs", name), 1
    while True:
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            if out:
                refuse_empty(out)
                raise DataError(f"{out} exists: choose another --out, or --resume its run")
        n += 1
        folder = os.path.join("runs", f"{name}-{n}")


def last_folder():
    """The folder in runs/ that was saved to last. Raises DataError."""
    saved = glob.glob(os.path.join("runs", "*", "last.npz"))
    if not saved:
        raise DataError("no run in runs/ to resume: give the folder of one with --out")
    return os.path.dirname(max(saved, key=os.path.getmtime))


# ---- train, evaluate, compare

def load_data(config, titles=None, digest=None):
    """The data that config names. Raises DataError where they have another digest than this."""
    data = load_dataset(config["data"], config["min_count"], config["ties"], config["seed"],
                        config["columns"], titles, config["title_columns"])
    if digest not in (None, data.digest):
        raise DataError(f"{config['data']} has other events than the training had: give its file "
                        "with --data, or train a new model")
    return data


def print_table(results):
    """results: name -> metrics. Below the table the standard errors of the last one."""
    width = max(map(len, results))
    print(" " * width + "".join(f"{metric:>10}" for metric in SHOWN))
    for name, table in results.items():
        print(f"{name:<{width}}" + "".join(f"{table[metric]:10.4f}" for metric in SHOWN))
    if "error" in table:
        errors = ", ".join(f"{metric} {error:.4f}" for metric, error in table["error"].items())
        print(f"{name}, standard error over {table['users']:,} users: {errors}")


def train_command(args, given):
    """Train in a new folder, or go on in that of the run to resume."""
    if args.resume:
        folder = args.out or last_folder()
        run = read_run(folder)
        config = settle(given, run["config"], FIXED)
    else:
        run, config = None, settle(given)
        if config["title_columns"] and not config["titles"]:
            raise DataError("--title-columns goes with --titles")
        folder = new_folder(args.out, config["data"])
    last = os.path.join(folder, "last.npz")
    try:
        train_and_test(folder, config, run)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        what = "output pipe closed" if isinstance(error, BrokenPipeError) else "\ninterrupted"
        hint = "nothing was saved yet"
        if os.path.exists(last):
            hint = ("completed epochs are saved, continue with: python train.py train --resume "
                    f"--out {shlex.quote(folder.replace(os.sep, '/'))} --device {args.device}")
        progress("")
        print(f"{what}; {printable(hint)}", file=sys.stderr)
        raise
    finally:
        if not os.path.exists(last):               # a run that saved nothing leaves nothing
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                os.rmdir("runs")                   # if it is empty


def train_and_test(folder, config, run):
    """Train, test beside the baselines, report. run: a state to continue from, or None."""
    path = os.path.join(folder, "model.npz")
    if run is None:
        data = load_data(config, config["titles"])
    else:                                          # the run's model holds the titles
        _, info = read_model(path)
        data = load_data(config, digest=run["digest"])._replace(titles=info["titles"])
    for line in data.report:
        if not (config["rank_seen"] and "--rank-seen" in line):   # advice that has been taken
            print(line)
    print(f"ties by {config['ties']}; run in {printable(folder)}", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)           # fit refuses a loss of inf or nan
        run = fit(data, config, folder, run)
    params, info = read_model(path)
    config, history = run["config"], run["history"]               # with the batch size chosen
    scorers = {**baseline_scorers(data), "LRURec": model_scorer(params)}
    tests = {name: evaluate(scorer, data, "test", config["max_len"], config["threads"],
                            config["rank_seen"]) for name, scorer in scorers.items()}
    report = {"data": {"name": data.name, "users": len(data.user_ids),
                       "items": len(data.item_ids) - 1, "events": len(data.items),
                       "digest": data.digest},
              "config": {**config, "out": folder}, "epoch": info["epoch"],
              "seconds": sum(epoch["seconds"] for epoch in history), "history": history,
              "validation": info["validation"], "test": tests["LRURec"],
              "baselines": {"popularity": tests["popularity"], "markov": tests["Markov"]}}
    metrics_path = os.path.join(folder, "metrics.json")
    with open(metrics_path + ".part", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    os.replace(metrics_path + ".part", metrics_path)
    print(f"\ntest, best epoch {info['epoch']}, trained for {report['seconds']:.0f} s")
    print_table(tests)


def evaluate_command(args, given):
    params, info = read_model(args.model)
    config = settle(given, info["config"])
    data, scorer = load_data(config, digest=info["digest"]), model_scorer(params)
    print_table({split: evaluate(scorer, data, split, config["max_len"], config["threads"],
                                 config["rank_seen"]) for split in ("validation", "test")})


def compare_command(args, given):
    """Validation and test metrics of finished runs, their mean and sample standard deviation."""
    tables, digests = {"validation": {}, "test": {}}, {}
    for folder in args.folders:
        path = os.path.join(folder, "metrics.json")
        with reading(path, "no metrics to compare: give the folder of a finished run"):
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
            for split, table in tables.items():
                table[printable(folder)] = {name: float(report[split][name]) for name in SHOWN}
            drawn = report["config"]["ties"] == "random"          # each seed's data has its digest
            digests[report["data"]["events" if drawn else "digest"]] = folder
    if len(digests) > 1:
        raise DataError(f"{' and '.join(digests.values())} are runs of different data")
    for split, table in tables.items():
        values = [list(row.values()) for row in table.values()]
        if len(values) > 1:
            table["mean"] = dict(zip(SHOWN, np.mean(values, 0)))
            table["± std"] = dict(zip(SHOWN, np.std(values, 0, ddof=1)))
        print(split)
        print_table(table)


# ---- recommend: for a history, for users of the data, or one event at a time

def best_items(scores, seen, n, rank_seen=False):
    """Each user's n best items, without rank_seen those that are not in the history: a list of
    (item, score), best first. scores (users, V+1), overwritten; seen: a list of histories."""
    leave_out(scores, seen, rank_seen)
    n = min(n, scores.shape[1])
    candidates = np.argpartition(-scores, n - 1, axis=1)[:, :n]   # the n best, in any order
    best = []
    for row, items in zip(scores, candidates):
        items = items[np.argsort(-row[items])]
        best.append([(int(v), float(row[v])) for v in items if row[v] > -np.inf])
    return best


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def item_finder(item_ids, titles):
    """A function from what was typed to an item: that with this raw id, else the one title that
    holds all the words, in any order and letter case. Of several, the one that holds nothing else,
    but for a year "(1972)" at its end. Raises DataError with candidates."""
    by_id = {raw: v for v, raw in enumerate(item_ids) if raw}
    lowered = [title.lower() for title in titles]

    def find(text):
        text = text.strip()
        if text in by_id:
            return by_id[text]
        words, found = words_of(text), range(1, len(titles))
        for word in words:
            found = [v for v in found if word in lowered[v]]
        if not words or not found:
            raise DataError(f"no item {text!r}: give an id, or words of a title")
        whole = [v for v in found if words_of(re.sub(r"\(\d{4}\)$", "", lowered[v])) <= words]
        if len(whole) == 1:
            found = whole
        if len(found) > 1:
            listed = "; ".join(f"{titles[v]} [{item_ids[v]}]" for v in found[:8])
            raise DataError(f"{text!r} matches {len(found)} items: {listed}: give more, or the id")
        return found[0]

    return find


def recommend_command(args, given):
    if args.top < 1:
        raise DataError(f"--top must be 1 or more (got {args.top})")
    if bool(args.items) + args.new_user + (args.user is not None) + args.all_users > 1:
        raise DataError("give one of: titles or ids, --new-user, --user, --all-users")
    params, info = read_model(args.model)
    if args.user is not None or args.all_users:
        recommend_for_users(params, info, args, given)
    elif given:
        raise DataError("--data and --columns go with --user or --all-users")
    elif args.items or args.new_user:
        find = item_finder(info["item_ids"], info["titles"])
        history = [find(text) for text in args.items] or [0]
        scores, rank_seen = model_scorer(params)([history]), info["config"]["rank_seen"]
        print_best(best_items(scores, [history], args.top, rank_seen)[0], info["titles"])
    else:
        answer_lines(params, info, args.top)


def print_best(best, titles):
    width = max([len(titles[v]) for v, _ in best], default=0)
    for rank, (v, score) in enumerate(best, 1):
        print(f"{rank:2}  {titles[v]:<{width}} {score:8.3f}")


def recommend_for_users(params, info, args, given):
    """Print a CSV of the best items of one or all users of the data."""
    config = settle(given, info["config"])
    if given:                                      # other data: users with any number of events
        config["min_count"] = 0
    data = load_data(config, digest=None if given else info["digest"])
    users, seen = data.user_ids, known_histories(data, info["item_ids"])
    if args.user is not None:
        if args.user not in users:
            raise DataError(f"no user {args.user!r} among those of {data.name} with "
                            f"{config['min_count']} events or more")
        seen, users = [seen[users.index(args.user)]], [args.user]
    longest = config["max_len"] or len(data.items)
    writer, scorer = csv.writer(sys.stdout, lineterminator="\n"), model_scorer(params)
    writer.writerow(["user", "rank", "item", "title", "score"])
    for first in range(0, len(users), GROUP):
        group = seen[first:first + GROUP]
        scores = scorer([history[-longest:] for history in group])
        best_of_each = best_items(scores, group, args.top, config["rank_seen"])
        for user, best in zip(users[first:], best_of_each):
            for rank, (v, score) in enumerate(best, 1):
                writer.writerow([user, rank, info["item_ids"][v], info["titles"][v],
                                 f"{score:.4f}"])
        if not sys.stdout.isatty():                # there the rows themselves show it
            progress(f"user {first + len(group):,} of {len(users):,}")
    progress("")


def known_histories(data, item_ids):
    """Every user's history in the items of a model with these raw ids, [0] where it knows none.
    Raises DataError where it knows no item of the data."""
    known = {raw: v for v, raw in enumerate(item_ids)}            # "" is 0, "nothing", in both
    items = np.array([known.get(raw, 0) for raw in data.item_ids])
    n_items, n_unknown = len(items) - 1, np.count_nonzero(items[1:] == 0)
    if n_unknown == n_items:
        raise DataError(f"{data.name}: the model knows none of its {n_items:,} items: here the "
                        f"first id is {data.item_ids[1]!r}, in the model {item_ids[1]!r}")
    if n_unknown:
        print(f"{printable(data.name)}: {n_unknown:,} of {n_items:,} items are unknown to the model"
              " and left out", file=sys.stderr)
    seen = [items[history] for history in full_histories(data)]
    return [history[history > 0] if history.any() else np.array([0]) for history in seen]


HELP = "type words of a title, or an id; or: undo, reset, help, quit"


def typed_lines():
    """Yield what is typed at a prompt, until quit, the end of input or Ctrl-C. Answers help."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401: input() then edits lines and remembers them
    text = "help"
    while text.lower() not in ("quit", "exit"):
        if text.lower() in ("help", ""):
            print(HELP)
        else:
            yield text
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


def answer_lines(params, info, top):
    """An item a line: what to recommend next, by one step of the model, whose cost does not depend
    on the history. From a pipe each is answered by a line, and an empty line begins a new history;
    a terminal has commands and a table, and goes on after an unknown item."""
    titles, find = info["titles"], item_finder(info["item_ids"], info["titles"])
    on_terminal = sys.stdin.isatty()
    # a visit: a history, the state after it (K, 1, H), the scores of what comes next (1, V+1)
    visits = [([], lrurec.init_state(params), model_scorer(params)([[0]]))]
    for n, line in enumerate(typed_lines() if on_terminal else sys.stdin, 1):
        begin, text = time.perf_counter(), line.strip()
        if on_terminal and text.lower() == "undo":
            visits, done = [visits[0], *visits[1:-1]], "undone"   # the empty one stays
        elif not text or (on_terminal and text.lower() == "reset"):
            visits, done = visits[:1], "reset"
        else:
            try:
                item = find(text)
            except DataError as error:
                if not on_terminal:
                    raise DataError(f"standard input, line {n}: {error}") from None
                print(error)
                continue
            history, state, _ = visits[-1]
            hidden, state = lrurec.step(params, state, np.array([item]))
            scores = lrurec.to_host(lrurec.score(params, hidden))
            visits.append(([*history, item], state, scores))
            done = f"added {titles[item]}"
        history, _, scores = visits[-1]
        best, = best_items(scores.copy(), [history], top, info["config"]["rank_seen"])
        if on_terminal:
            microseconds = 1e6 * (time.perf_counter() - begin)
            print_best(best, titles)
            print(f"{done}; top {top} updated in {microseconds:.0f} µs")
        elif text:
            print("\t".join(titles[v] for v, _ in best), flush=True)


# ---- inspect

def disk(lam, radius=10):
    """The eigenvalues on the unit disk, as lines of text: '.' the circle, a digit how many."""
    def cell(z):
        return round(radius * (1 - z.imag)), round(2 * radius * (1 + z.real))

    grid = [[" "] * (4 * radius + 1) for _ in range(2 * radius + 1)]
    for row, column in map(cell, np.exp(1j * np.linspace(0, 2 * np.pi, 40 * radius))):
        grid[row][column] = "."
    for (row, column), count in collections.Counter(map(cell, lam)).items():
        grid[row][column] = str(min(count, 9))
    return ["".join(row).rstrip() for row in grid]


def inspect_command(args, given):
    params, _ = read_model(args.model)
    for k, p in enumerate(lrurec.blocks(params)):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        size, half_life = abs(lam), math.log(2) / np.exp(p["lru.nu_log"])      # |lam| ^ t = 1/2
        low, middle, high = np.quantile(half_life, [0.1, 0.5, 0.9])
        print(f"block {k}: mean |lam| {size.mean():.4f} (from {size.min():.2f} to "
              f"{size.max():.2f}); half-life in events: median {middle:.2f}, 10 % below {low:.2f}, "
              f"10 % above {high:.2f}, longest {half_life.max():.1f}")
        print("\n".join(disk(lam)))


# ---- bench

def median_ms(work, repeat):
    """Milliseconds of work(), a GPU's included, after one call to warm up."""
    times = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        work()
        if lrurec.xp is not np:
            lrurec.xp.cuda.get_current_stream().synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * np.median(times[1:])


def products(pool, params, batch):
    """The matrix products that training on a batch cannot avoid: one forward, two backward each."""
    def shard_products(part):
        N = len(part[0])
        for W in [lrurec.real_view(p) for p in params.values() if p.ndim == 2]:
            x = lrurec.xp.ones((N, W.shape[1]), W.dtype)
            for k in range(0, N, lrurec.ROWS_PER_CHUNK):
                rows = x[k:k + lrurec.ROWS_PER_CHUNK]
                y = rows @ W.T
                y @ W, y.T @ rows

    list(pool.map(shard_products, shards(*batch)))


def bench_training(data, config, pool, rng):
    """A training step beside its products; events a second as items and histories grow."""
    def step_ms(params, batch, repeat):
        opt = lrurec.adamw_init(params)
        return median_ms(lambda: train_step(pool, params, opt, batch, config, 1e-3), repeat)

    params, steps, floors = lrurec.init_params(len(data.item_ids) - 1, rng=rng), [], []
    for batch in batches(training_rows(data, 200), 128, rng):
        steps.append(step_ms(params, batch, 5))
        floors.append(median_ms(lambda: products(pool, params, batch), 5))
    step, floor = np.median(steps), np.median(floors)
    print(f"training step, {data.name}, batches of 128 windows of 200, dropout 0.2: {step:.1f} ms; "
          f"its matrix products alone {floor:.1f} ms; ratio {step / floor:.2f}\n\n"
          "events a second in training, histories of 20, 200 and 2,000 events")
    for n_items in (1349, 10000, 100000):
        params, speeds = lrurec.init_params(n_items, rng=rng), []
        items = rng.integers(1, n_items + 1, 8000)
        for length in (20, 200, 2000):
            batch = items, np.roll(items, -1), np.arange(8000) % length == 0
            speeds.append(8e6 / step_ms(params, batch, 3))
        print(f"  {n_items:7,} items" + "".join(f"{speed:10,.0f}" for speed in speeds))


def bench_inference(rng):
    """One more event by one step, beside the whole history encoded anew."""
    def top(hidden):
        return best_items(lrurec.to_host(lrurec.score(params, hidden)), [[1]], 10)

    params = lrurec.init_params(1349, rng=rng)
    print("\nµs for an event and the new top 10     by step  by encoding anew")
    for length in (10, 100, 1000, 10000):
        history, starts = rng.integers(1, 1350, length), np.arange(length) == 0
        _, state = lrurec.encode(params, history, starts, return_state=True)
        step_ms = median_ms(lambda: top(lrurec.step(params, state, history[:1])[0]), 100)
        encode_ms = median_ms(lambda: top(lrurec.encode(params, history, starts)[-1:]), 20)
        print(f"  after {length:6} events {1e3 * step_ms:21.0f} {1e3 * encode_ms:17.0f}")


def bench_command(args, given):
    config = settle({**given, "dropout": 0.2})
    print(f"NumPy {np.__version__}, {os.cpu_count()} cores, {config['threads']} threads, "
          f"{args.device}")
    with ThreadPoolExecutor(config["threads"]) as pool:
        bench_training(load_data(config), config, pool, np.random.default_rng(0))
    bench_inference(np.random.default_rng(0))
    with contextlib.suppress(ImportError):         # not on Windows
        from resource import RUSAGE_SELF, getrusage
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        print(f"\npeak memory {getrusage(RUSAGE_SELF).ru_maxrss / unit:.0f} MB")


# ---- The terminal and the command line

def progress(text):
    """Show text on the line that updates, cut to its width; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def ctrl_c_sets_a_flag():
    """In this block Ctrl-C sets the flag, a threading.Event, and does nothing else to threads and
    files. Outside the main thread, and where Ctrl-C is ignored, nothing changes."""
    stop, handler = threading.Event(), signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or handler is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, handler)


class Parser(argparse.ArgumentParser):
    def error(self, message):                      # one line, without the usage
        raise DataError(f"{message} (see {self.prog} --help)")


def integer(text):
    return None if text.lower() == "none" else int(text)


def make_parser():
    """The flags of all commands. argparse converts, check_setting judges."""
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    converters = {int: integer, float: float, str: str}

    def command(name, function, text, settings=(), needs_model=False):
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(function=function, device="cpu")
        if needs_model:
            p.add_argument("model", metavar="MODEL.npz", help="a model of a training run")
        for setting in settings:
            default, kind, _, meaning = SETTINGS[setting]
            how = {"action": "store_true"} if kind is bool else {"type": converters[kind]}
            if needs_model and setting != "threads":
                default = "the model's"
            p.add_argument(flag(setting), help=f"{meaning} (default: {default})",
                           default=argparse.SUPPRESS, **how)       # only what was typed
        if settings:
            p.add_argument("--device", choices=("cpu", "gpu"),
                           help="gpu: an NVIDIA GPU through CuPy (default: cpu)")
        return p

    p = command("train", train_command, "train a model (the default command)", SETTINGS)
    p.add_argument("--out", metavar="DIR",
                   help="new folder of the run (default: runs/NAME, runs/NAME-2, ...)")
    p.add_argument("--resume", action="store_true",
                   help="continue the run in --out, or the last in runs/")
    command("evaluate", evaluate_command, "print the metrics of a saved model",
            ["data", "columns", "threads"], needs_model=True)
    p = command("compare", compare_command, "print the metrics of runs, and their mean")
    p.add_argument("folders", nargs="+", metavar="RUN", help="folder of a finished run")
    p = command("recommend", recommend_command, "recommend for a history or for users",
                ["data", "columns"], needs_model=True)
    p.add_argument("items", nargs="*", metavar="TITLE-OR-ID", help="the history, oldest first; "
                   "without one an interactive session, or lines from a pipe")
    p.add_argument("--new-user", action="store_true", help="for a user without a history")
    p.add_argument("--user", metavar="ID", help="for this user of the data, as CSV")
    p.add_argument("--all-users", action="store_true", help="for all users of the data, as CSV")
    p.add_argument("--top", type=int, default=10, help="number of recommendations (default: 10)")
    command("inspect", inspect_command, "print eigenvalues and half-lives", needs_model=True)
    p = command("bench", bench_command, "time training steps and single events",
                ["data", "threads"])
    p.epilog = "Profile: python -m cProfile -s tottime train.py --threads 1 --epochs 1"
    return parser


def parse_arguments(argv):
    """-> args, and the settings among them that were typed, a dict. Raises DataError."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "recommend" and not any(word.startswith("-") for word in rest):
        args.items, rest = args.items + rest, []   # those after a flag, before Python 3.12.7
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, {name: value for name, value in vars(args).items() if name in SETTINGS}


# Have glibc keep what a step frees for the next one: otherwise it goes back to the system and is
# fetched again page by page, which takes 20 % of the time. Elsewhere this does nothing.
with contextlib.suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 2 ** 25)                           # M_MMAP_THRESHOLD: map only arrays above 32 MB
    mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD: never trim the heap
    mallopt(-8, 1)                                 # M_ARENA_MAX: one heap for all threads


def main(argv=None):
    """Run the program -> exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    # A stream that the shell closed (>&-) is None; what would go to one output goes to the other
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stderr = sys.stderr or sys.stdout or open(os.devnull, "w")
    sys.stdout = sys.stdout or sys.stderr
    for stream in (sys.stdin, sys.stdout, sys.stderr):            # text of any alphabet, anywhere
        if hasattr(stream, "reconfigure"):
            encoding = None if stream.isatty() else "utf-8"       # a terminal keeps its own
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        args, given = parse_arguments(sys.argv[1:] if argv is None else argv)
        lrurec.use_device(args.device)
        args.function(args, given)
        sys.stdout.flush()
        return 0
    except SystemExit:                             # --help
        return 0
    except KeyboardInterrupt:
        return 130
    except (DataError, RuntimeError) as error:     # the latter: no GPU
        message = str(error)
    except MemoryError:
        message = "out of memory: lower --d-model, --n-blocks, --batch-size, --max-len or --threads"
    except OSError as error:
        if error.filename is None:                 # Python would try to print the rest at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):     # a pipe into head, say
            return 2 if args.command == "train" else 0
        message = (f"{error.filename or 'output'}: {error.strerror or error}: check the path, its "
                   "permissions and the free disk space")
    progress("")
    print("train.py: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
