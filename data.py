# SPDX-License-Identifier: MIT
"""Interactions in, sequences and batches out.

    text or archive -> read_file, parse_archive  -> Events      one row per event, as in the file
                    -> prepare                   -> Dataset     filtered, ids 1..V, sorted by time
                    -> training_rows, batches    -> items, targets, starts for the model
                    -> histories                 -> items, starts, truth for the evaluation

The protocol (filtering, split, windows) is that of the official LRURec code for MovieLens; where
we leave it, the function says so. Whatever is wrong with an input is found here, once, and raised
as DataError: one line that names the file, the line, the value and what to do.
"""
import csv
import gzip
import hashlib
import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """The user's input cannot be used; the message is one line."""


class Events(NamedTuple):
    """Interactions in file order."""
    users: np.ndarray           # (events,) int, positions in user_ids
    items: np.ndarray           # (events,) int, positions in item_ids
    times: np.ndarray           # (events,) int or float; the file's order where it has no times
    user_ids: list              # raw ids, text
    item_ids: list
    titles: dict = {}           # raw item id -> title
    layout: str = ""            # how the file was understood, to be shown


class Dataset(NamedTuple):
    """Every user's events, oldest first, one user after another."""
    name: str
    items: np.ndarray           # (events,) int, ids 1..V
    offsets: np.ndarray         # (users + 1,) user u owns items[offsets[u]:offsets[u + 1]]
    item_ids: list              # (V + 1,) raw ids; item_ids[0] is ""
    titles: list                # (V + 1,) titles, or the raw id where there is none
    digest: str                 # of items, offsets and item_ids: the same data, the same digest
    layout: str = ""            # as in Events


# ---------------------------------------------------------------------------------------------
# MovieLens: fetched once, kept in the user's cache folder, as the archive it came in

NAMES = ("ml-100k", "ml-1m")
GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
RECBOLE = "recbole==1.2.1"                      # its wheel holds a copy of ML-100K
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
# SHA-256 of the parsed events, as int64 (user, item, time), sorted: the same for either source
ML_100K_EVENTS = "1afd07a2aed70da877a6e56275fd8531be6ee9b84a95484c641a2af341950882"


def cache_folder():
    """Where archives are kept: $LRUREC_CACHE, else lrurec in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("LRUREC_CACHE") or os.path.join(base, "lrurec")


def download(url, timeout=20, tries=2, opener=urllib.request.urlopen):
    """The bytes behind url. Raises OSError when `tries` attempts of `timeout` seconds failed."""
    for attempt in range(tries):
        try:
            with opener(url, timeout=timeout) as response:
                return response.read()
        except OSError:
            if attempt == tries - 1:
                raise
            time.sleep(1)


def recbole_wheel():
    """The bytes of the RecBole wheel, through this interpreter's pip. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
                   "--disable-pip-version-check", "--dest", folder, RECBOLE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        wheels = os.listdir(folder)
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip() or "pip found no wheel").splitlines()[-1])
        with open(os.path.join(folder, wheels[0]), "rb") as file:
            return file.read()


def fetch_movielens(name, opener=urllib.request.urlopen):
    """Path of the archive of "ml-100k" or "ml-1m" in the cache, fetched where it is missing."""
    path = os.path.join(cache_folder(), name + ".zip")
    if os.path.exists(path):
        return path
    url, failures = GROUPLENS.format(name), []
    sources = [("GroupLens", lambda: download(url, opener=opener))]
    if name == "ml-100k":
        sources.append((RECBOLE, recbole_wheel))
    for source, get in sources:
        if sys.stderr.isatty():
            print(f"fetching {name} from {source}", file=sys.stderr)
        try:
            archive = get()
            parse_archive(name, io.BytesIO(archive), "what came")  # a wrong one is not kept
        except (OSError, http.client.HTTPException, subprocess.SubprocessError, DataError) as error:
            failures.append(f"{source}: {' '.join(str(error).split())}")
        else:
            write_whole(path, archive)
            return path
    raise DataError(f"{name} cannot be fetched ({'; '.join(failures)}): "
                    f"download {url} by hand and put it at {path}")


def write_whole(path, content):
    """Write bytes to path whole or not at all. Raises OSError, which names path."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:                       # a full disk does not say which file
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def parse_archive(name, archive, path):
    """Events of a MovieLens archive (a file or its path); `path` is what error messages name."""
    try:
        with zipfile.ZipFile(archive) as file:
            if name == "ml-1m":
                ratings, titles = file.read("ml-1m/ratings.dat"), file.read("ml-1m/movies.dat")
                rows = [line.split("::") for line in titles.decode("latin-1").splitlines()]
            elif "ml-100k/u.data" in file.namelist():
                ratings, titles = file.read("ml-100k/u.data"), file.read("ml-100k/u.item")
                rows = [line.split("|") for line in titles.decode("latin-1").splitlines()]
            else:
                ratings = file.read(RECBOLE_FOLDER + ".inter")
                titles = file.read(RECBOLE_FOLDER + ".item").decode().splitlines()[1:]
                # the copy spells the one film without a name "unkonwn", and cuts years off titles
                rows = [(item, "unknown" if title == "unkonwn" else f"{title} ({year})")
                        for item, title, year, _ in (line.split("\t") for line in titles)]
        events = parse(ratings, path)._replace(titles={row[0]: row[1] for row in rows}, layout="")
        if name == "ml-100k":
            table = np.stack([np.array(events.user_ids, np.int64)[events.users],
                              np.array(events.item_ids, np.int64)[events.items], events.times], 1)
            table = table[np.lexsort(table.T[::-1])]
            if hashlib.sha256(table.astype("<i8").tobytes()).hexdigest() != ML_100K_EVENTS:
                raise ValueError("not the 100,000 events of ML-100K")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not an archive of {name} ({error}): "
                        "delete it to have it fetched again") from None
    return events


# ---------------------------------------------------------------------------------------------
# Any delimited text

USER_NAMES = {"user", "userid", "uid", "reviewerid"}
ITEM_NAMES = {"item", "itemid", "iid", "movieid", "sid", "productid", "asin"}
TIME_NAMES = {"timestamp", "time", "ts", "unixreviewtime"}


def read_file(path, columns=None):
    """Events of a delimited text file, gzip or not. Raises DataError.

    columns: a list of texts [USER, ITEM] or [USER, ITEM, TIME], names in the header or numbers from
    1; None: they are found by their usual names, or by position.
    """
    try:
        path = os.fspath(path)
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: give the path of a readable file") from None
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged gzip ({error}): fetch or compress it "
                            "again") from None
    elif path.endswith(".gz"):
        raise DataError(f"{path} is named .gz but is not gzip: rename it or compress it")
    return parse(content, path, columns)


def parse(content, path, columns=None):
    """Events of the bytes of a delimited text; `path` is what error messages name."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    if b"\0" in content:
        line = content[:content.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: a NUL byte: this is not a text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: byte {content[error.start]:#04x} is not UTF-8: "
                        "save the file as UTF-8 text") from None
    lines = io.StringIO(text, newline=None)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{path} is empty: it needs lines of user,item[,time]")
    line = first.strip(" \r\n")
    by_count = sorted(";,|", key=line.count, reverse=True)
    delimiter = next((d for d in ["\t", "::", *by_count, " "] if d in line), None)
    if delimiter is None:
        raise DataError(f"{path}: no delimiter in {first.strip()[:60]!r}: separate the columns "
                        "by tab, '::', comma, semicolon, '|' or space")
    lines.seek(0)
    if delimiter == "::":
        reader = (line.rstrip("\n").split("::") for line in lines)
    else:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    return _parse_rows(reader, path, columns)


def _parse_rows(reader, path, columns):
    """Events of rows of fields. The loop runs once an event, so it is kept bare."""
    user_codes, item_codes, users, items, times = {}, {}, [], [], []
    where, n = None, 0

    def wrong(text):
        line = getattr(reader, "line_num", n)      # a quoted field may span several
        return DataError(f"{path}, line {line}: {text}")

    try:
        for n, row in enumerate(reader, 1):
            if len(row) < 2 and not "".join(row).strip():
                continue
            if where is None:
                header, where = find_columns(row, path, n, columns)
                u, i, t = (*where, None)[:3]
                if header:
                    continue
            try:
                user, item = row[u].strip(), row[i].strip()
                when = len(times) if t is None else _number(row[t])
            except IndexError:
                raise wrong(f"{len(row)} columns where {max(where) + 1} are needed: complete or "
                            "remove it") from None
            except ValueError:
                raise wrong(f"time {row[t][:40]!r} is not a finite number below 2^63: give seconds "
                            "or milliseconds" + "; if this is a header, name its columns with "
                            "--columns USER,ITEM,TIME" * (not users)) from None
            if not user or not item:
                raise wrong(f"an empty {'item' if user else 'user'} id: fill it in or remove the "
                            "line")
            users.append(user_codes.setdefault(user, len(user_codes)))
            items.append(item_codes.setdefault(item, len(item_codes)))
            times.append(when)
    except csv.Error as error:
        raise wrong(f"{error}: check its quotes") from None
    if not users:
        raise DataError(f"{path} has a header but no events: it needs lines of user,item[,time]")
    layout = (f"user, item{', time' * (t is not None)} read from columns "
              f"{', '.join(str(column + 1) for column in where)}, "
              f"{'a header' if header else 'no header'}; ")
    return Events(np.array(users), np.array(items), np.array(times),
                  list(user_codes), list(item_codes), layout=layout)


def _number(text):
    """text as int, exactly, or else as a float, below 2^63 in size. Raises ValueError."""
    try:
        value = int(text)
    except ValueError:
        value = float(text)
    if not abs(value) < 2 ** 63:                   # nan is not, either
        raise ValueError(text)
    return value


def find_columns(row, path, line, columns=None):
    """Whether the first row is a header, and the positions of user, item and, if any, time."""
    fields = [field.strip() for field in row]
    plain = [field.partition(":")[0] for field in fields]         # RecBole writes name:type
    names = [re.sub("[_ -]", "", field.lower()) for field in plain]

    def position(known):
        return next((k for k, name in enumerate(names) if name in known), None)

    user, item, when = position(USER_NAMES), position(ITEM_NAMES), position(TIME_NAMES)
    header = user is not None and item is not None
    if columns and columns[0].isdecimal():
        where = [int(column) - 1 for column in columns]
        if max(where) >= len(row):
            raise DataError(f"{path}, line {line}: {len(row)} columns, but --columns asks for "
                            f"number {max(where) + 1}: count them from 1")
        return header, where
    if columns:
        missing = [c for c in columns if c not in fields and c not in plain]
        if missing:
            raise DataError(f"{path}, line {line}: no column {missing[0]!r} in the header; it has "
                            f"{', '.join(fields)[:200]}")
        return True, [fields.index(c) if c in fields else plain.index(c) for c in columns]
    if header:
        return True, [user, item] + ([] if when is None else [when])
    if len(row) < 2:
        raise DataError(f"{path}, line {line}: one column where user,item[,time] are needed: see "
                        "its delimiter")
    return False, [[0, 1], [0, 1, 2], [0, 1, 3]][min(len(row), 4) - 2]


# ---------------------------------------------------------------------------------------------
# From events to sequences

def load_dataset(source, min_count=5, ties="item", seed=0, columns=None):
    """source, "ml-100k", "ml-1m" or the path of a file -> Dataset. Raises DataError.

    columns     of a file, as in read_file
    min_count   items, then users, with fewer events are dropped, one pass each; 0 keeps all
    ties        order of a user's events of equal time: "item" by id, as the official code (a
                pattern that a model can learn), "file" as in the file, "random" drawn from seed
    """
    if source in NAMES:
        path = fetch_movielens(source)
        events = parse_archive(source, path, path)
    else:
        events = read_file(source, columns)
    return prepare(events, source, min_count, ties, seed)


def prepare(events, name, min_count=5, ties="item", seed=0):
    """Events -> Dataset: repeats dropped, rare items and users dropped, ids 1..V, time order."""
    users, items, times = events.users, events.items, events.times
    repeat = np.zeros(len(users), bool)            # of the (user, item) in the line before
    repeat[1:] = (users[1:] == users[:-1]) & (items[1:] == items[:-1])
    keep = np.flatnonzero(~repeat)
    for codes in (items, users):
        keep = keep[np.bincount(codes[keep])[codes[keep]] >= min_count]
    if not len(keep):
        raise DataError(f"{name}: nobody is left after dropping items, then users, with fewer "
                        f"than {min_count} events: lower --min-count")
    users, items, times = users[keep], items[keep], times[keep]
    users, _ = _renumber(users, events.user_ids)
    items, item_ids = _renumber(items, events.item_ids)
    items += 1                                     # 0 is the empty history
    tie = {"item": items, "file": np.arange(len(items)),
           "random": np.random.default_rng(seed).permutation(len(items))}[ties]
    order = np.lexsort((tie, times, users))
    items, counts = items[order], np.bincount(users)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    item_ids = [""] + item_ids
    digest = hashlib.sha256(items.astype("<i8").tobytes() + offsets.astype("<i8").tobytes()
                            + "\0".join(item_ids).encode()).hexdigest()
    titles = [events.titles.get(raw, raw) for raw in item_ids]
    return Dataset(name, items, offsets, item_ids, titles, digest, events.layout)


def _renumber(codes, raw_ids):
    """Codes 0.. in ascending order of the raw ids that occur -> codes, those raw ids.

    Raw ids are compared as numbers where all are, else as text.
    """
    used = np.unique(codes)
    raw = [raw_ids[code] for code in used]
    try:
        keys = [(_number(text), text) for text in raw]
    except ValueError:
        keys = raw
    order = sorted(range(len(raw)), key=keys.__getitem__)
    new = np.empty(len(raw_ids), np.int64)
    new[used[order]] = np.arange(len(used))
    return new[codes], [raw[k] for k in order]


# ---------------------------------------------------------------------------------------------
# Training rows: leave-one-out, windows, batches

class Rows(NamedTuple):
    """Training rows of all users, one after another, and the windows they are cut into."""
    items: np.ndarray           # (rows,) input
    targets: np.ndarray         # (rows,) what came next
    starts: np.ndarray          # (rows,) bool, walls
    windows: np.ndarray         # (windows + 1,) window w is rows windows[w]:windows[w + 1]


def training_rows(data, max_len=None):
    """Rows of the training events, in windows of at most max_len rows (None: one a user).

    Events s0, s1, ... give rows (0 -> s0), (s0 -> s1), ...; the first is a segment of its own.
    Windows are cut from the end, so that a user's first one may be short. Unlike the official
    code, which drops early events and gives each full window a row without history, every event
    is a target exactly once.
    """
    lengths = np.diff(data.offsets)
    lengths = np.where(lengths >= 3, lengths - 2, lengths)        # the last two are held out
    begin = np.concatenate([[0], np.cumsum(lengths)])             # (users + 1,) in rows
    position = np.arange(begin[-1]) - np.repeat(begin[:-1], lengths)
    targets = data.items[np.repeat(data.offsets[:-1], lengths) + position]
    items = np.where(position == 0, 0, np.roll(targets, 1))
    remaining = np.repeat(lengths, lengths) - position            # rows to the user's end
    window = position == 0
    if max_len:
        window |= remaining % max_len == 0
    windows = np.append(np.flatnonzero(window), len(items))
    return Rows(items, targets, window | (position == 1), windows)


def batches(rows, batch_size, rng):
    """Yield (items, targets, starts) of batch_size windows at a time, in random order."""
    order = rng.permutation(len(rows.windows) - 1)
    for k in range(0, len(order), batch_size):
        index = np.concatenate([np.arange(rows.windows[w], rows.windows[w + 1])
                                for w in order[k:k + batch_size]])
        yield rows.items[index], rows.targets[index], rows.starts[index]


def histories(data, split, max_len=None):
    """(histories, truth) of all evaluated users; split "validation" or "test".

    histories: a list of arrays, each user's last max_len events before the true one (at test,
    the validation event is one of them); truth (users,). Users with fewer than 3 events are
    not evaluated.
    """
    held_out = {"validation": 2, "test": 1}[split]
    users = np.flatnonzero(np.diff(data.offsets) >= 3)
    ends = data.offsets[users + 1] - held_out
    begins = data.offsets[users] if not max_len else np.maximum(data.offsets[users], ends - max_len)
    return [data.items[b:e] for b, e in zip(begins, ends)], data.items[ends]
