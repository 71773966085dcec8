# SPDX-License-Identifier: MIT
"""The program: train LRURec, evaluate a saved model, recommend with it, look inside.

    python train.py                      train on ML-100K with the defaults, start to finish
    python train.py train --help         the flags of a training run (train may be left out)
    python train.py COMMAND --help       the same for evaluate, compare, recommend, inspect, bench

Read on to "A run's files" and you have seen how the model is trained. The model itself is in
lrurec.py; filtering, splits and batches are in data.py.
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
import functools
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

import data as reader
import lrurec
from data import DataError, printable

SHARD_ROWS = 2000             # rows of a shard of a batch, about
BATCH_EVENTS = 1400           # events in a batch of the default size, about
GROUP = 16                    # users evaluated at once
MAX_NORM = 5.0                # gradients are clipped to this norm, as published
KS = (1, 5, 10, 20, 50)
BEST = "Recall@10"            # on validation: picks the epoch that is kept
SHOWN = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")


@contextlib.contextmanager
def ctrl_c_waits():
    """Ctrl-C takes effect when the block, or the function that this decorates, has ended. Amid the
    locks of threads or the opening of an archive Python might hang, or print a traceback."""
    caught = []
    guarded = (signal.getsignal(signal.SIGINT) is signal.default_int_handler
               and threading.current_thread() is threading.main_thread())
    if guarded:
        signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        if guarded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if caught:
        raise KeyboardInterrupt


# ---- Evaluation

def leave_out(scores, seen):
    """Set the scores of "nothing" and of each user's history to -inf, in place."""
    scores[:, 0] = -np.inf
    rows = np.repeat(np.arange(len(seen)), [len(history) for history in seen])
    scores[rows, np.concatenate(seen)] = -np.inf


def ranks(scores, seen, truth):
    """Rank, from 0, of each user's true item among all items but those in the history.

    scores (users, V+1), used up; seen: a list of histories; truth (users,) -> (users,) float.
    A tie counts against us; a true item found in the history is a miss: infinite rank.
    """
    users = np.arange(len(truth))
    true_scores = scores[users, truth]
    leave_out(scores, seen)
    ahead = (~(scores < true_scores[:, None])).sum(1) - 1.0       # nan is ahead, itself is not
    ahead[np.isneginf(scores[users, truth])] = np.inf
    return ahead


def metrics(rank):
    """Ranks from 0 (users,) -> {"Recall@k", "NDCG@k" for k in KS, "MRR"}: means over users."""
    gain = 1 / np.log2(rank + 2)
    table = {f"Recall@{k}": float((rank < k).mean()) for k in KS}
    table.update({f"NDCG@{k}": float((gain * (rank < k)).mean()) for k in KS})
    return {**table, "MRR": float((1 / (rank + 1)).mean())}


@ctrl_c_waits()
def evaluate(scorer, data, split, max_len=None, threads=1):
    """Metrics of scorer, from a list of histories to scores (users, V+1), on split, "validation" or
    "test". Raises DataError where no user has enough events."""
    seen, truth = reader.histories(data, split, max_len)

    def group_ranks(first):
        users = slice(first, first + GROUP)
        scores = np.asarray(scorer(seen[users]))
        shape = len(seen[users]), len(data.item_ids)
        if scores.shape != shape:
            raise ValueError(f"a scorer's scores must be (users, V+1), {shape} "
                             f"(got {scores.shape})")
        scores = np.array(scores, np.result_type(scores, np.float32))     # a copy, used up
        return ranks(scores, seen[users], truth[users])

    with ThreadPoolExecutor(threads) as pool:
        return metrics(np.concatenate(list(pool.map(group_ranks, range(0, len(seen), GROUP)))))


def model_scorer(params):
    """The model as a scorer for evaluate."""
    def scorer(seen):
        lengths = [len(history) for history in seen]
        if not lengths or 0 in lengths:
            raise ValueError("histories must hold one event or more; a new user's is [0]")
        ends = np.cumsum(lengths)
        starts = np.isin(np.arange(ends[-1]), ends - lengths)     # a wall before each history
        hidden = lrurec.encode(params, np.concatenate(seen), starts)
        return lrurec.to_host(lrurec.score(params, hidden[lrurec.xp.asarray(ends - 1)]))
    return scorer


def baseline_scorers(data):
    """Popularity, and a first-order Markov chain with popularity as tie-break, as scorers."""
    rows = reader.training_rows(data)
    size = len(data.item_ids)
    popularity = np.bincount(rows.targets, minlength=size).astype(float)
    fraction = popularity / (len(rows.targets) + 1)               # < 1: it breaks ties only
    # pairs of an item and the next one, as a number, in order
    pairs = rows.items.astype(np.int64) * size + rows.targets
    pairs, counts = np.unique(pairs, return_counts=True)

    def by_popularity(seen):
        return np.tile(popularity, (len(seen), 1))

    def by_markov(seen):
        scores = np.tile(fraction, (len(seen), 1))
        for user, history in enumerate(seen):
            last = int(history[-1])
            first, end = np.searchsorted(pairs, [last * size, (last + 1) * size])
            scores[user, pairs[first:end] % size] += counts[first:end]
        return scores

    return {"popularity": by_popularity, "markov": by_markov}


# ---- Training

def fit(data, config, folder, run=None):
    """Train until patience or epochs run out -> run, the state of the training, a dict: config,
    params, mean (what is validated and saved as the model: the running mean of params, or params
    itself where config["average"] is 0), opt, epoch, history (a dict per epoch).

    config names what differs from DEFAULTS; how the data were read is known. With run, a state to
    continue from, it names what differs from the run's config. After every epoch folder holds
    model.npz (the best epoch) and last.npz (all that continuing needs). Raises DataError for a
    wrong config, nobody to validate on and a loss that is not finite.
    """
    config = checked_config(data, config, folder, run)
    rows = reader.training_rows(data, config["max_len"])
    reader.histories(data, "validation")           # DataError now, not after the first epoch
    if config["batch_size"] is None:
        n_windows = len(rows.windows) - 1
        config["batch_size"] = max(1, round(BATCH_EVENTS * n_windows / len(rows.items)))
    if run is None:
        params = lrurec.init_params(len(data.item_ids) - 1, config["d_model"],
                                    n_blocks=config["n_blocks"], max_phase=config["max_phase"],
                                    rng=np.random.default_rng(config["seed"]))
        mean = {name: p.copy() for name, p in params.items()} if config["average"] else params
        run = {"params": params, "mean": mean, "opt": lrurec.adamw_init(params), "epoch": 0,
               "history": [], "digest": data.digest}
    run["config"] = config
    os.makedirs(folder, exist_ok=True)
    with ThreadPoolExecutor(config["threads"]) as pool:
        while (run["epoch"] < config["epochs"]
               and run["epoch"] - best_epoch(run) < config["patience"]):
            begin = time.perf_counter()
            loss = train_epoch(pool, rows, run)
            validation = evaluate(model_scorer(run["mean"]), data, "validation",
                                  config["max_len"], config["threads"])
            line = end_epoch(run, loss, validation, time.perf_counter() - begin)
            write_run(folder, run, data, validation)
            print(line, flush=True)                # what is printed is saved
    return run


def checked_config(data, config, folder, run):
    """config, completed from the run or the data. Raises DataError where these disagree."""
    known = run["config"] if run else {"data": data.name, **data.settings}
    config = full_config({**known, **config})
    for name, value in data.settings.items():
        if config[name] != value:
            raise DataError(f"{name} is {config[name]!r}, but the data were read with {value!r}")
    if run:
        check_unchanged(config, run)
        if data.digest != run["digest"] or not os.path.exists(os.path.join(folder, "model.npz")):
            raise DataError(f"{data.name} and {folder} must be the data and the folder of the run")
    return config


def check_unchanged(config, run):
    """DataError where config differs from the run's in more than may change on the way."""
    free = "epochs", "patience", "data", "threads"
    for name in config:
        if name not in free and config[name] != run["config"][name]:
            raise DataError(f"--{name.replace('_', '-')}: the run has {run['config'][name]}: leave "
                            "it out, or start a new run")


def best_epoch(run):
    """The first epoch of the best validation; 0 before the first epoch."""
    recalls = [epoch[BEST] for epoch in run["history"]]
    return recalls.index(max(recalls)) + 1 if recalls else 0


def train_epoch(pool, rows, run):
    """One more epoch of AdamW steps, over all windows in random order -> mean loss."""
    params, opt, config, losses = run["params"], run["opt"], run["config"], []
    epoch = run["epoch"] + 1
    n_batches = math.ceil((len(rows.windows) - 1) / config["batch_size"])
    n_steps = n_batches * config["epochs"]
    begin = time.perf_counter() - sum(past["seconds"] for past in run["history"])
    rng = np.random.default_rng([config["seed"], epoch])          # for the order of the windows
    for batch in reader.batches(rows, config["batch_size"], rng):
        lr = config["lr"]
        if config["schedule"] == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * (opt["step"] / n_steps)))
        loss = train_step(pool, params, opt, batch, config, lr)
        if config["average"]:                      # mean <- mean + (1 - d)(p - mean), d rising
            d = min(config["average"], (1 + opt["step"]) / (10 + opt["step"]))
            for name, p in params.items():
                run["mean"][name] += (1 - d) * (p - run["mean"][name])
        losses.append(lrurec.xp.asarray(loss))
        done = run["epoch"] * n_batches + len(losses)
        left = (time.perf_counter() - begin) * (n_steps - done) / done
        progress(f"epoch {epoch}/{config['epochs']}  batch {len(losses)}/{n_batches}  "
                 f"at most {left:.0f} s to go")
    progress("")
    losses = lrurec.to_host(lrurec.xp.stack(losses))             # here a GPU is first waited for
    if not np.isfinite(losses).all() or not finite(params):
        raise DataError(f"the loss is not finite in epoch {epoch}: lower --lr")
    return float(losses.mean())


def train_step(pool, params, opt, batch, config, lr):
    """One step of AdamW, in place -> the batch's mean loss."""
    loss, grads = gradients(pool, params, batch, config, opt["step"])
    lrurec.clip_gradients(grads, MAX_NORM)
    lrurec.adamw_update(params, grads, opt, lr, config["weight_decay"])
    return loss


@ctrl_c_waits()
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
    """Cut a batch into shards of about SHARD_ROWS rows, at the walls nearest to equal parts: an
    even number, for two threads to share; on a GPU one."""
    n = 2 * max(1, round(len(items) / SHARD_ROWS / 2)) if lrurec.xp is np else 1
    walls = np.append(0, np.flatnonzero(starts))
    middles = (walls[1:] + walls[:-1]) / 2         # up to middles[i], walls[i] is the nearest
    cuts = walls[np.searchsorted(middles, len(items) * np.arange(1, n) / n)]
    cuts = np.unique(cuts[cuts > 0])
    return list(zip(*(np.split(array, cuts) for array in (items, targets, starts))))


def end_epoch(run, loss, validation, seconds):
    """Enter an epoch into run -> the line that says how it went."""
    run["epoch"] += 1
    run["history"].append({"epoch": run["epoch"], "loss": loss, BEST: validation[BEST],
                           "NDCG@10": validation["NDCG@10"], "seconds": seconds})
    mark = "*" if best_epoch(run) == run["epoch"] else " "
    return (f"epoch {run['epoch']:3d}  loss {loss:.4f}  validation {BEST} {validation[BEST]:.4f} "
            f"{mark}  {seconds:.1f} s")


def finite(params):
    return all(bool(lrurec.xp.isfinite(p).all()) for p in params.values())


def progress(text):
    """Show text on the one line that updates; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<78}\r{text}", end="", file=sys.stderr, flush=True)


# ---- A run's files

@ctrl_c_waits()
def write_run(folder, run, data, validation):
    """model.npz, if this epoch is the best, then last.npz. Raises OSError."""
    common = {"config": run["config"], "digest": data.digest, "epoch": run["epoch"]}
    if run["epoch"] == best_epoch(run):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "metrics.json"))       # of the model before
        lrurec.save(os.path.join(folder, "model.npz"), run["mean"], **common,
                    validation=validation, item_ids=data.item_ids, titles=data.titles)
    arrays, opt = dict(run["params"]), run["opt"]
    for kind, values in (("mean", run["mean"]), ("m", opt["m"]), ("v", opt["v"])):
        arrays.update({f"{kind}/{name}": value for name, value in values.items()})
    lrurec.save(os.path.join(folder, "last.npz"), arrays, **common, step=opt["step"],
                history=run["history"])


@contextlib.contextmanager
def reading(path, failure):
    """Whatever a missing, damaged or harmful file raises becomes a DataError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds {failure} ({type(error).__name__}: {error})") from None


def read_run(folder):
    """What write_run wrote into last.npz -> run. Raises DataError."""
    path = os.path.join(folder, "last.npz")
    if not os.path.exists(path):
        raise DataError(f"{folder} has no epoch saved yet: start in a new folder, without --resume")
    with reading(path, "no run to resume: start a new one"):
        arrays, extra = lrurec.load(path)
        run = {name: extra[name] for name in ("epoch", "history", "digest")}
        config = run["config"] = full_config(extra["config"])
        names = [name for name in arrays if "/" not in name]
        params, mean, m, v = ({name: arrays[kind + name] for name in names}
                              for kind in ("", "mean/", "m/", "v/"))
        run.update(params=params, mean=mean if config["average"] else params,
                   opt={"step": extra["step"], "m": m, "v": v})
        if not best_epoch(run) <= run["epoch"] == len(run["history"]) <= extra["step"]:
            raise ValueError("epoch, history and step do not fit together")
    return run


def read_model(path):
    """A model.npz of write_run -> params, extra. Raises DataError."""
    with reading(path, "no sound model: give a model.npz that `python train.py train` wrote"):
        params, extra = lrurec.load(path)
        names = "config", "digest", "epoch", "validation", "item_ids", "titles"
        extra = {name: extra[name] for name in names}
        config = extra["config"] = full_config(extra["config"])
        for name in ("item_ids", "titles"):
            extra[name] = [printable(str(text)) for text in extra[name]]
        V, D, n_blocks = len(extra["item_ids"]) - 1, config["d_model"], config["n_blocks"]
        shapes = [block["lru.B"].shape for block in lrurec.blocks(params)]
        if (params["item_embedding"].shape != (V + 1, D) or shapes != n_blocks * [(D, 2 * D)]
                or len(extra["titles"]) != V + 1):
            raise ValueError(f"not of {V} items, {n_blocks} blocks and width {D}")
        like = lrurec.init_params(V, D, n_blocks=n_blocks)        # no larger than the file
        if not finite(params) or [(name, p.shape, p.dtype) for name, p in params.items()] != [
                (name, p.shape, p.dtype) for name, p in like.items()]:
            raise ValueError("not the names, shapes and types of a model, or not finite")
    return params, extra


def full_config(config, argv=()):
    """DEFAULTS, overridden by config, then by the flags in argv. The values are checked by the
    parser of the command line. Raises DataError."""
    words = []
    for name, value in config.items():
        if name not in DEFAULTS:
            raise DataError(f"no setting {name!r}: choose from {', '.join(DEFAULTS)}")
        if value is not None or name == "max_len":
            words.append(f"--{name.replace('_', '-')}={value}")
    return parse_arguments(["train", *words, *argv]).config


# ---- train, evaluate, compare

def load_data(config, titles=None, digest=None):
    """The data that config names; where a digest is given, only if it is theirs."""
    data = reader.load_dataset(config["data"], config["min_count"], config["ties"], config["seed"],
                               config["columns"], titles)
    if digest not in (None, data.digest):
        raise DataError(f"{config['data']} has other events than the training had: give its file "
                        "with --data, or train anew")
    return data


def print_table(results):
    """results: name -> metrics."""
    width = max(map(len, results))
    print(" " * width + "".join(f"{metric:>11}" for metric in SHOWN))
    for name, table in results.items():
        print(f"{name:<{width}}" + "".join(f"{table[metric]:11.4f}" for metric in SHOWN))


def new_folder(args):
    """Make a new run's folder: --out, or the first free of runs/NAME, runs/NAME-2, ... Only one run
    can make it, so two never share one. Raises DataError."""
    name = os.path.basename(args.data).split(".")[0] or "data"
    folder, n = args.out or os.path.join("runs", name), 1
    while True:
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            if args.out:
                raise DataError(f"{folder} exists: choose another --out, or --resume its run"
                                ) from None
        n += 1
        folder = os.path.join("runs", f"{name}-{n}")


def train_command(args):
    """Train in a new folder, or go on in that of the run to resume."""
    if args.resume:
        runs = glob.glob(os.path.join("runs", "*", "last.npz"))
        if not args.out and not runs:
            raise DataError("no run in runs/ to resume: give the folder of one with --out")
        folder = args.out or os.path.dirname(max(runs, key=os.path.getmtime))
    else:
        folder = new_folder(args)
    last = os.path.join(folder, "last.npz")
    try:
        if args.resume:
            train_and_test(folder, *resumed(folder, args))
        else:
            train_and_test(folder, args.config, load_data(args.config, args.titles))
    except (KeyboardInterrupt, BrokenPipeError) as error:
        progress("")
        what = "\ninterrupted" if isinstance(error, KeyboardInterrupt) else "output pipe closed"
        hint = "nothing was saved yet"
        if args.resume:
            hint = "completed epochs are saved, continue with the same command"
        elif os.path.exists(last):
            hint = ("completed epochs are saved, continue with: python train.py train --resume "
                    f"--out {shlex.quote(folder.replace(os.sep, '/'))} --device {args.device}")
        print(f"{what}; {printable(hint)}", file=sys.stderr)
        raise
    finally:
        if not args.resume and not os.path.exists(last):
            shutil.rmtree(folder)                  # a run that saved nothing leaves nothing
            with contextlib.suppress(OSError):
                os.rmdir("runs")


def resumed(folder, args):
    """The run in folder -> config, data, run. Raises DataError."""
    run = read_run(folder)
    config = full_config(run["config"], args.argv)
    check_unchanged(config, run)
    _, model = read_model(os.path.join(folder, "model.npz"))
    return config, load_data(config, digest=run["digest"])._replace(titles=model["titles"]), run


def train_and_test(folder, config, data, run=None):
    """Train, test beside the baselines, report."""
    users, items, events = len(data.user_ids), len(data.item_ids) - 1, len(data.items)
    layout = f"{data.layout}; " if data.layout else ""
    print(printable(f"{data.name}: {users:,} users, {items:,} items, {events:,} events; {layout}"
                    f"ties by {config['ties']}; run in {folder}"), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)           # fit reports what matters
        run = fit(data, config, folder, run)
    params, model = read_model(os.path.join(folder, "model.npz"))
    config = run["config"]                         # with the batch size that fit has chosen
    baselines = {name: evaluate(scorer, data, "test", config["max_len"])
                 for name, scorer in baseline_scorers(data).items()}
    test = evaluate(model_scorer(params), data, "test", config["max_len"], config["threads"])
    seconds = sum(epoch["seconds"] for epoch in run["history"])
    report = {"data": {"name": data.name, "users": users, "items": items, "events": events,
                       "digest": data.digest},
              "config": {**config, "out": folder}, "epoch": model["epoch"], "seconds": seconds,
              "history": run["history"], "validation": model["validation"], "test": test,
              "baselines": baselines}
    with lrurec.whole_file(os.path.join(folder, "metrics.json")) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    print(f"\ntest, best epoch {model['epoch']}, trained for {seconds:.0f} s")
    print_table({"popularity": baselines["popularity"], "Markov chain": baselines["markov"],
                 "LRURec": test})


def evaluate_command(args):
    params, model = read_model(args.model)
    config = {**model["config"], "data": args.data or model["config"]["data"]}
    data = load_data(config, digest=model["digest"])
    print_table({split: evaluate(model_scorer(params), data, split, config["max_len"],
                                 args.threads) for split in ("validation", "test")})


def compare_command(args):
    """Validation and test metrics of finished runs, their mean and sample standard deviation."""
    tables, digests = {"validation": {}, "test": {}}, {}
    for run in args.runs:
        path = os.path.join(run, "metrics.json")
        with reading(path, "no metrics to compare: give the folder of a finished run"):
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
            for split, table in tables.items():
                table[printable(run)] = {name: float(report[split][name]) for name in SHOWN}
            drawn = report["config"]["ties"] == "random"          # each seed's data has its digest
            digests[report["data"]["events" if drawn else "digest"]] = run
    if len(digests) > 1:
        raise DataError(f"{' and '.join(digests.values())} are runs of different data")
    for split, table in tables.items():
        values = [list(row.values()) for row in table.values()]
        if len(values) > 1:
            table["mean"] = dict(zip(SHOWN, np.mean(values, 0)))
            table["± sample std"] = dict(zip(SHOWN, np.std(values, 0, ddof=1)))
        print(split)
        print_table(table)


# ---- recommend: for a history, for users of the data, or one event at a time

def best_items(scores, seen, n):
    """Each user's n best items that are not in the history: a list of (item, score), best first.
    scores (users, V+1), where the histories become -inf; seen: a list of histories."""
    leave_out(scores, seen)
    n = min(n, scores.shape[1])
    candidates = np.argpartition(-scores, n - 1, axis=1)[:, :n]   # the n best, in any order
    best = []
    for row, items in zip(scores, candidates):
        items = items[np.argsort(-row[items])]
        best.append([(int(v), float(row[v])) for v in items if row[v] > -np.inf])
    return best


@functools.cache
def folded(title):
    """A title as it is searched: "Lion King, The (1994)" is "the lion king (1994)"."""
    return re.sub(r"^(.*), (the|an?|l[ae]s?|der|die|das|il|el)(?= \(|$)", r"\2 \1", title.lower())


def find_item(text, item_ids, titles):
    """The item that text names: its raw id, else its title, else the one title it is a part of.
    Letter case and the place of an article do not matter. Raises DataError with candidates."""
    text = text.strip()
    if text and text in item_ids:
        return item_ids.index(text)
    wanted, names = folded(text), {v: folded(title) for v, title in enumerate(titles) if title}
    found = [v for v, name in names.items() if name == wanted]
    if not found and text:
        found = [v for v, name in names.items() if wanted in name]
    if not found:
        raise DataError(f"no item {text!r}: give a title, a part of one, or an id")
    if len(found) > 1:
        listed = "; ".join(f"{titles[v]} [{item_ids[v]}]" for v in found[:8])
        raise DataError(f"{text!r} matches {len(found)} items: {listed}: give more, or the id")
    return found[0]


def recommend_command(args):
    if bool(args.items) + args.new_user + (args.user is not None) + args.all_users > 1:
        raise DataError("give one of: titles or ids, --new-user, --user, --all-users")
    params, model = read_model(args.model)
    item_ids, titles = model["item_ids"], model["titles"]
    if args.user is not None or args.all_users:
        recommend_for_users(params, model, args)
    elif args.data:
        raise DataError("--data goes with --user or --all-users")
    elif args.items or args.new_user:
        history = [find_item(text, item_ids, titles) for text in args.items] or [0]
        print_best(best_items(model_scorer(params)([history]), [history], args.top)[0], titles)
    elif sys.stdin.isatty():
        session(params, item_ids, titles, args.top)
    else:
        answer_lines(params, item_ids, titles, args.top)


def print_best(best, titles):
    width = max([len(titles[v]) for v, _ in best], default=0)
    for rank, (v, score) in enumerate(best, 1):
        print(f"{rank:2}  {titles[v]:<{width}} {score:8.3f}")


def recommend_for_users(params, model, args):
    """Print a CSV of users' best items: user,rank,item,title,score."""
    config = model["config"]
    if args.data:                                  # other data: users with any number of events
        config = {**config, "data": args.data, "min_count": 0}
    data = load_data(config)
    known_item = {raw: v for v, raw in enumerate(model["item_ids"])}
    items = np.array([known_item.get(raw, 0) for raw in data.item_ids])
    users, histories = data.user_ids, []
    longest = config["max_len"] or len(data.items)
    for events in reader.full_histories(data):
        known = items[events][items[events] > 0]   # without items that the model does not know
        histories.append(known if len(known) else np.array([0]))
    if args.user is not None:
        if args.user not in users:
            raise DataError(f"no user {args.user!r} among those of {data.name} with "
                            f"{config['min_count']} events or more")
        histories, users = [histories[users.index(args.user)]], [args.user]
    writer, scorer = csv.writer(sys.stdout, lineterminator="\n"), model_scorer(params)
    writer.writerow(["user", "rank", "item", "title", "score"])
    for first in range(0, len(users), GROUP):
        seen = histories[first:first + GROUP]
        scores = scorer([history[-longest:] for history in seen])
        for user, best in zip(users[first:], best_items(scores, seen, args.top)):
            for rank, (v, score) in enumerate(best, 1):
                item, title = model["item_ids"][v], model["titles"][v]
                writer.writerow([user, rank, item, title, f"{score:.4f}"])
        if not sys.stdout.isatty():                # there the rows themselves show it
            progress(f"user {first + len(seen):,} of {len(users):,}")
    progress("")


def new_visit(params):
    """A visit: a history, the state (K, 1, H) after it, the scores (1, V+1) of what comes next."""
    return [], lrurec.init_state(params), model_scorer(params)([[0]])


def one_more(params, visit, item):
    """visit after one more event, by one step: its cost does not depend on the history."""
    history, state, _ = visit
    hidden, state = lrurec.step(params, state, np.array([item]))
    return [*history, item], state, lrurec.to_host(lrurec.score(params, hidden))


def answer_lines(params, item_ids, titles, top):
    """From a pipe: an item a line, answered by a line; an empty one begins a new history."""
    visit = new_visit(params)
    for n, line in enumerate(sys.stdin, 1):
        if line.isspace():
            visit = new_visit(params)
            continue
        try:
            item = find_item(line, item_ids, titles)
        except DataError as error:
            raise DataError(f"standard input, line {n}: {error}") from None
        visit = history, _, scores = one_more(params, visit, item)
        print("\t".join(titles[v] for v, _ in best_items(scores, [history], top)[0]), flush=True)


HELP = "type a title, a part of one, or an id; or: undo, reset, help, quit"


def session(params, item_ids, titles, top):
    """Read titles and commands from the terminal until quit, end of input or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401: input() then edits lines and remembers them
    visits = [new_visit(params)]
    print(HELP)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command = text.lower()
        if command in ("undo", "reset", "help", "quit", "exit"):
            for v in [v for v, title in enumerate(titles) if title.lower() == command]:
                print(f"{text} is taken as the command; for the item type its id, {item_ids[v]}")
        if command in ("quit", "exit"):
            return
        if command in ("help", ""):
            print(HELP)
            continue
        if command not in ("undo", "reset"):
            try:
                item = find_item(text, item_ids, titles)
            except DataError as error:
                print(error)
                continue
        begin = time.perf_counter()
        if command == "undo":
            visits = [visits[0], *visits[1:-1]]    # the empty one stays
        elif command == "reset":
            visits = visits[:1]
        else:
            visits.append(one_more(params, visits[-1], item))
        history, _, scores = visits[-1]
        best, = best_items(scores, [history or [0]], top)
        spent = time.perf_counter() - begin
        print_best(best, titles)
        print(f"{len(history)} event(s); top {top} updated in {spent * 1e6:.0f} µs")


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


def inspect_command(args):
    params, _ = read_model(args.model)
    for k, p in enumerate(lrurec.blocks(params)):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        size = abs(lam.astype(complex))
        half_life = np.log(0.5) / np.log(np.clip(size, 1e-300, 1 - 1e-16))
        low, middle, high = np.quantile(half_life, [0.1, 0.5, 0.9])
        print(f"block {k}: mean |lam| {size.mean():.4f} (from {size.min():.2f} to "
              f"{size.max():.2f}); half-life in events: median {middle:.2f}, 10 % below {low:.2f}, "
              f"10 % above {high:.2f}, longest {half_life.max():.1f}")
        print("\n".join(disk(lam)))


# ---- bench

def timed(work, repeat=5):
    """Median seconds of work(), a GPU's included, after one call to warm up."""
    seconds = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        work()
        if lrurec.xp is not np:
            lrurec.xp.cuda.get_current_stream().synchronize()
        seconds.append(time.perf_counter() - begin)
    return np.median(seconds[1:])


def products(params, n):
    """The matrix products that training on n rows cannot avoid: one forward, two backward each."""
    for W in [lrurec.real_view(p) for p in params.values() if p.ndim == 2]:
        x = lrurec.xp.ones((n, W.shape[1]), W.dtype)
        for k in range(0, n, lrurec.ROWS_PER_CHUNK):
            rows = x[k:k + lrurec.ROWS_PER_CHUNK]
            y = rows @ W.T
            y @ W, y.T @ rows


def bench_training(config, rng):
    """A training step beside its matrix products; events a second for more and more items."""
    def step_ms(params, batch, repeat):
        opt = lrurec.adamw_init(params)
        return timed(lambda: train_step(pool, params, opt, batch, config, 1e-3), repeat) * 1e3

    def products_ms(params, batch):
        sizes = [len(items) for items, _, _ in shards(*batch)]
        return timed(lambda: list(pool.map(lambda n: products(params, n), sizes))) * 1e3

    data = load_data(config)
    params, times = lrurec.init_params(len(data.item_ids) - 1, rng=rng), []
    with ThreadPoolExecutor(config["threads"]) as pool:
        for batch in reader.batches(reader.training_rows(data, 200), 128, rng):
            times.append((step_ms(params, batch, 5), products_ms(params, batch)))
        step, floor = np.median(times, 0)
        print(f"training step, {data.name}, batches of 128 windows of 200, dropout 0.2: {step:.1f} "
              f"ms; its matrix products alone {floor:.1f} ms; ratio {step / floor:.2f}\n\n"
              "events a second in training, histories of 20, 200 and 2,000 events")
        for n_items in (1349, 10000, 100000):
            params, speeds = lrurec.init_params(n_items, rng=rng), []
            items = rng.integers(1, n_items + 1, 8000)
            for length in (20, 200, 2000):
                batch = items, np.roll(items, -1), np.arange(8000) % length == 0
                speeds.append(8e6 / step_ms(params, batch, 3))
            print(f"  {n_items:7,} items" + "".join(f"{speed:10,.0f}" for speed in speeds))


def bench_inference(rng):
    """One event more by one step, beside the whole history encoded anew."""
    def top(hidden):
        return best_items(lrurec.to_host(lrurec.score(params, hidden)), [[1]], 10)

    params = lrurec.init_params(1349, rng=rng)
    print("\nµs for an event and the new top 10     by step  by encoding anew")
    for length in (10, 100, 1000, 10000):
        history, starts = rng.integers(1, 1350, length), np.arange(length) == 0
        _, state = lrurec.encode(params, history, starts, return_state=True)
        by_step = timed(lambda: top(lrurec.step(params, state, history[:1])[0]), 100) * 1e6
        by_encode = timed(lambda: top(lrurec.encode(params, history, starts)[-1:]), 20) * 1e6
        print(f"  after {length:6} events {by_step:21.0f} {by_encode:17.0f}")


def bench_command(args):
    print(f"NumPy {np.__version__}, {os.cpu_count()} cores, {args.threads} threads, {args.device}")
    config = {**DEFAULTS, "data": args.data, "threads": args.threads, "dropout": 0.2}
    bench_training(config, np.random.default_rng(0))
    bench_inference(np.random.default_rng(0))
    with contextlib.suppress(ImportError):         # not on Windows
        from resource import RUSAGE_SELF, getrusage
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        print(f"\npeak memory {getrusage(RUSAGE_SELF).ru_maxrss / unit:.0f} MB")


# ---- The command line

class Parser(argparse.ArgumentParser):
    def error(self, message):                      # one line, without the usage
        raise DataError(f"{message} (see {self.prog} --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):            # without "(default: None)"
        return super()._get_help_string(action) if action.default else action.help


def number(kind, low, high=2 ** 31 - 1):
    """A type for argparse: text -> an int or a float from low to high."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high} (got {text!r})")
    return convert


def length_or_none(text):
    return None if text.lower() == "none" else number(int, 1)(text)


def source(text):
    """A file's path is made absolute: a run may be resumed from another folder."""
    return text if text in reader.NAMES else os.path.abspath(text)


def make_parser():
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        p = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        p.set_defaults(run=run)
        return p

    training = command("train", train_command, "train a model (the default command)")
    evaluation = command("evaluate", evaluate_command, "print the metrics of a saved model")
    comparison = command("compare", compare_command, "print the metrics of runs, and their mean")
    recommending = command("recommend", recommend_command, "recommend for a history or for users")
    inspection = command("inspect", inspect_command, "print eigenvalues and half-lives")
    benchmark = command("bench", bench_command, "time training steps and single events")
    benchmark.epilog = "Profile: python -m cProfile -s tottime train.py --threads 1 --epochs 1"
    add_training_flags(training.add_argument)
    comparison.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    for p in (evaluation, recommending, inspection):
        p.add_argument("model", metavar="MODEL.npz", help="a model of a training run")
    recommending.add_argument("--top", type=number(int, 1), default=10,
                              help="number of recommendations")
    whom = recommending.add_argument
    whom("items", nargs="*", metavar="TITLE-OR-ID", help="the history, oldest first; without one "
         "an interactive session, or lines from a pipe")
    whom("--new-user", action="store_true", help="for a user without a history")
    whom("--user", metavar="ID", help="for this user of the data, as CSV")
    whom("--all-users", action="store_true", help="for all users of the data, as CSV")
    for p in (evaluation, recommending):
        p.add_argument("--data", type=source, help="as in train (default: the model's own data)")
    benchmark.add_argument("--data", type=source, default="ml-100k", help="as in train")
    for p in (training, evaluation, recommending, benchmark):
        p.add_argument("--threads", type=number(int, 1, 1024), default=os.cpu_count() or 1,
                       help="any number gives the same results")
        p.add_argument("--device", choices=("cpu", "gpu"), default="cpu",
                       help="gpu: an NVIDIA GPU through CuPy")
    return parser


def add_training_flags(add):
    count, rate = number(int, 1), number(float, 0, 1000)
    add("--data", type=source, default="ml-100k", help="a file of interactions, ml-100k or ml-1m")
    add("--out", metavar="DIR", help="new folder of the run (default: runs/NAME, runs/NAME-2, ...)")
    add("--resume", action="store_true", help="continue the run in --out, or the last in runs/")
    add("--epochs", type=count, default=50, help="maximum number of epochs")
    add("--patience", type=count, default=15, help="epochs without a better validation Recall@10")
    add("--seed", type=number(int, 0), default=42, help="random seed")
    add("--batch-size", type=count, help=f"windows (default: about {BATCH_EVENTS} events)")
    add("--max-len", type=length_or_none, default=200, help="events of a history, or none for all")
    add("--dropout", type=number(float, 0, 0.99), default=0.5, help="dropout rate")
    add("--lr", type=rate, default=2e-3, help="learning rate of AdamW")
    add("--schedule", choices=("constant", "cosine"), default="constant",
        help="of the learning rate; cosine falls to 0 over --epochs")
    add("--weight-decay", type=rate, default=0.01, help="weight decay of AdamW")
    add("--average", type=number(float, 0, 0.999999), default=0.0,
        help="decay of a running mean of the weights, which is then the model (default: 0, none)")
    add("--d-model", type=number(int, 1, 2 ** 16), default=64, help="model width")
    add("--n-blocks", type=number(int, 1, 1000), default=2, help="number of blocks")
    add("--max-phase", type=number(float, 1e-9, 1), default=0.01,
        help="part of the circle where the eigenvalues start; 1: all of it")
    add("--min-count", type=number(int, 0), default=5,
        help="drop items, then users, with fewer events; 0 keeps all")
    add("--ties", choices=("item", "file", "random"), default="item",
        help="order of events of equal time: by item id, as in the file, or random")
    add("--columns", metavar="USER,ITEM[,TIME]", help="names in the header, or numbers from 1")
    add("--titles", type=source, help="a file of item ids and titles")


def parse_arguments(argv):
    """-> args; args.config: the flags that train saves with a run. Raises DataError."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    args, rest = PARSER.parse_known_args(argv)
    if args.command == "recommend" and not any(word.startswith("-") for word in rest):
        args.items, rest = args.items + rest, []   # those after a flag, before Python 3.12.7
    if rest:
        PARSER.error(f"unrecognized arguments: {' '.join(rest)}")
    args.argv = argv[1:]
    args.config = {name: value for name, value in vars(args).items()
                   if name not in ("command", "run", "out", "resume", "device", "argv")}
    return args


PARSER = make_parser()
DEFAULTS = parse_arguments(["train"]).config

# Have glibc keep what a step frees for the next one: otherwise it goes back to the system and is
# fetched again page by page, which takes 20 % of the time. Elsewhere this does nothing.
with contextlib.suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 2 ** 25)                           # M_MMAP_THRESHOLD: map only arrays above 32 MB
    mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD: never trim the heap
    mallopt(-8, 1)                                 # M_ARENA_MAX: one heap for all threads


def main(argv=None):
    """Run the program -> exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    sys.stdin = sys.stdin or open(os.devnull)      # the shell may have closed some: 2>&-, >&-, <&-
    sys.stdout = sys.stdout or sys.stderr or open(os.devnull, "w")
    sys.stderr = sys.stderr or sys.stdout
    for stream in (sys.stdin, sys.stdout, sys.stderr):            # text of any alphabet, anywhere
        if hasattr(stream, "reconfigure"):
            encoding = None if stream.isatty() else "utf-8"       # a terminal keeps its own
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        lrurec.use_device(getattr(args, "device", "cpu"))
        args.run(args)
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
