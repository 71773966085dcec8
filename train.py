# SPDX-License-Identifier: MIT
"""The program: train LRURec on a data set, evaluate a saved model, recommend with it, look inside.

    python train.py                              ML-100K with the defaults, start to finish
    python train.py train --data FILE --epochs 50 --out runs/mine
    python train.py train --out runs/mine --resume
    python train.py evaluate runs/mine/model.npz
    python train.py recommend runs/mine/model.npz "Star Wars" "Fargo"
    python train.py recommend runs/mine/model.npz            an interactive session
    python train.py inspect runs/mine/model.npz
    python train.py bench

No mathematics of the model stands here: see lrurec.py, and data.py for the protocol's data side.
"""
import os

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
                 "VECLIB_MAXIMUM_THREADS"):
    os.environ[variable] = "1"                     # the workers below share out shards instead

import argparse
import collections
import contextlib
import ctypes
import difflib
import errno
import itertools
import json
import math
import mmap
import multiprocessing
import shlex
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np

import data as reader
import lrurec
from data import DataError

SHARD_ROWS = 1000             # a batch is cut into shards of about so many rows
GROUP_ROWS = 2048             # so many are encoded at once in the evaluation
BUFFER = 1024                 # entries, into which NumPy copies short rows first; by its own 8192
                              # it copies longer rows too, at 3 % of the time
MAX_NORM = 5.0                # of the gradients, as published
KS = (1, 5, 10, 20, 50)
BEST = "Recall@10"            # on validation: picks the epoch that is kept

# of the authors' code; the bench runs these
PUBLISHED = {"batch_size": 128, "max_len": 200, "dropout": 0.2, "lr": 1e-3, "weight_decay": 0.01,
             "max_phase": 1.0}
NOT_SAVED = ("out", "resume", "threads", "device")
OLDER_RUNS = {"schedule": "constant", "max_phase": 1.0}           # before there were such flags
FREE = ("epochs", "patience", *NOT_SAVED)          # may differ on --resume


# ---------------------------------------------------------------------------------------------
# Workers

CAN_FORK = sys.platform == "linux"                 # elsewhere it is missing, or not safe
AHEAD = 2                                          # tasks handed out at once, for each worker


@contextlib.contextmanager
def workers(function, n):
    """Yield a map for function: tasks (a list) -> the results in order, from n processes.

    Processes, since a thread needs the interpreter's one lock between any two NumPy calls, and
    waiting for it takes longer than a small call. They are forked: function and all that it
    refers to are there as they were then; only arrays made by `shared` stay common. Where that
    cannot be done: threads. For one worker, and on a GPU: this process. Task k + AHEAD n begins
    when result k has been taken.
    """
    if n == 1 or lrurec.xp is not np:
        yield lambda tasks: map(function, tasks)
        return
    if CAN_FORK:
        pool, work = ProcessPoolExecutor(n, multiprocessing.get_context("fork"),
                                         begin_work, (function,)), do_work
    else:
        pool, work = ThreadPoolExecutor(n, initializer=np.setbufsize, initargs=(BUFFER,)), function

    def in_order(tasks):
        futures = collections.deque()
        for task in tasks:
            if len(futures) == AHEAD * n:
                yield futures.popleft().result()
            with no_ctrl_c():                      # workers, forked here, inherit that
                futures.append(pool.submit(work, task))
        while futures:
            yield futures.popleft().result()

    with pool:
        try:
            yield in_order
        except BaseException:                      # a pool that could not start does not end either
            for child in multiprocessing.active_children():
                child.terminate()
            raise


@contextlib.contextmanager
def no_ctrl_c():
    """Ctrl-C waits until the end, and never comes to a process forked in between."""
    if CAN_FORK:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if CAN_FORK:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin_work(function):
    """In a forked process, which is to end with its parent, even where that is killed."""
    global do_work_on
    do_work_on = function
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def do_work(task):
    return do_work_on(task)


def shared(arrays):
    """Zeros of the shapes and types of a dict of arrays, which processes forked later have in
    common. (On a GPU one process does all the work.)"""
    if lrurec.xp is not np:
        return {name: lrurec.xp.zeros_like(array) for name, array in arrays.items()}
    return {name: np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
            for name, array in arrays.items()}


# ---------------------------------------------------------------------------------------------
# Evaluation

def ranks(scores, seen, truth):
    """Rank, from 0, of each user's true item among all items but those in the history.

    scores (users, V+1), used up; seen: a list of histories; truth (users,) -> (users,) float.
    A tie counts against us; a true item found in the history is a miss: infinite rank.
    """
    users = np.arange(len(truth))
    scores[:, 0] = -np.inf
    true_scores = scores[users, truth]
    rows = np.repeat(users, [len(s) for s in seen])
    scores[rows, np.concatenate(seen)] = -np.inf
    ahead = (~(scores < true_scores[:, None])).sum(1) - 1.0       # itself not counted
    ahead[np.isneginf(scores[users, truth])] = np.inf
    return ahead


def metrics(rank):
    """Ranks from 0 (users,) -> {"Recall@k", "NDCG@k" for k in KS, "MRR"}: means over users."""
    table = {f"Recall@{k}": float((rank < k).mean()) for k in KS}
    gain = 1 / np.log2(rank + 2)
    table.update({f"NDCG@{k}": float((gain * (rank < k)).mean()) for k in KS})
    return {**table, "MRR": float((1 / (rank + 1)).mean())}


def evaluate(scorer, data, split, max_len=None, n=1):
    """Metrics of scorer(list of histories) -> scores (users, V+1) on "validation" or "test", by n
    workers."""
    seen, truth = reader.histories(data, split, max_len)
    if not len(truth):
        return None
    most_users = max(1, 2 ** 22 // len(data.item_ids))            # bounds users x V scores
    groups, rows = [[]], 0
    for user, history in enumerate(seen):
        if groups[-1] and (rows + len(history) > GROUP_ROWS or len(groups[-1]) >= most_users):
            groups.append([])
            rows = 0
        groups[-1].append(user)
        rows += len(history)

    def group_ranks(group):
        history = [seen[user] for user in group]
        return ranks(scorer(history), history, truth[group])

    with workers(group_ranks, min(n, len(groups))) as call:
        return metrics(np.concatenate(list(call(groups))))


def model_scorer(params):
    """The model as a scorer for evaluate."""
    def scorer(seen):
        starts = np.concatenate([np.arange(len(history)) == 0 for history in seen])
        hidden = lrurec.encode(params, np.concatenate(seen), starts)
        last = np.cumsum([len(history) for history in seen]) - 1
        return lrurec.to_host(lrurec.score(params, hidden[lrurec.xp.asarray(last)]))
    return scorer


def baseline_scorers(data):
    """Popularity, and a first-order Markov chain with popularity as tie-break, as scorers."""
    rows = reader.training_rows(data)
    size = len(data.item_ids)
    popularity = np.bincount(rows.targets, minlength=size).astype(float)
    fraction = popularity / (len(rows.targets) + 1)               # < 1: it breaks ties only
    follows = rows.items > 0
    pairs, counts = np.unique(rows.items[follows] * size + rows.targets[follows],
                              return_counts=True)

    def by_popularity(seen):
        return np.tile(popularity, (len(seen), 1))

    def by_markov(seen):
        scores = np.tile(fraction, (len(seen), 1))
        for user, history in enumerate(seen):
            a, b = np.searchsorted(pairs, [history[-1] * size, (history[-1] + 1) * size])
            scores[user, pairs[a:b] % size] += counts[a:b]
        return scores

    return {"popularity": by_popularity, "markov": by_markov}


# ---------------------------------------------------------------------------------------------
# Training

def n_shards(n_rows):
    """An even number, for two workers to share, of about SHARD_ROWS rows each (on a GPU one)."""
    return 1 if lrurec.xp is not np else 2 * max(1, round(n_rows / SHARD_ROWS / 2))


def shards(items, targets, starts):
    """Cut a batch into shards, at the walls nearest to equal parts."""
    n = n_shards(len(items))
    walls = np.flatnonzero(starts)
    wanted = len(items) * np.arange(1, n) / n
    cuts = np.unique(walls[abs(walls[:, None] - wanted).argmin(0)])
    cuts = cuts[0 < cuts]
    return list(zip(*(np.split(array, cuts) for array in (items, targets, starts))))


@contextlib.contextmanager
def gradient_workers(params, config, n_rows):
    """Yield params, a copy whose changes all workers see, and a function gradients: a batch, the
    step's number -> the batch's mean loss, its gradients.

    The shards, their random streams and the order of the sums depend on batch and step alone, so
    that the result does not depend on how many workers there are. No more of them start than a
    batch of n_rows has shards.
    """
    n, originals = min(config["threads"], n_shards(n_rows)), params
    params, *slots = (shared(originals) for _ in range(1 + AHEAD * n))
    for name, p in originals.items():
        params[name][...] = p

    def shard_loss(task):
        slot, seed, weight, shard = task
        rng = np.random.default_rng(seed)
        loss, grads = lrurec.loss_and_grads(params, *shard, config["dropout"], rng)
        for name, g in grads.items():
            lrurec.xp.multiply(g, weight, out=slots[slot][name])  # a slot holds one shard's
        return weight * loss

    with workers(shard_loss, n) as call:
        def gradients(batch, step):
            parts = shards(*batch)
            weights = np.array([np.count_nonzero(targets) for _, targets, _ in parts])
            weights = weights / weights.sum()
            tasks = [(k % len(slots), [config["seed"], step, k], float(weights[k]), parts[k])
                     for k in range(len(parts))]
            loss, total = 0, None
            for (slot, *_), part in zip(tasks, call(tasks)):
                loss = loss + part
                if total is None:
                    total = {name: g.copy() for name, g in slots[slot].items()}
                else:
                    for name, g in slots[slot].items():
                        total[name] += g
            return loss, total
        yield params, gradients


def train_step(params, opt, batch, config, gradients):
    """One AdamW step on a batch -> its mean loss."""
    loss, grads = gradients(batch, opt["step"])
    lrurec.clip_gradients(grads, MAX_NORM)
    lrurec.adamw_update(params, grads, opt, config["lr"], config["weight_decay"])
    return loss


def fit(data, config, folder, run=None):
    """Train until patience or epochs run out -> run, the state of the training.

    config: as DEFAULTS. run: what `read_run` returned, to go on from there. After every epoch
    folder holds model.npz (the best epoch) and last.npz (all that going on needs).
    """
    rows = reader.training_rows(data, config["max_len"])
    if run is None:
        params = lrurec.init_params(len(data.item_ids) - 1, config["d_model"],
                                    n_blocks=config["n_blocks"], max_phase=config["max_phase"],
                                    rng=np.random.default_rng(config["seed"]))
        run = {"params": params, "opt": lrurec.adamw_init(params), "epoch": 0, "seconds": 0.0,
               "best": {"epoch": 0, "validation": None}, "history": []}
    while (run["epoch"] < config["epochs"]
           and run["epoch"] - run["best"]["epoch"] < config["patience"]):
        fit_epoch(data, rows, config, folder, run)
    return run


def fit_epoch(data, rows, config, folder, run):
    """One more epoch of run: its steps, its validation, its files and its line."""
    opt, best = run["opt"], run["best"]
    begin, epoch, losses = time.perf_counter(), run["epoch"] + 1, []
    n_batches = -(-(len(rows.windows) - 1) // config["batch_size"])
    rng = np.random.default_rng([config["seed"], epoch])          # for the order of the windows
    n_rows = len(rows.items) / n_batches
    with gradient_workers(run["params"], config, n_rows) as (params, gradients):
        for n, batch in enumerate(reader.batches(rows, config["batch_size"], rng), 1):
            lr = learning_rate(config, opt["step"] / (n_batches * config["epochs"]))
            losses.append(train_step(params, opt, batch, {**config, "lr": lr}, gradients))
            done = (n + n_batches * (epoch - 1)) / (n_batches * config["epochs"])
            spent = run["seconds"] + time.perf_counter() - begin
            progress(f"epoch {epoch}/{config['epochs']}  batch {n}/{n_batches}  "
                     f"at most {spent / done - spent:.0f} s to go")
    run["params"] = params
    losses = lrurec.to_host(lrurec.xp.stack([lrurec.xp.asarray(loss) for loss in losses]))
    if not finite(params):
        losses[-1] = np.nan                        # the last step broke them
    if not np.isfinite(losses).all():
        batch = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
        kept = f"; {folder} keeps the {epoch - 1} before" if epoch > 1 else ""
        raise DataError(f"the loss is not finite in epoch {epoch}, batch {batch}: lower --lr{kept}")
    validation = evaluate(model_scorer(params), data, "validation", config["max_len"],
                          config["threads"])
    value = validation and validation[BEST]        # None: there is no user to validate on
    star = value is None or best["validation"] is None or value > best["validation"][BEST]
    seconds = time.perf_counter() - begin
    run["epoch"], run["seconds"] = epoch, run["seconds"] + seconds
    run["history"].append({"epoch": epoch, "loss": float(losses.mean()), BEST: value,
                           "seconds": seconds})
    if star:
        run["best"] = {"epoch": epoch, "validation": validation}
    write_run(folder, run, config, data)
    progress("")
    result = "no user to validate on" if value is None else f"validation {BEST} {value:.4f}"
    print(f"epoch {epoch:3d}  loss {losses.mean():.4f}  {result}{' *' if star else '  '}"
          f"  {seconds:.1f} s", flush=True)


def learning_rate(config, done):
    """The step size after a fraction `done` of --epochs: --lr, or half a cosine from it to 0."""
    cosine = config["schedule"] == "cosine"
    return config["lr"] * (0.5 * (1 + math.cos(math.pi * done)) if cosine else 1)


def finite(params):
    return all(bool(lrurec.xp.isfinite(p).all()) for p in params.values())


def write_run(folder, run, config, data):
    """model.npz, if this epoch is the best, then last.npz."""
    common = {"config": {name: config[name] for name in config if name not in NOT_SAVED},
              "digest": data.digest, "epoch": run["epoch"]}
    if run["epoch"] == run["best"]["epoch"]:
        lrurec.save(os.path.join(folder, "model.npz"), run["params"], **common,
                    item_ids=data.item_ids, titles=data.titles)
    opt = run["opt"]
    moments = {f"{kind}/{name}": opt[kind][name] for kind in "mv" for name in opt[kind]}
    lrurec.save(os.path.join(folder, "last.npz"), run["params"], **common, step=opt["step"],
                best=run["best"], seconds=run["seconds"], history=run["history"], **moments)


def read_run(path):
    """What write_run wrote -> run, config, digest. Raises DataError."""
    params, extra = load_model(path, ("step", "epoch", "best", "seconds", "history"),
                               "the run cannot go on: start a new one with another --out")
    asarray = lrurec.xp.asarray
    opt = {"step": extra["step"],
           **{kind: {name: asarray(extra[f"{kind}/{name}"]) for name in params} for kind in "mv"}}
    run = {"params": params, "opt": opt,
           **{name: extra[name] for name in ("epoch", "seconds", "best", "history")}}
    return run, extra["config"], extra["digest"]


def load_model(path, keys=("epoch", "item_ids", "titles"),
               remedy="give a model.npz that `python train.py train` wrote"):
    """lrurec.load for a file of this program -> params, extra. Raises DataError, one line."""
    try:
        params, extra = lrurec.load(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}: {remedy}") from None
    except ValueError as error:
        raise DataError(f"{error}: {remedy}") from None
    missing = [key for key in ("config", "digest", *keys) if key not in extra]
    missing += [name for name in ("item_embedding",) if name not in params]
    try:
        config = extra["config"] = {**OLDER_RUNS, **extra["config"]}
        missing += [f"config {name}" for name in DEFAULTS if name not in (*NOT_SAVED, *config)]
        n_items = len(params["item_embedding"]) - 1
        none = lrurec.init_params(0, config["d_model"], n_blocks=config["n_blocks"])
        shapes = {name: p.shape for name, p in none.items()}
        for name in ("item_embedding", "output_bias"):            # one row for each item
            shapes[name] = (n_items + 1, *shapes[name][1:])
        missing += [f"{name} of shape {shape}" for name, shape in shapes.items()
                    if name not in params or params[name].shape != shape]
        missing += ["finite numbers"] * (not finite(params))
        missing += [f"{n_items} {key}" for key in ("item_ids", "titles")
                    if key in keys and len(extra[key]) != n_items + 1]
    except (KeyError, TypeError, ValueError):      # KeyError: its cause is in missing already
        missing += ["a sound configuration"]
    if missing:
        raise DataError(f"{path} lacks {missing[0]}: {remedy}")
    return params, extra


def progress(text):
    """Show text on the one line that updates; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<78}" + "\r" * (not text), end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Commands

def load_data(config):
    columns = config["columns"] and config["columns"].split(",")
    if columns and config["data"] in reader.NAMES:
        raise DataError(f"--columns: {config['data']} is no file of yours: leave the flag out")
    return reader.load_dataset(config["data"], config["min_count"], config["ties"],
                               config["seed"], columns)


def print_table(results):
    """results: name -> metrics or None."""
    names = ["Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"]
    width = max(map(len, results))
    print(" " * width + "".join(f"{name:>11}" for name in names))
    for name, table in results.items():
        cells = "".join(f"{table[m]:11.4f}" for m in names) if table else "   no user to evaluate"
        print(f"{name:<{width}}{cells}")


def choose_folder(config):
    """The run's folder, made here so that no two runs share one: --out, or the first of runs/NAME,
    runs/NAME-2, ... that is not there yet; on --resume the last one that is."""
    out, name = config["out"], os.path.basename(config["data"]).split(".")[0] or "data"
    numbered = (os.path.join("runs", f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    if config["resume"]:
        folder = out or [os.path.join("runs", name),
                         *itertools.takewhile(os.path.exists, numbered)][-1]
        if not holds_run(folder):
            raise DataError(f"{folder} holds no run to resume: give its folder with --out")
        return folder
    if out:
        if holds_run(out):
            raise DataError(f"{out} holds a run: go on with --resume, or choose another --out")
        os.makedirs(out, exist_ok=True)
        return out
    for folder in numbered:
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)
            return folder


def holds_run(folder):
    return all(os.path.exists(os.path.join(folder, f)) for f in ("last.npz", "model.npz"))


def train_command(given):
    config = {**DEFAULTS, **given}
    new = not os.path.isdir(config["out"] or "")
    folder = choose_folder(config)
    try:
        return train_in(folder, config, given)
    except KeyboardInterrupt:
        progress("")
        again = f"python train.py train --resume --out {shlex.quote(folder)}"
        print("\ninterrupted; " + (f"every whole epoch is saved; go on with: {again}"
                                   if holds_run(folder) else "nothing was saved yet"),
              file=sys.stderr)
        return 130
    finally:
        if new and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)                       # a run that did not begin leaves nothing
            if not config["out"] and not os.listdir("runs"):
                os.rmdir("runs")


def train_in(folder, config, given):
    run = None
    if config["resume"]:
        run, run_config, digest = read_run(os.path.join(folder, "last.npz"))
        for name, value in given.items():
            if name not in FREE and run_config[name] != value:
                there = "none" if run_config[name] is None else run_config[name]
                raise DataError(f"--{name.replace('_', '-')}: the run in {folder} has {there}: "
                                "leave the flag out, or start a new run")
        config = {**config, **run_config, **given}
    data = load_data(config)
    if run and digest != data.digest:
        raise DataError(f"{folder} was trained on other data than {config['data']} now holds: "
                        "start a new run with another --out")
    numbers = {"name": data.name, "users": len(data.offsets) - 1, "items": len(data.item_ids) - 1,
               "events": len(data.items), "digest": data.digest}
    print(f"{data.name}: {numbers['users']:,} users, {numbers['items']:,} items, "
          f"{numbers['events']:,} events; {data.layout}ties by {config['ties']}; run in {folder}",
          flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)           # fit reports what matters
        run = fit(data, config, folder, run)
        params, extra = load_model(os.path.join(folder, "model.npz"))
        if extra["epoch"] != run["best"]["epoch"]:                # killed between the two files
            raise DataError(f"{folder}/model.npz is of epoch {extra['epoch']}, and last.npz ends "
                            f"before it: resume with --epochs {extra['epoch']} or more")
        test = evaluate(model_scorer(params), data, "test", config["max_len"], config["threads"])
        baselines = {name: evaluate(scorer, data, "test", config["max_len"])
                     for name, scorer in baseline_scorers(data).items()}
    report = {"data": numbers, "config": {**config, "out": folder}, "epoch": run["best"]["epoch"],
              "seconds": run["seconds"], "history": run["history"],
              "validation": run["best"]["validation"], "test": test, "baselines": baselines}
    reader.write_whole(os.path.join(folder, "metrics.json"),
                       (json.dumps(report, indent=1) + "\n").encode())
    print(f"\ntest, best epoch {run['best']['epoch']}, trained for {run['seconds']:.0f} s")
    print_table({"popularity": baselines["popularity"], "Markov chain": baselines["markov"],
                 "LRURec": test})
    return 0


def evaluate_command(given):
    params, extra = load_model(given["model"])
    config = {**DEFAULTS, **extra["config"], **given}
    data = load_data(config)
    if data.digest != extra["digest"]:
        raise DataError(f"{given['model']} was trained on other data than {config['data']}: "
                        "name its data with --data")
    print_table({split: evaluate(model_scorer(params), data, split, config["max_len"],
                                 config["threads"]) for split in ("validation", "test")})
    return 0


# ---------------------------------------------------------------------------------------------
# Recommending, one event at a time

TOP = 10
HELP = "type a title, a part of one, or an id; or: undo, reset, why, help, quit"


def find_item(text, item_ids, titles):
    """The item that text names: its raw id, else its title, else the one title it is a part of.

    Letter case does not matter in titles. Raises DataError with the candidates.
    """
    text = text.strip()
    if text and text in item_ids:
        return item_ids.index(text)
    lower = [title.lower() for title in titles]
    exact = [v for v, title in enumerate(lower) if v and title == text.lower()]
    found = exact or [v for v, title in enumerate(lower) if v and text.lower() in title]
    if text and len(found) == 1:
        return found[0]
    if text and found:
        listed = "; ".join(f"{titles[v]} [{item_ids[v]}]" for v in found[:8])
        raise DataError(f"{text!r} could be {len(found)} items, give more of it or the id: "
                        + listed + ("; ..." if len(found) > 8 else ""))
    close = difflib.get_close_matches(text.lower(), lower[1:], 5, 0.5)
    near = "; ".join(titles[lower.index(title, 1)] for title in close) or "nothing"
    raise DataError(f"no item {text!r}; the nearest: {near}; give one of the model's titles or ids")


def top_items(scores, n=TOP):
    """scores (users, V+1), used up -> the n best items of each user, best first: (users, n)

    n times argmax, which takes a tenth of the time of a partial sort where n is small.
    """
    best = np.empty((len(scores), n), int)
    for k in range(n):
        best[:, k] = scores.argmax(1)
        scores[np.arange(len(scores)), best[:, k]] = -np.inf
    return best


class Visitor:
    """One user's history and state, event by event; undo goes back to the state before."""

    def __init__(self, params):
        self.params, self.history = params, []
        self.states = [lrurec.init_state(params)]
        self.hidden = [lrurec.encode(params, np.array([0]), np.array([True]))[0]]

    def take(self, items):
        """A whole history at once, by one scan."""
        starts = np.arange(len(items)) == 0
        hidden, state = lrurec.encode(self.params, np.array(items), starts, return_state=True)
        self.history += items
        self.states += [None] * (len(items) - 1) + [state]
        self.hidden += list(hidden)

    def add(self, item):
        """One more event, by one step."""
        hidden, state = lrurec.step(self.params, self.states[-1], np.array([item]))
        self.history.append(item)
        self.states.append(state)
        self.hidden.append(hidden[0])

    def top(self):
        """-> items, scores, probabilities of the best TOP items that are not in the history."""
        scores = lrurec.to_host(lrurec.score(self.params, self.hidden[-1]))
        scores[self.history] = -np.inf
        n = min(TOP, len(scores) - 1 - len(set(self.history)))
        exps = np.exp(scores - scores.max()) if n else scores
        best = top_items(scores[None].copy(), n)[0]
        return best, scores[best], exps[best] / exps.sum()

    def why(self):
        """-> the top item, and for each past event the change of its score without that event."""
        best = self.top()[0][0]
        left_out = [self.history[:n] + self.history[n + 1:] or [0]
                    for n in range(len(self.history))]
        scores = model_scorer(self.params)([self.history, *left_out])[:, best]
        return best, scores[1:] - scores[0]


def recommend_command(given):
    params, extra = load_model(given["model"])
    item_ids, titles = extra["item_ids"], extra["titles"]
    visitor = Visitor(params)
    if given.get("items") and given.get("new_user"):
        raise DataError("--new-user takes no history: give it, or items, not both")
    if given.get("items") or given.get("new_user"):
        if given.get("items"):
            visitor.take([find_item(text, item_ids, titles) for text in given["items"]])
        print_top(visitor, titles)
    elif sys.stdin and sys.stdin.isatty():
        session(visitor, item_ids, titles)
    else:
        for n, line in enumerate(sys.stdin or (), 1):
            if line.strip():
                try:
                    visitor.add(find_item(line, item_ids, titles))
                except DataError as error:
                    raise DataError(f"standard input, line {n}: {error}") from None
                print("\t".join(titles[v] for v in visitor.top()[0]), flush=True)
    return 0


def print_top(visitor, titles):
    items, scores, probabilities = visitor.top()
    width = max([len(titles[v]) for v in items], default=0)
    print(f"    {f'after {len(visitor.history)} event(s)':<{width}}    score  probability")
    for place, (v, s, p) in enumerate(zip(items, scores, probabilities), 1):
        print(f"{place:2}  {titles[v]:<{width}} {s:8.3f}     {p:8.4f}")


def session(visitor, item_ids, titles):
    """Read titles and commands from the terminal until quit, end of input or Ctrl-C."""
    print(HELP)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "quit":
            return
        if text == "help" or not text:
            print(HELP)
        elif text == "why":
            if visitor.history and len(visitor.top()[0]):
                best, changes = visitor.why()
                print(f"{titles[best]}: its score without one of the events changes by")
                for item, change in zip(visitor.history, changes):
                    print(f"  {change:+8.3f}  {titles[item]}")
            else:
                print("nothing to explain: no events yet, or no item left")
        elif text == "undo" and not visitor.history:
            print("nothing to undo")
        elif text in ("undo", "reset"):
            n = len(visitor.history) - 1 if text == "undo" else 0     # events that stay
            del visitor.history[n:], visitor.states[n + 1:], visitor.hidden[n + 1:]
            print_top(visitor, titles)
        else:
            try:
                item = find_item(text, item_ids, titles)
            except DataError as error:
                print(error)
                continue
            begin = time.perf_counter()
            visitor.add(item)
            visitor.top()
            spent = time.perf_counter() - begin
            print_top(visitor, titles)
            print(f"{titles[item]} taken in, and the ten best found, in {spent * 1e6:.0f} us")


# ---------------------------------------------------------------------------------------------
# Looking inside

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


def inspect_command(given):
    params, extra = load_model(given["model"])
    for k, p in enumerate(lrurec.blocks(params)):
        lam, _ = lrurec.lam_forward(p["lru.nu_log"], p["lru.theta_log"])
        size = abs(lam.astype(complex))
        half_life = np.log(0.5) / np.log(np.clip(size, 1e-300, 1 - 1e-16))
        low, middle, high = np.quantile(half_life, [0.1, 0.5, 0.9])
        print(f"block {k}: mean |lam| {size.mean():.2f} (from {size.min():.2f} to "
              f"{size.max():.2f}); half-life in events: median {middle:.2f}, 10 % below {low:.2f}, "
              f"10 % above {high:.2f}, longest {half_life.max():.1f}")
        print("\n".join(disk(lam)))
    groups = collections.Counter()
    for name, p in params.items():
        part = name.split(".")[2] if name.startswith("blocks.") else name.split(".")[0]
        groups[part] += lrurec.real_view(p).size
    print("parameters (a complex one counts twice): "
          + ", ".join(f"{part} {n:,}" for part, n in groups.items())
          + f"; in all {sum(groups.values()):,}")
    return 0


# ---------------------------------------------------------------------------------------------
# Speed

PARTS = {"cross-entropy": ["output_loss"],
         "recurrence": ["scan", "scan_backward"],
         "projections": ["complex_in_forward", "complex_in_backward", "complex_out_forward",
                         "complex_out_backward"],
         "feed-forward": ["linear_forward", "linear_backward", "gelu_forward", "gelu_backward"],
         "layer norm": ["layer_norm_forward", "layer_norm_backward"],
         "dropout": ["dropout_forward", "dropout_backward"],
         "embedding": ["embedding_forward", "embedding_backward"],
         "optimizer": ["clip_gradients", "adamw_update"]}


def seconds_of(work):
    begin = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - begin


def timed(work, at_least=3):
    """Median seconds of work() in 0.3 s or more, after one call to warm up."""
    work()
    times, end = [], time.perf_counter() + 0.3
    while len(times) < at_least or time.perf_counter() < end:
        times.append(seconds_of(work))
    return float(np.median(times))


def wait_for_device():
    if lrurec.xp is not np:
        lrurec.xp.cuda.get_current_stream().synchronize()


def floor(params):
    """-> products(shard): the matrix products that nobody can avoid in training on a shard."""
    E, p = params["item_embedding"], lrurec.blocks(params)[0]
    W, B = p["ffn.W1"], lrurec.real_view(p["lru.B"])

    def products(shard):
        n = len(shard[0])
        x, h, f = (lrurec.xp.ones((n, width), E.dtype) for width in
                   (E.shape[1], B.shape[1], W.shape[1]))
        for _ in lrurec.blocks(params):
            for wide, M in ((h, B), (f, W)):       # there and back: (N, D) -> (N, wide) -> (N, D)
                for _ in range(2):
                    x @ M, wide @ M.T, x.T @ wide
        n_rows = lrurec.rows_per_chunk(E)
        for k in range(0, n, n_rows):
            logits = x[k:k + n_rows] @ E.T
            logits @ E, x[k:k + n_rows].T @ logits
    return products


def time_per_part(params, opt, batches, config):
    """Seconds spent in each of PARTS; what a part calls counts as its own. In this process."""
    rest = "the rest"
    spent, current = dict.fromkeys([*PARTS, rest], 0.0), [rest, time.perf_counter()]

    def switch(part):
        wait_for_device()
        now = time.perf_counter()
        spent[current[0]] += now - current[1]
        current[:] = part, now

    def watched(part, function):
        def call(*args, **options):
            if current[0] != rest:
                return function(*args, **options)
            switch(part)
            result = function(*args, **options)
            switch(rest)
            return result
        return call

    with contextlib.ExitStack() as undo:
        for part, names in PARTS.items():
            for name in names:
                original = getattr(lrurec, name)
                undo.callback(setattr, lrurec, name, original)
                setattr(lrurec, name, watched(part, original))
        with gradient_workers(params, {**config, "threads": 1}, 1) as (params, gradients):
            for batch in batches:
                train_step(params, opt, batch, config, gradients)
        switch(rest)
    return spent


def peak_memory(n):
    """Peak resident memory of this process and n workers in MB, what they have in common counted
    for each; None where the system does not tell."""
    try:
        from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
    except ImportError:
        return None
    peak = getrusage(RUSAGE_SELF).ru_maxrss + n * getrusage(RUSAGE_CHILDREN).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def bench_command(given):
    config = {**DEFAULTS, **PUBLISHED, **given}
    data, rng = load_data(config), np.random.default_rng(0)
    params = lrurec.init_params(len(data.item_ids) - 1, rng=rng)
    rows = reader.training_rows(data, config["max_len"])
    batches = list(itertools.islice(reader.batches(rows, config["batch_size"], rng), 12))
    n = config["threads"] if config["device"] == "cpu" else 1
    print(f"NumPy {np.__version__}, {os.cpu_count()} cores, {n} workers, "
          f"{config['device']}; {data.name}, batches of {config['batch_size']} windows of "
          f"{config['max_len']}, dropout {config['dropout']}\n")
    bench_step(params, batches, config)
    bench_scans(rng)
    bench_events(params, rng)
    return 0


def bench_step(params, batches, config):
    opt, n_rows = lrurec.adamw_init(params), np.mean([len(items) for items, _, _ in batches])
    n = min(config["threads"], n_shards(n_rows))
    with (gradient_workers(params, config, n_rows) as (params, gradients),
          workers(floor(params), n) as products):
        pairs = [[(seconds_of(lambda: train_step(params, opt, batch, config, gradients)),
                   seconds_of(lambda: list(products(shards(*batch))))) for batch in batches]
                 for _ in range(6)]
    steps, floors = np.array(pairs[1:]).sum(1).T                  # the first round warms up
    events = sum(len(items) for items, _, _ in batches)
    print(f"training step    {np.median(steps) / len(batches) * 1e3:8.1f} ms   its matrix products "
          f"alone {np.median(floors) / len(batches) * 1e3:.1f} ms   ratio "
          f"{np.median(steps / floors):.2f} (pairs "
          f"{', '.join(f'{r:.2f}' for r in steps / floors)})")
    print(f"                 {events / np.median(steps):8,.0f} events a second")
    spent = time_per_part(params, opt, batches[:4], config)
    print("in one worker    " + ", ".join(f"{part} {s / sum(spent.values()):.0%}" for part, s in
                                          sorted(spent.items(), key=lambda x: -x[1])))
    peak = peak_memory(n if CAN_FORK and n > 1 else 0)
    if peak:
        print(f"peak memory      {peak:8.0f} MB, the workers' included")


def bench_scans(rng):
    print("\nthe three scans, ms        loop  recursive      scan")
    lam = (0.9 * np.exp(1j * np.linspace(0.3, 6, 128))).astype(np.complex64)
    for users, length in ((1, 100), (1, 1000), (1, 10000), (128, 100)):
        u = rng.normal(size=(users * length, 256)).astype(np.float32).view(lam.dtype)
        starts = np.arange(len(u)) % length == 0
        inputs = [lrurec.xp.asarray(array) for array in (lam, u, starts)]
        times = [timed(lambda: scan(*inputs), 1) * 1e3 for scan in
                 (lrurec.scan_loop, lrurec.scan_recursive, lrurec.scan)]
        print(f"  {users:3} x {length:6} events" + "".join(f"{ms:11.3f}" for ms in times))


def bench_events(params, rng):
    def top(hidden):
        return top_items(lrurec.to_host(lrurec.score(params, hidden)))

    n_items = len(params["item_embedding"]) - 1
    print("\none more event of one user, us     step, score, top 10    encode, score, top 10")
    for length in (10, 100, 1000, 10000):
        history = rng.integers(1, n_items + 1, length)
        starts = np.arange(length) == 0
        _, state = lrurec.encode(params, history, starts, return_state=True)
        by_step = timed(lambda: top(lrurec.step(params, state, history[:1])[0]))
        by_encode = timed(lambda: top(lrurec.encode(params, history, starts)[-1:]))
        print(f"  after {length:6} events  {by_step * 1e6:20.0f} {by_encode * 1e6:24.0f}")
    users, state = rng.integers(1, n_items + 1, 1000), lrurec.init_state(params, 1000)
    print(f"  1,000 users at once "
          f"{timed(lambda: top(lrurec.step(params, state, users)[0])) * 1e3:18.1f} us a user")


# ---------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, below=float("inf")):
    """A type for argparse: text -> a number from low on and below `below`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value < below:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no {'whole ' * (kind is int)}number from {low} on"
                + f" and below {below:g}" * (below < float("inf")))
        return value
    return convert


def part_of_circle(text):
    value = number(float, 0)(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def one_of(*choices):
    def convert(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text
    return convert


def max_len(text):
    try:
        return None if text == "none" else number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor none") from None


def source(text):
    """A file's path is kept whole: a run may be resumed from another folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"give {', '.join(reader.NAMES)} or the path of a file")
    return text if text in reader.NAMES else os.path.abspath(text)


def path(text):
    if not text:
        raise argparse.ArgumentTypeError("give the path of a folder")
    return text


def columns(text):
    parts = [part.strip() for part in text.split(",")]
    parts = [str(int(part)) if part.isdecimal() else part for part in parts]
    mixed = len({part.isdecimal() for part in parts}) > 1
    if (len(parts) not in (2, 3) or not all(parts) or len(set(parts)) < len(parts)
            or mixed or "0" in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give USER,ITEM or USER,ITEM,TIME, all names "
                                         "or all numbers from 1")
    return ",".join(parts)


FLAGS = {  # name: default, the commands that take it, help, how it is read, its letter
    "data": ("ml-100k", "train evaluate bench", "ml-100k, ml-1m or the path of a file of "
             "interactions", source, "DATA"),
    "out": (None, "train", "folder of the run (default runs/NAME, runs/NAME-2, ...)", path, "DIR"),
    "resume": (False, "train", "go on with the run in --out, or with the last one", None, None),
    "epochs": (50, "train", "at most so many", number(int, 1), "N"),
    "patience": (15, "train", f"stop after so many epochs without a better validation {BEST}",
                 number(int, 1), "N"),
    "seed": (42, "train", "of initial values, order, dropout and random ties", number(int, 0), "N"),
    "threads": (os.cpu_count() or 1, "train evaluate bench", "worker processes that share out "
                "a batch; the result is the same", number(int, 1), "N"),
    "device": ("cpu", "train evaluate recommend bench", "cpu, or gpu through CuPy",
               one_of("cpu", "gpu"), "cpu|gpu"),
    "batch_size": (16, "train", "windows in a batch", number(int, 1), "N"),
    "max_len": (200, "train", "events in a window and in an evaluated history, or none", max_len,
                "N"),
    "dropout": (0.5, "train", "probability", number(float, 0, 1), "P"),
    "lr": (2e-3, "train", "AdamW's step size", number(float, 0, 1e3), "X"),
    "schedule": ("constant", "train", "of the step size over --epochs: constant, or half a cosine "
                 "to 0", one_of("constant", "cosine"), "constant|cosine"),
    "weight_decay": (0.01, "train", "AdamW's, times lr a step", number(float, 0, 1e3), "X"),
    "d_model": (64, "train", "width D; the state has 2 D, the feed-forward 4 D", number(int, 1),
                "D"),
    "n_blocks": (2, "train", "blocks K", number(int, 1), "K"),
    "max_phase": (0.01, "train", "part of the circle for the first eigenvalues, 1: all of it",
                  part_of_circle, "X"),
    "min_count": (5, "train", "drop items, then users, with fewer events; 0 keeps all",
                  number(int, 0), "N"),
    "ties": ("item", "train", "order of a user's events of equal time: by item id, as in the file, "
             "or random", one_of("item", "file", "random"), "item|file|random"),
    "columns": (None, "train", "USER,ITEM or USER,ITEM,TIME: names in the header, or numbers from "
                "1", columns, "COLS"),
}
DEFAULTS = {name: default for name, (default, *_) in FLAGS.items()}
COMMANDS = {  # name: what runs it, help, examples
    "train": (train_command, "train a model (the default command)", [
        "train --seed 1 --out runs/one", "train --resume --out runs/one --epochs 80",
        "train --data ratings.csv --columns user,movie,when --max-len none"]),
    "evaluate": (evaluate_command, "the metric table of a saved model", [
        "evaluate runs/one/model.npz", "evaluate runs/one/model.npz --data moved.csv"]),
    "recommend": (recommend_command, "the top 10 for a history, or a session", [
        'recommend runs/one/model.npz "Star Wars" "Fargo"',
        "recommend runs/one/model.npz --new-user", "recommend runs/one/model.npz"]),
    "inspect": (inspect_command, "eigenvalues, half-lives and parameter counts of a saved model", [
        "inspect runs/one/model.npz"]),
    "bench": (bench_command, "the speed of all of it, next to its floor, in under two minutes", [
        "bench", "bench --threads 1", "bench --device gpu --data ml-1m"]),
}


def parse_arguments(argv):
    """argv -> command, given: only the flags that were given."""
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text, examples) in COMMANDS.items():
        p = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n  ".join(["for example:", *(f"python train.py {e}" for e in examples)]))
        if name in ("evaluate", "recommend", "inspect"):
            p.add_argument("model", metavar="MODEL.npz", help="a model of a training run")
        if name == "recommend":
            p.add_argument("items", nargs="*", metavar="TITLE-OR-ID", help="the history, oldest "
                           "first; none: a session on a terminal, one item a line from a pipe")
            p.add_argument("--new-user", action="store_true", help="what to show without a history")
        for flag, (default, takers, text, kind, letter) in FLAGS.items():
            if name in takers.split():
                text += "" if default in (None, False) else f" (default {default})"
                how = {"type": kind, "metavar": letter} if kind else {"action": "store_true"}
                p.add_argument("--" + flag.replace("_", "-"), help=text, **how)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    given, rest = parser.parse_known_args(argv)
    given = vars(given)
    # argparse leaves over the items that stand behind a flag
    if given["command"] == "recommend" and not any(word.startswith("-") for word in rest):
        given["items"], rest = [*given.get("items", []), *rest], []
    if rest:
        parser.error(f"{rest[0]!r} is none of this command's flags: see train.py "
                     f"{given['command']} --help")
    return given.pop("command"), given


def keep_memory():
    """Have glibc keep what a step frees for the next one: otherwise it goes back to the system
    and is fetched again page by page, at 5-20 % of the time. Elsewhere this does nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2 ** 25)                       # M_MMAP_THRESHOLD: map only arrays above 32 MB
        mallopt(-1, 2 ** 31 - 1)                   # M_TRIM_THRESHOLD: never trim the heap
        mallopt(-8, 1)                             # M_ARENA_MAX: one heap, threads or not


OUT_OF_MEMORY = "out of memory: lower --d-model, --n-blocks, --batch-size, --max-len or --threads"


def main(argv=None):
    """Run the program -> exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    keep_memory()
    np.setbufsize(BUFFER)
    for stream in (sys.stdin, sys.stdout, sys.stderr):            # text of any alphabet, anywhere
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    command = None
    try:
        command, given = parse_arguments(sys.argv[1:] if argv is None else argv)
        try:
            lrurec.use_device(given.get("device", DEFAULTS["device"]))
        except RuntimeError as error:
            raise DataError(str(error)) from None
        return COMMANDS[command][0](given)
    except SystemExit as exit:
        return exit.code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                        # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if command != "train":
            return 0
        message = "nobody reads the output any more; what was saved is there, go on with --resume"
    except DataError as error:
        message = error
    except (MemoryError, BrokenExecutor):          # the latter: the system killed a worker
        message = OUT_OF_MEMORY
    except OSError as error:
        message = (f"{error.filename or 'output'}: {error.strerror or error}: see to the path, its "
                   "permissions and the space on its disk")
        if error.errno in (errno.ENOMEM, errno.EAGAIN):           # no memory, or no new process
            message = OUT_OF_MEMORY
    progress("")
    print("train.py: " + str(message).replace("\n", " "), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
