# SPDX-License-Identifier: MIT
"""The program: train LRURec, evaluate a saved model, recommend with it, look inside.

    python train.py                                       train on ML-100K with the defaults
    python train.py --data log.csv --out runs/mine        train on a file of your own
    python train.py --resume runs/mine                    continue where that run stopped
    python train.py recommend runs/mine/model.npz "Star Wars" Fargo
    python train.py COMMAND --help                        the flags of a command

Settings, evaluation and training come first: whoever stops at "A run's files" has seen how LRURec
is trained. Then come the commands. The model is in lrurec.py; sequences and batches are in data.py.
"""
# ---- Threads and memory, before NumPy is imported

import contextlib
import ctypes
import os
import sys
import warnings

# Our own threads share the work, so BLAS gets one. It reads these when NumPy is first imported.
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
                "VECLIB_MAXIMUM_THREADS")
if "numpy" in sys.modules and not any(os.environ.get(name) == "1" for name in BLAS_THREADS):
    warnings.warn("NumPy was imported before train.py and uses several BLAS threads: training can "
                  "be eight times slower. Import train first, or set OPENBLAS_NUM_THREADS=1")
os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))

# Have glibc keep what a step frees for the next one: otherwise it goes back to the system and is
# fetched again page by page, which takes 20 % of the time. Elsewhere this does nothing.
with contextlib.suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 2 ** 25)                           # M_MMAP_THRESHOLD: map only arrays above 32 MB
    mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD: never trim the heap
    mallopt(-8, 1)                                 # M_ARENA_MAX: one heap for all threads

import argparse
import collections
import csv
import itertools
import json
import math
import re
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf

import numpy as np

import lrurec
from data import (NAMES, TIES, DataError, batches, full_histories, histories, load_dataset,
                  training_rows)

# ---- The settings of a run

LARGE = 2 ** 31 - 1
SETTINGS = {
    # name: (default, what it may be: a type, the ends of a range, or choices; help)
    "data": ("ml-100k", str, "a file of interactions, ml-100k or ml-1m"),
    "columns": (None, str, "USER,ITEM[,TIME]: names in the header; numbers from 1 without one"),
    "delimiter": (None, str, "what separates the fields, where the first line leaves it open"),
    "titles": (None, str, "a file of item ids and titles"),
    "title_columns": (None, str, "ITEM,TITLE of --titles, as in --columns"),
    "min_count": (5, (0, LARGE), "drop items, then users, with fewer events; 0 keeps all"),
    "ties": ("item", TIES, "order of a user's events at equal times"),
    "rank_seen": (False, bool, "also rank and recommend what is in the history"),
    "max_len": (200, (1, LARGE), "events of a history that the model sees, or none for all"),
    "d_model": (64, (1, LARGE), "model width"),
    "n_blocks": (2, (1, LARGE), "number of blocks"),
    "max_phase": (0.01, (1e-9, 1.0), "fraction of the circle where the eigenvalues start"),
    "dropout": (0.5, (0.0, 0.99), "dropout rate"),
    "lr": (2e-3, (0.0, inf), "learning rate of AdamW"),
    "weight_decay": (0.01, (0.0, inf), "weight decay of AdamW"),
    "average": (0.0, (0.0, 0.999999), "decay of the running mean of the weights; 0: no mean"),
    "batch_size": (None, (1, LARGE), "windows in a batch, or none for about 1,400 events' worth"),
    "epochs": (50, (1, LARGE), "maximum number of epochs"),
    "patience": (15, (1, LARGE), "stop after so many epochs without a better Recall@10"),
    "seed": (42, (0, LARGE), "random seed"),
    "threads": (os.cpu_count() or 1, (1, LARGE), "threads; the results do not depend on it"),
}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}
MAY_DIFFER = ("data", "epochs", "patience", "threads")            # when a run is resumed

BATCH_EVENTS = 1400           # events in a batch of the default size, about
SHARD_ROWS = 2000             # rows of a shard of a batch, about
GROUP = 16                    # users evaluated at once
MAX_NORM = 5.0                # gradients are clipped to this norm, as published
KS = (1, 5, 10, 20, 50)
BEST = "Recall@10"            # on validation: picks the epoch that is kept
SHOWN = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")


def configure(saved=None, **given):
    """All settings of a run, a dict: the defaults, then those saved with a run or a model (names
    that we no longer have are ignored), then those given. Paths become absolute. Raises DataError
    for a wrong setting, and for one that differs from what was saved but is not in MAY_DIFFER."""
    known = DEFAULTS | {name: saved[name] for name in SETTINGS if name in (saved or {})}
    config = known | given
    for name, value in config.items():
        check_setting(name, value)
    for name in ("data", "titles"):
        if config[name] is not None and config[name] not in NAMES:
            config[name] = os.path.abspath(config[name])
    for name in given:
        if saved and name not in MAY_DIFFER and config[name] != known[name]:
            raise DataError(f"{flag(name)} is {config[name]} here, but it was {known[name]} in "
                            "training: leave it out, or start a new run")
    return config


def check_setting(name, value):
    """Raises DataError unless the setting may have this value. Words that only load_dataset needs
    are judged there."""
    if name not in SETTINGS:
        raise DataError(f"no setting {name!r}: choose from {', '.join(SETTINGS)}")
    default, allowed, _ = SETTINGS[name]
    if value is None and (default is None or name == "max_len"):
        return
    kind = kind_of(name)
    if kind in (int, float):
        low, high = allowed
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        right = is_number and low <= value <= high and value < inf             # nan is not
        wanted = "an integer" if kind is int else "a number"
        wanted += f" >= {low}" if high == inf else f" from {low} to {high}"
    else:
        right, wanted = isinstance(value, kind), "text" if kind is str else "True or False"
    if not right:
        raise DataError(f"{flag(name)} must be {wanted} (got {value!r})")


def kind_of(name):
    """The type of a setting: a type as it is, else that of the first end or choice."""
    allowed = SETTINGS[name][1]
    return type(allowed[0]) if isinstance(allowed, tuple) else allowed


def flag(name):
    return "--" + name.replace("_", "-")


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
    rank = (~behind).sum(1) - 1.0                  # the true item is not behind itself
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
    """The model as a scorer for evaluate. It raises DataError where a score is not finite."""
    def scorer(seen):
        if not len(seen) or any(np.ndim(history) != 1 or not len(history) for history in seen):
            raise ValueError("a scorer takes a list of histories, each of one item or more, as in "
                             "[[3, 7]]; a new user's is [0]")
        lengths = [len(history) for history in seen]
        ends = np.cumsum(lengths)
        starts = np.zeros(ends[-1], bool)
        starts[ends - lengths] = True              # a wall before each history
        hidden = lrurec.encode(params, np.concatenate(seen), starts)
        scores = lrurec.to_host(lrurec.score(params, hidden[lrurec.xp.asarray(ends - 1)]))
        if not np.isfinite(scores[:, 1:]).all():                  # column 0 is -inf
            raise DataError("the model's scores are not finite: train with a lower --lr")
        return scores
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

def fit(data, config, folder, resume=False):
    """Train until epochs or patience run out -> state, the dict that new_state describes.

    config: a dict of settings; data: what load_data read by it; folder: where the run's files are
    written or, with resume=True, read too. From before epoch 1 on, last.npz in it has all that
    resuming needs to end with the same bits; model.npz is the best epoch's. Raises DataError for
    data, settings or a folder that do not belong together, and where training diverges.
    """
    config = configure(**config)
    if data.name != config["data"]:
        raise DataError(f"the settings name {config['data']}, but these data are {data.name}: "
                        "read them with load_data(config)")
    rows = training_rows(data, config["max_len"])
    if config["batch_size"] is None:
        config["batch_size"] = usual_batch_size(rows)
    if resume:
        state = read_state(folder)
        refuse_other_data(data, state["digest"])
        state["config"] = configure(state["config"], **config)
    else:
        if os.path.exists(os.path.join(folder, "last.npz")):
            raise DataError(f"{folder} holds a run: give resume=True, or another folder")
        state = new_state(data, config)
        os.makedirs(folder, exist_ok=True)
        save_state(folder, state)                  # epoch 0: from now on it can be resumed
    print(f"ties by {config['ties']}; batches of {config['batch_size']} windows; run in {folder}",
          flush=True)
    history = state["history"]
    n_before = len(history)
    with ThreadPoolExecutor(config["threads"]) as pool:
        while (len(history) < config["epochs"]
               and len(history) - best_epoch(history) < config["patience"]):
            begin = time.perf_counter()
            loss = train_epoch(state, rows, pool)
            validation = evaluate(model_scorer(state["model"]), data, "validation",
                                  config["max_len"], config["threads"], config["rank_seen"])
            epoch, seconds = len(history) + 1, time.perf_counter() - begin
            history.append({"epoch": epoch, "loss": loss, BEST: validation[BEST],
                            "NDCG@10": validation["NDCG@10"], "seconds": seconds})
            save_state(folder, state, validation)
            mark = "*" if best_epoch(history) == epoch else " "
            print(f"epoch {epoch:3d}  loss {loss:.4f}  validation {BEST} {validation[BEST]:.4f} "
                  f"{mark}  {seconds:.1f} s", flush=True)         # what is printed is saved
    if len(history) == n_before:
        print(f"nothing left to train after {n_before} epochs: raise --epochs or --patience")
    return state


def train_epoch(state, rows, pool):
    """One more epoch, in place: a step of AdamW for each batch of windows, in random order
    -> mean loss. Raises DataError where the loss or a weight is not finite."""
    config, params, opt = state["config"], state["params"], state["opt"]
    epoch, begin, losses = len(state["history"]) + 1, time.perf_counter(), []
    n_batches = math.ceil((len(rows.windows) - 1) / config["batch_size"])
    rng = np.random.default_rng([config["seed"], epoch])          # for the order of the windows
    for batch in batches(rows, config["batch_size"], rng):
        loss, grads = gradients(pool, params, batch, config, opt["step"])
        lrurec.clip_gradients(grads, MAX_NORM)
        lrurec.adamw_update(params, grads, opt, config["lr"], config["weight_decay"])
        if config["average"]:
            move_mean(state["model"], params, opt["step"], config["average"])
        losses.append(loss)
        progress(f"epoch {epoch}/{config['epochs']}  batch {len(losses)}/{n_batches}", begin,
                 len(losses), config["epochs"] * n_batches - opt["step"])
    progress("")
    loss = float(lrurec.to_host(lrurec.xp.stack(losses)).mean())  # waits for the GPU
    if not (math.isfinite(loss) and all(lrurec.xp.isfinite(p).all() for p in params.values())):
        raise DataError(f"the loss or a weight is not finite in epoch {epoch}: lower --lr")
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
    n_parts = 2 * max(1, round(N / SHARD_ROWS / 2))               # even: equal work for two threads
    if lrurec.xp is not np:
        n_parts = 1
    walls, cuts = np.append(0, np.flatnonzero(starts)), {0, N}
    for k in range(1, n_parts):
        nearest = abs(walls - k * N / n_parts).argmin()
        cuts.add(int(walls[nearest]))
    cuts = sorted(cuts)
    return [(items[a:b], targets[a:b], starts[a:b]) for a, b in zip(cuts, cuts[1:])]


def move_mean(mean, params, step, decay):
    """mean <- mean + (1 - d)(p - mean), in place; d rises to decay: early weights fade soon."""
    d = min(decay, (1 + step) / (10 + step))
    for name, p in params.items():
        mean[name] += (1 - d) * (p - mean[name])


def usual_batch_size(rows):
    """As many windows as hold about BATCH_EVENTS events."""
    n_windows = len(rows.windows) - 1
    return max(1, round(BATCH_EVENTS * n_windows / len(rows.items)))


def new_state(data, config):
    """The state of a training before its first epoch, a dict:
        config                      the settings
        digest, item_ids, titles    those of the data
        params, opt                 the weights, and the state of AdamW
        model                       the weights that are validated and saved as the model: with
                                    config["average"] a running mean of params, else params itself
        history                     a dict for each epoch so far
    """
    rng = np.random.default_rng(config["seed"])
    params = lrurec.init_params(len(data.item_ids) - 1, config["d_model"],
                                n_blocks=config["n_blocks"], max_phase=config["max_phase"], rng=rng)
    model = {name: p.copy() for name, p in params.items()} if config["average"] else params
    return {"config": config, "digest": data.digest, "item_ids": data.item_ids,
            "titles": data.titles, "params": params, "opt": lrurec.adamw_init(params),
            "model": model, "history": []}


def best_epoch(history):
    """The first epoch of the best validation; 0 before the first epoch."""
    recalls = [epoch[BEST] for epoch in history]
    return recalls.index(max(recalls)) + 1 if recalls else 0


# ---- A run's files: last.npz, model.npz and, at its end, metrics.json

FACTS = ("config", "digest", "item_ids", "titles")                # of a state, in both .npz files


def save_state(folder, state, validation=None):
    """After an epoch: model.npz, where it is the best one, then last.npz. Each takes the place of
    the old one whole, and a run killed between them repeats the epoch, to the same bits. Raises
    DataError."""
    epoch = len(state["history"])
    facts = {name: state[name] for name in FACTS} | {"epoch": epoch}
    if epoch and best_epoch(state["history"]) == epoch:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "metrics.json"))       # of the model before
        with writing(folder, "model.npz") as path:
            lrurec.save(path, state["model"], **facts, validation=validation)
    groups = {"": state["params"], "m/": state["opt"]["m"], "v/": state["opt"]["v"]}
    if state["config"]["average"]:
        groups["mean/"] = state["model"]
    arrays = {prefix + name: p for prefix, group in groups.items() for name, p in group.items()}
    with writing(folder, "last.npz") as path:
        lrurec.save(path, arrays, **facts, step=state["opt"]["step"], history=state["history"])


@contextlib.contextmanager
def writing(folder, name):
    """Yield the path of a run's file, to be written as NAME.part and put in its place. Where that
    fails, the part is deleted; DataError names the folder, which a full disk's OSError does not."""
    path = os.path.join(folder, name)
    try:
        yield path
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        raise DataError(f"{folder} cannot be written ({error.strerror}): check its permissions and "
                        "the free disk space; what was saved there before is whole") from None


@contextlib.contextmanager
def reading(path, kind, advice):
    """What a missing, damaged or other file raises in this block becomes a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: {advice}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: not {kind} ({type(error).__name__}: {error}): {advice}") from None


def read_state(folder):
    """What save_state wrote into last.npz -> state. Raises DataError."""
    path = os.path.join(folder, "last.npz")
    with reading(path, "the state of a run", "--resume takes the folder of a run"):
        arrays, info = lrurec.load(path)
        names = [name for name in arrays if "/" not in name]      # of the weights

        def group(prefix):
            return {name: arrays[prefix + name] for name in names}

        params, state = group(""), {name: info[name] for name in (*FACTS, "history")}
        model = group("mean/") if info["config"]["average"] else params
        opt = {"step": info["step"], "m": group("m/"), "v": group("v/")}
        return {**state, "params": params, "model": model, "opt": opt}


def read_model(path):
    """A model.npz of save_state -> params, info: a dict of config (but for threads, which are this
    machine's), digest, epoch, validation, item_ids and titles. Raises DataError."""
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder: give {os.path.join(path, 'model.npz')}")
    with reading(path, "a model", "give the model.npz of a run"):
        params, info = lrurec.load(path)
        if "step" in info:
            raise ValueError("last.npz is for --resume alone")
        info["config"] = configure(info["config"], threads=DEFAULTS["threads"])
        scores = model_scorer(params)([[0]])       # fails where a name or a shape is not a model's
        if not scores.shape[1] == len(info["item_ids"]) == len(info["titles"]):
            raise ValueError("not as many ids and titles as items")
    return params, info


def new_folder(out, source):
    """Make a run's folder: out, or the first of runs/NAME, runs/NAME-2, ... that is not there yet.
    No two trainings share one, even if started together: only one can make it. Raises DataError."""
    name = os.path.basename(source).split(".")[0] or "data"
    for n in itertools.count(1):
        folder = out or os.path.join("runs", name if n == 1 else f"{name}-{n}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            refuse_existing(out)


def refuse_existing(out):
    if out and os.path.lexists(out):
        raise DataError(f"{out} exists: choose another --out, continue its run with --resume "
                        f"{out}, or delete it")


# ---- train, evaluate, compare

def load_data(config, trained=None):
    """The data that config names. trained: the state or the model of a run on them, whose titles
    are taken; other data are refused. Raises DataError."""
    source, titles, title_columns = config["data"], config["titles"], config["title_columns"]
    if trained:
        titles = title_columns = None
        if source not in NAMES and not os.path.exists(source):
            raise DataError(f"{source} is not there any more: say where it is with --data")
    data = load_dataset(source, config["min_count"], config["ties"], config["seed"],
                        config["columns"], titles, title_columns, config["delimiter"])
    if trained:
        refuse_other_data(data, trained["digest"])
        data = data._replace(titles=trained["titles"])
    histories(data, "validation")                  # raises where there is nobody to evaluate on
    return data


def refuse_other_data(data, digest):
    if data.digest != digest:
        raise DataError(f"{data.name} has other events than the training had: give its file with "
                        "--data, or train a new model")


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
    """Train in a new folder, or continue in that of a run; then test."""
    resume = args.resume is not None
    if resume:
        folder = args.resume
        state = read_state(folder)
        if given.get("batch_size", 0) is None:     # none: the number that the run found
            del given["batch_size"]
        config = configure(state["config"], **given)
        data = load_data(config, trained=state)
    else:
        config = configure(**given)
        refuse_existing(args.out)                  # before the data are read, which may take long
        data = load_data(config)
        folder = new_folder(args.out, config["data"])
    print(*data.report, sep="\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)       # fit refuses inf and nan
            state = fit(data, config, folder, resume)
        test_model(folder, state, data)
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError) as error:         # Ctrl-C costs an epoch at most
        progress("")
        if os.path.exists(os.path.join(folder, "last.npz")):
            why = "output pipe closed" if isinstance(error, BrokenPipeError) else "interrupted"
            run = shlex.quote(folder.replace(os.sep, "/"))
            device = " --device gpu" if args.device == "gpu" else ""
            print(f"\n{why}; completed epochs are saved, continue with: "
                  f"python train.py --resume {run}{device}", file=sys.stderr)
        raise


def test_model(folder, state, data):
    """Test a run's model beside the baselines, write metrics.json, print the table."""
    params, info = read_model(os.path.join(folder, "model.npz"))
    config, history = state["config"], state["history"]
    scorers = {**baseline_scorers(data), "LRURec": model_scorer(params)}
    results = {name: evaluate(scorer, data, "test", config["max_len"], config["threads"],
                              config["rank_seen"]) for name, scorer in scorers.items()}
    seconds = sum(epoch["seconds"] for epoch in history)
    report = {
        "data": {"name": data.name, "users": len(data.user_ids), "items": len(data.item_ids) - 1,
                 "events": len(data.items), "digest": data.digest},
        "config": config, "epoch": info["epoch"], "seconds": seconds, "history": history,
        "validation": info["validation"], "test": results["LRURec"],
        "baselines": {"popularity": results["popularity"], "markov": results["Markov"]}}
    with writing(folder, "metrics.json") as path:
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
        os.replace(path + ".part", path)
    print(f"\ntest, best epoch {info['epoch']}, trained for {seconds:.0f} s")
    print_table(results)


def evaluate_command(args, given):
    params, info = read_model(args.model)
    config = configure(info["config"], **given)
    data, scorer = load_data(config, trained=info), model_scorer(params)
    print_table({split: evaluate(scorer, data, split, config["max_len"], config["threads"],
                                 config["rank_seen"]) for split in ("validation", "test")})


def compare_command(args, given):
    """Validation and test metrics of finished runs, their mean and sample standard deviation."""
    tables, tasks = {"validation": {}, "test": {}}, {}
    for folder in dict.fromkeys(map(os.path.normpath, args.folders)):
        path = os.path.join(folder, "metrics.json")
        with reading(path, "the metrics of a run", "give the folders of finished runs"):
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
            task = "{users:,} users, {items:,} items, {events:,} events".format(**report["data"])
            if report["config"]["rank_seen"]:
                task += ", with --rank-seen"
            tasks[task] = folder
            for split, table in tables.items():
                table[folder] = {name: float(report[split][name]) for name in SHOWN}
    if len(tasks) > 1:
        listed = "; ".join(f"{folder}: {task}" for task, folder in tasks.items())
        raise DataError(f"these runs cannot be compared: {listed}")
    for split, table in tables.items():
        values = [list(row.values()) for row in table.values()]
        if len(values) > 1:
            table["mean"] = dict(zip(SHOWN, np.mean(values, 0)))
            table["± std"] = dict(zip(SHOWN, np.std(values, 0, ddof=1)))
        print(split)
        print_table(table)


# ---- recommend: after a history, for users of the data, or one event at a time

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


def words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def item_finder(item_ids, titles):
    """A function from what was typed to an item: the one with this raw id, else the one with all
    these words in its title, in any order and letter case; of several, the one without other words
    but a year "(1972)" at its end. Raises DataError; where there are several, with candidates."""
    by_id = {raw: v for v, raw in enumerate(item_ids) if v}
    title_words = [words(title) for title in titles]

    def find(text):
        text, typed = text.strip(), words(text)
        if text in by_id:
            return by_id[text]
        found = [v for v in range(1, len(titles)) if typed <= title_words[v]]
        whole = [v for v in found if words(re.sub(r"\(\d{4}\)$", "", titles[v])) <= typed]
        found = whole or found
        if not typed or not found:
            raise DataError(f"no item {text!r}: give an id, or whole words of a title")
        if len(found) > 1:
            listed = "; ".join(f"{titles[v]} [{item_ids[v]}]" for v in found[:8])
            raise DataError(f"{text!r} matches {len(found)} items: {listed}: give more words, or "
                            "the id in brackets")
        return found[0]

    return find


def print_best(history, scores, info, top):
    """What was understood, and the best items after it. history: items; scores (1, V+1)."""
    titles = info["titles"]
    last = ["..."] * (len(history) > 5) + [titles[v] for v in history[-5:]]
    print(f"after: {', '.join(last) or 'nothing yet'}")
    best, = best_items(scores.copy(), [history], top, info["config"]["rank_seen"])
    width = max([len(titles[v]) for v, _ in best], default=0)
    for rank, (v, score) in enumerate(best, 1):
        print(f"{rank:2}  {titles[v]:<{width}} {score:8.3f}")


def recommend_command(args, given):
    if args.top < 1:
        raise DataError(f"--top must be an integer >= 1 (got {args.top})")
    if bool(args.items) + (args.user is not None) + args.all_users > 1:
        raise DataError("give titles or ids, or --user, or --all-users")
    params, info = read_model(args.model)
    if args.user is not None or args.all_users:
        recommend_for_users(params, info, args, given)
    elif given:
        raise DataError("--data goes with --user or --all-users")
    elif args.items:
        find = item_finder(info["item_ids"], info["titles"])
        history = [find(text) for text in args.items]
        print_best(history, model_scorer(params)([history]), info, args.top)
    else:
        return recommend_after_lines(params, info, args.top)


def recommend_for_users(params, info, args, given):
    """Print a CSV of the best items of one or all users of the training data."""
    config = configure(info["config"], **given)
    data = load_data(config, trained=info)
    users, seen = data.user_ids, full_histories(data)
    if args.user is not None:
        if args.user not in users:
            raise DataError(f"no user {args.user!r} among those of {data.name} that training kept")
        seen, users = [seen[users.index(args.user)]], [args.user]
    longest = config["max_len"] or len(data.items)
    writer, scorer = csv.writer(sys.stdout, lineterminator="\n"), model_scorer(params)
    writer.writerow(["user", "rank", "item", "title", "score"])
    begin = time.perf_counter()
    for n, (user, history) in enumerate(zip(users, seen), 1):
        scores = scorer([history[-longest:]])
        best, = best_items(scores, [history], args.top, config["rank_seen"])
        for rank, (v, score) in enumerate(best, 1):
            writer.writerow([user, rank, data.item_ids[v], data.titles[v], f"{score:.4f}"])
        if not sys.stdout.isatty():                # there the rows themselves show it
            progress(f"user {n:,} of {len(users):,}", begin, n, len(users) - n)
    progress("")


def recommend_after_lines(params, info, top):
    """An item a line, typed or piped in; after each, what to recommend, by one step of the model,
    whose cost does not depend on the history. An empty line starts again. -> exit code, 2 where a
    line that was not typed names no item."""
    find, code = item_finder(info["item_ids"], info["titles"]), 0
    new_user = [], lrurec.init_state(params), model_scorer(params)([[0]])
    history, state, scores = new_user
    print_best(history, scores, info, top)
    for line in lines_of_input():
        if line.strip():
            try:
                item = find(line)
            except DataError as error:
                print(error, file=sys.stderr)
                code = 0 if sys.stdin.isatty() else 2
                continue
            hidden, state = lrurec.step(params, state, np.array([item]))
            history, scores = [*history, item], lrurec.to_host(lrurec.score(params, hidden))
        else:
            history, state, scores = new_user
        print_best(history, scores, info, top)
    return code


def lines_of_input():
    """Yield what is typed or piped in, until it ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print("type an id or words of a title; an empty line starts again, Ctrl-D ends")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401: input() then edits lines and remembers them
    with contextlib.suppress(EOFError):
        while True:
            yield input(prompt)


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
    print("the circle is |lam| = 1; a digit counts the eigenvalues in its place, 9 is 9 or more")
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


def bench_command(args, given):
    """Training steps, then single events; the first batches are the published ones."""
    config, rng = configure(dropout=0.2, **given), np.random.default_rng(0)
    print(f"NumPy {np.__version__}, {os.cpu_count()} cores, {config['threads']} threads, "
          f"{args.device}; this takes some minutes", flush=True)

    def step_ms(params, batch):
        opt = lrurec.adamw_init(params)

        def train_step():
            _, grads = gradients(pool, params, batch, config, opt["step"])
            lrurec.clip_gradients(grads, MAX_NORM)
            lrurec.adamw_update(params, grads, opt, config["lr"], config["weight_decay"])
        return median_ms(train_step, 3)

    def top(hidden):
        return best_items(lrurec.to_host(lrurec.score(params, hidden)), [[1]], 10)

    with ThreadPoolExecutor(config["threads"]) as pool:
        data = load_data(config)
        params = lrurec.init_params(len(data.item_ids) - 1, rng=rng)
        ms = np.median([step_ms(params, batch)
                        for batch in batches(training_rows(data, 200), 128, rng)])
        print(f"training step on {data.name}, batches of 128 windows of 200, dropout 0.2: "
              f"{ms:.1f} ms\n\nevents a second in training, histories of 200", flush=True)
        for n_items in (1349, 10000, 100000):
            params, items = lrurec.init_params(n_items, rng=rng), rng.integers(1, n_items, 8000)
            ms = step_ms(params, (items, np.roll(items, -1), np.arange(8000) % 200 == 0))
            print(f"  {n_items:7,} items {8e6 / ms:10,.0f}", flush=True)
    params = lrurec.init_params(1349, rng=rng)
    print("\nµs for an event and the new top 10     by step  by encoding anew")
    for length in (10, 100, 1000, 10000):
        history, starts = rng.integers(1, 1350, length), np.arange(length) == 0
        _, state = lrurec.encode(params, history, starts, return_state=True)
        by_step = median_ms(lambda: top(lrurec.step(params, state, history[:1])[0]), 100)
        anew = median_ms(lambda: top(lrurec.encode(params, history, starts)[-1:]), 20)
        print(f"  after {length:6} events {1e3 * by_step:21.0f} {1e3 * anew:17.0f}", flush=True)


# ---- The terminal and the command line

def progress(text, begin=0.0, done=0, left=0):
    """Show text on the line that updates, and how long what is left takes at the pace since begin.
    Nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        if done:
            text += f"  about {left * (time.perf_counter() - begin) / done:.0f} s to go"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}\r", end="", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):                      # one line, without the usage
        raise DataError(f"{message} (see python {self.prog} --help)")


def integer(text):
    return None if text.lower() == "none" else int(text)


def make_parser():
    """The flags of all commands. argparse converts, configure judges."""
    parser = Parser(prog="train.py", description=__doc__.partition("\n\nSettings, ")[0],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, text, settings=(), needs_model=False):
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(function=function, device="cpu")
        if needs_model:
            p.add_argument("model", metavar="MODEL.npz", help="the model.npz of a run")
        for setting in settings:
            default, allowed, meaning = SETTINGS[setting]
            if kind_of(setting) is bool:
                how = {"action": "store_true"}
            elif kind_of(setting) is str:
                how = {"choices": allowed} if allowed is not str else {}
            else:
                how = {"type": integer if kind_of(setting) is int else float}
            if needs_model and setting == "data":
                default = "the training's"
            if default is not None:
                meaning += f" (default: {default})"
            p.add_argument(flag(setting), help=meaning, default=argparse.SUPPRESS, **how)
        if settings:
            p.add_argument("--device", choices=("cpu", "gpu"),
                           help="gpu: an NVIDIA GPU through CuPy (default: cpu)")
        return p

    p = command("train", train_command, "train a model (the default command)", SETTINGS)
    where = p.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="DIR",
                       help="folder of the new run (default: runs/NAME, runs/NAME-2, ...)")
    where.add_argument("--resume", metavar="RUN", help="folder of a run to continue")
    command("evaluate", evaluate_command, "print the metrics of a saved model",
            ["data", "threads"], needs_model=True)
    p = command("compare", compare_command, "print the metrics of runs, and their mean")
    p.add_argument("folders", nargs="+", metavar="RUN", help="folder of a finished run")
    p = command("recommend", recommend_command, "recommend after a history, or for users",
                ["data"], needs_model=True)
    p.add_argument("items", nargs="*", default=[], metavar="TITLE-OR-ID",
                   help="the history, oldest first; without one, an item a line of input")
    p.add_argument("--user", metavar="ID", help="for this user of the data, as CSV")
    p.add_argument("--all-users", action="store_true", help="for all users of the data, as CSV")
    p.add_argument("--top", type=int, default=10, help="number of recommendations (default: 10)")
    command("inspect", inspect_command, "draw the eigenvalues, print half-lives", needs_model=True)
    p = command("bench", bench_command, "time training steps and single events: some minutes",
                ["threads"])
    p.epilog = "Profile: python -m cProfile -s tottime train.py --threads 1 --epochs 1"
    return parser


def parse_arguments(argv):
    """-> args, and a dict of the settings that were typed. Raises DataError."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "recommend" and not any(word.startswith("-") for word in rest):
        args.items, rest = args.items + rest, []   # argparse leaves those behind a flag over
    if rest:
        raise DataError(f"unrecognized arguments: {' '.join(rest)} (see python train.py "
                        f"{args.command} --help)")
    return args, {name: value for name, value in vars(args).items() if name in SETTINGS}


def main(argv=None):
    """Run the program -> exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):            # no title ends a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args, given = parse_arguments(sys.argv[1:] if argv is None else argv)
        lrurec.use_device(args.device)
        code = args.function(args, given)
        sys.stdout.flush()
        return code or 0
    except SystemExit:                             # --help
        return 0
    except KeyboardInterrupt:
        return 130
    except (DataError, RuntimeError) as error:     # the latter: no GPU
        message = str(error)
    except MemoryError:
        message = "out of memory: lower --d-model, --n-blocks, --batch-size, --max-len or --threads"
    except OSError as error:
        if error.filename is None:                 # the output: Python would write the rest at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):     # a pipe into head, say
            return 2 if args.command == "train" else 0
        message = (f"{error.filename or 'output'}: {error.strerror or error}: check the path, its "
                   "permissions and the free disk space")
    progress("")
    print(f"train.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
