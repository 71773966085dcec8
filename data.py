# SPDX-License-Identifier: MIT
"""Interactions in, sequences and batches out.

    file or archive -> read_events               -> Events      one row per event, as in the file
                    -> prepare                   -> Dataset     filtered, ids 1..V, sorted by time
                    -> training_rows, batches    -> items, targets, starts for the model
                    -> histories                 -> histories and true items for the evaluation

The order is a reader's: what the model sees first, text files last. The protocol is that of the
official LRURec code for MovieLens, except where a docstring says otherwise.
"""
import csv
import gzip
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from array import array
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Every user's events, oldest first, one user after another."""
    name: str
    items: np.ndarray           # (events,) int, ids 1..V
    offsets: np.ndarray         # (users + 1,) user u owns items[offsets[u]:offsets[u + 1]]
    user_ids: list              # (users,) raw ids, text
    item_ids: list              # (V + 1,) raw ids; item_ids[0] is ""
    titles: list                # (V + 1,) titles, or the raw id where there is none
    digest: str                 # of items, offsets and item_ids: the same data, the same digest
    report: tuple = ()          # lines that say what was read and dropped; some begin "warning: "
    settings: dict = {}         # of load_dataset; a run keeps them


# ---- Training rows: leave-one-out, windows, batches

class Rows(NamedTuple):
    """Training rows of all users, one after another, and the windows they are cut into."""
    items: np.ndarray           # (rows,) input
    targets: np.ndarray         # (rows,) what came next
    starts: np.ndarray          # (rows,) bool, walls
    windows: np.ndarray         # (windows + 1,) window w is rows windows[w]:windows[w + 1]


def training_rows(data, max_len=None):
    """Rows of the training events, in windows of at most max_len rows (None: one for a user).

    Events s0, s1, ... give rows (0 -> s0), (s0 -> s1), ... A wall before row 1 drops the state that
    id 0 left, as at test, where a history begins with its first event. Windows are cut from the
    end: a user's first may be short. Every event is a target; the official code drops early ones.
    """
    ends = data.offsets[1:][np.diff(data.offsets) >= 3]
    training = np.ones(len(data.items), bool)
    training[ends - 1] = training[ends - 2] = False               # held out: test, validation
    first = np.zeros(len(data.items), bool)
    first[data.offsets[:-1]] = True                               # a user's first event
    targets, first = data.items[training], first[training]
    items = np.roll(targets, 1)
    items[first] = 0
    begins = np.flatnonzero(first).tolist()                       # of the users, in rows
    windows = [0]
    for begin, end in zip(begins, [*begins[1:], len(items)]):
        windows += reversed(range(end, begin, -(max_len or len(items))))
    windows = np.array(windows)
    starts = first.copy()
    starts[1:] |= first[:-1]                                      # a user's row 1
    starts[windows[:-1]] = True
    return Rows(items, targets, starts, windows)


def batches(rows, batch_size, rng):
    """Yield (items, targets, starts) of batch_size windows at a time, in random order."""
    order = rng.permutation(len(rows.windows) - 1)
    for k in range(0, len(order), batch_size):
        index = np.concatenate([np.arange(rows.windows[w], rows.windows[w + 1])
                                for w in order[k:k + batch_size]])
        yield rows.items[index], rows.targets[index], rows.starts[index]


# ---- Histories for the evaluation

def histories(data, split, max_len=None):
    """(histories, truth) of all users with 3 events or more; split "validation" or "test".

    histories: a list of arrays, each user's last max_len events before the true one (at test,
    the validation event is one of them); truth (users,). Raises DataError for no such user.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split must be 'validation' or 'test' (got {split!r})")
    users = np.flatnonzero(np.diff(data.offsets) >= 3)
    if not len(users):
        raise DataError(f"{data.name}: no user has the 3 events of a test: check the columns")
    ends = data.offsets[users + 1] - (1 if split == "test" else 2)
    return last_events(data, data.offsets[users], ends, max_len), data.items[ends]


def full_histories(data, max_len=None):
    """Every user's last max_len events, nothing held out: arrays, in the order of user_ids."""
    return last_events(data, data.offsets[:-1], data.offsets[1:], max_len)


def last_events(data, begins, ends, max_len):
    """A list of the arrays items[begin:end], cut to their last max_len events."""
    if max_len:
        begins = np.maximum(begins, ends - max_len)
    return [data.items[begin:end] for begin, end in zip(begins, ends)]


# ---- Filtering and order

class Events(NamedTuple):
    """Interactions in file order."""
    users: np.ndarray           # (events,) int, positions in user_ids
    items: np.ndarray           # (events,) int, positions in item_ids
    times: np.ndarray           # (events,) int or float; 0, 1, 2, ... where the file has no times
    user_ids: list              # raw ids, text
    item_ids: list
    unit: str                   # of times: "number", as the file has it; "microseconds"; "line"
    report: tuple = ()          # which column was read as what, and the first event


def prepare(events, name, min_count, ties, seed):
    """Events -> Dataset, report: a list of lines.

    Dropped are repeats, then items, then users, with fewer than min_count events. A repeat has the
    item of its user's event before, in the order of user, time, item: neither the order of lines
    nor lines that stand twice matter. (The official code compares neighbouring lines: a deviation
    without effect on MovieLens.) Raises DataError where nothing is left.
    """
    users, user_ids = by_raw_id(events.users, events.user_ids)
    items, item_ids = by_raw_id(events.items, events.item_ids)
    times, keep, left = events.times, np.ones(len(users), bool), [len(users)]
    order = np.lexsort((items, times, users))      # by user, time, item
    before, after = order[:-1], order[1:]
    repeats = (users[before] == users[after]) & (items[before] == items[after])
    keep[after[repeats]] = False
    left.append(np.count_nonzero(keep))
    for codes in (items, users):
        counts = np.bincount(codes[keep], minlength=codes.max() + 1)
        keep &= counts[codes] >= min_count
        left.append(np.count_nonzero(keep))
    if not keep.any():
        raise DataError(f"{name}: nobody is left with {min_count} events or more: lower "
                        f"--min-count, or check the columns ({'; '.join(events.report)})")
    if ties == "file":
        order = np.lexsort((times, users))         # stable: equal ones stay as in the file
    elif ties == "random":
        tie = np.zeros(len(keep), np.int64)
        tie[keep] = np.random.default_rng(seed).permutation(left[-1])
        order = np.lexsort((tie, times, users))
    order = order[keep[order]]
    users, user_ids = without_gaps(users[order], user_ids)
    items, item_ids = without_gaps(items[order], item_ids)
    items, item_ids = items + 1, ["", *item_ids]   # 0 is the empty history
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))])
    digest = hashlib.sha256(np.concatenate([items, offsets]).astype("<i8", copy=False))
    for raw in item_ids[1:]:
        digest.update(b"\0" + raw.encode())
    data = Dataset(name, items, offsets, user_ids, item_ids, item_ids, digest.hexdigest())
    repeats, of_items, of_users = -np.diff(left)
    dropped = (f"dropped: {repeats:,} repeats of the previous event, {of_items:,} events of items "
               f"and {of_users:,} events of users with fewer than {min_count}")
    return data, [*events.report, *describe(data, times[order], events.unit, dropped)]


def by_raw_id(codes, raw_ids):
    """codes and raw_ids with the raw ids ascending: as numbers where all are, else as text."""
    order = sorted(range(len(raw_ids)), key=raw_ids.__getitem__)
    try:
        values = [number(raw) for raw in raw_ids]
        order.sort(key=values.__getitem__)         # equal ones, 1 and 01, stay in order of text
    except ValueError:
        pass                                       # not all are numbers
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], [raw_ids[k] for k in order]


def without_gaps(codes, raw_ids):
    """codes and raw_ids without the ids that no event has."""
    occurs = np.bincount(codes, minlength=len(raw_ids)) > 0
    return (np.cumsum(occurs) - 1)[codes], list(itertools.compress(raw_ids, occurs.tolist()))


# ---- load_dataset and its report

NAMES = ("ml-100k", "ml-1m")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text):
    """text with its control characters written as escapes: safe to show on a terminal."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class DataError(ValueError):
    """The user's input cannot be used; the message is one printable line."""

    def __init__(self, message):
        super().__init__(printable(message))


def load_dataset(source, min_count=5, ties="item", seed=42, columns=None, titles=None,
                 title_columns=None):
    """source: "ml-100k", "ml-1m" or the path of a file -> Dataset. Raises DataError.

    min_count       items, then users, with fewer events are dropped, one pass each; 0 keeps all
    ties            order of events of equal time: "item" by id, as officially, "file", "random"
    columns         "USER,ITEM" or "USER,ITEM,TIME", or a list: names in the header, or numbers
                    from 1 where every line is an event; None: the header has the usual names
    titles          a file of item ids and titles, with title_columns "ITEM,TITLE" likewise
    """
    if ties not in ("item", "file", "random"):
        raise DataError(f"ties must be 'item', 'file' or 'random' (got {ties!r})")
    for name, value in (("min_count", min_count), ("seed", seed)):
        if not isinstance(value, int) or value < 0:
            raise DataError(f"{name} must be an integer of 0 or more (got {value!r})")
    columns, title_columns = as_text(columns), as_text(title_columns)
    names = column_names(columns, "--columns USER,ITEM[,TIME]", (2, 3))
    title_names = column_names(title_columns, "--title-columns ITEM,TITLE", (2,))
    if source not in NAMES:
        events, title_of = read_events(source, names), {}
    elif columns is None:
        events, title_of = read_movielens(source)
    else:
        raise DataError(f"--columns is for a file: the columns of {source} are known")
    data, report = prepare(events, str(source), min_count, ties, seed)
    if titles is not None:
        title_of = read_titles(titles, title_names)
        titled = sum(raw in title_of for raw in data.item_ids[1:])
        if not titled:
            raise DataError(f"{titles}: no title for an item of {source}: check its columns")
        report.append(f"titles: for {titled:,} of {len(data.item_ids) - 1:,} items")
    settings = {"min_count": min_count, "ties": ties, "columns": columns,
                "title_columns": title_columns}
    if ties == "random":
        settings["seed"] = seed
    return data._replace(titles=[title_of.get(raw, raw) for raw in data.item_ids],
                         report=tuple(map(printable, report)), settings=settings)


def as_text(columns):
    """Columns, a text or a list or None, as the command line has them."""
    return ",".join(map(str, columns)) if isinstance(columns, (list, tuple)) else columns


def column_names(columns, flag, counts):
    """"USER,ITEM" as ["USER", "ITEM"]; None stays None."""
    if columns is None:
        return None
    names = [untyped(name) for name in columns.split(",")] if isinstance(columns, str) else []
    if len(names) not in counts or len(set(names)) < len(names) or "" in names:
        raise DataError(f"must be {flag}, all different (got {columns!r})")
    return names


def describe(data, times, unit, dropped):
    """Lines that show a wrong reading at once: counts, first and last time, ties, repeats."""
    lengths, events = np.diff(data.offsets), f"{len(times):,} events"
    if unit != "line":
        events += " from {} to {}".format(*dates(times, unit))
    lines = [f"{data.name}: {len(lengths):,} users, {len(data.item_ids) - 1:,} items, {events}",
             dropped]
    user = np.repeat(np.arange(len(lengths)), lengths)            # (events,) whose event it is
    if unit != "line":
        ties = np.sum((times[1:] == times[:-1]) & (user[1:] == user[:-1]))
        ties = ties / max(1, len(times) - len(lengths))           # of those that have one before
        line = f"{ties:.0%} of events have the same time as their user's previous event"
        if ties > 0.6:
            line = f"warning: {line}: their order is --ties, unless --columns names a finer time"
        lines.append(line)
    last = data.items[data.offsets[1:] - 1]                       # (users,) the test items
    had = np.bincount(user[data.items == last[user]])             # how often, the test included
    tested = lengths >= 3
    n_tested, n_seen = np.sum(tested), np.sum(tested & (had > 1))
    lines.append(f"{n_seen:,} of {n_tested:,} test items are already in their user's history")
    if n_seen and n_seen >= 0.1 * n_tested:
        lines.append("warning: without --rank-seen those within --max-len count as misses: if all "
                     f"are, no Recall@k can exceed {1 - n_seen / n_tested:.3f}")
    seconds, milliseconds = (np.sum((times >= low) & (times < high))
                             for low, high in (SECONDS, MILLISECONDS))
    if unit == "number" and seconds and milliseconds:
        lines.append(f"warning: times mix units: {seconds:,} look like seconds, {milliseconds:,} "
                     "like milliseconds")
    return lines


SECONDS, MILLISECONDS = (1e8, 1e11), (1e11, 1e14)                 # what looks like these: from, to


def dates(times, unit):
    """First and last time, as dates where they are ISO 8601 or look like (milli)seconds."""
    first, last = times.min().item(), times.max().item()
    if unit == "microseconds":
        scale = 1
    elif SECONDS[0] <= first and last < SECONDS[1]:
        scale = 10 ** 6
    elif MILLISECONDS[0] <= first and last < MILLISECONDS[1]:
        scale = 10 ** 3
    else:
        return first, last
    return [f"{EPOCH + timedelta(microseconds=time * scale):%Y-%m-%d %H:%M}"
            for time in (first, last)]


# ---- MovieLens: fetched once, kept in the user's cache folder, as the archive it came in

GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
RECBOLE = "recbole==1.2.1"                      # its wheel holds a copy of ML-100K
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
UNREADABLE = zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError
# SHA-256 of the parsed events, as int64 (user, item, time), sorted: the same for either source
ML_100K_EVENTS = "1afd07a2aed70da877a6e56275fd8531be6ee9b84a95484c641a2af341950882"


def read_movielens(name, opener=urllib.request.urlopen):
    """Events and {raw item id: title} of "ml-100k" or "ml-1m", from its archive in the cache, which
    is fetched where it is missing. Raises DataError."""
    # without a home, expanduser leaves the ~: no folder of that name is wanted
    folder = os.path.expanduser(os.environ.get("LRUREC_CACHE") or "~/.cache/lrurec")
    path = None if folder.startswith("~") else os.path.join(folder, name + ".zip")
    if path and os.path.exists(path):
        try:
            return parse_archive(name, path)
        except UNREADABLE as error:
            raise DataError(f"{path} is not an archive of {name} ({error}): "
                            "delete it to have it fetched again") from None
    url, failures = GROUPLENS.format(name), []
    sources = [("GroupLens", lambda: opener(url, timeout=20).read())]
    if name == "ml-100k":
        sources.append((RECBOLE, recbole_wheel))
    for source, get in sources:
        if sys.stderr.isatty():
            print(f"fetching {name} from {source}", file=sys.stderr)
        try:
            archive = get()
            events, title_of = parse_archive(name, io.BytesIO(archive))
        except Exception as error:                 # whatever it is: the next source is asked
            failures.append(f"{source}: {' '.join(str(error).split())}")
            continue
        if not (path and saved(archive, path)):
            events = events._replace(report=(
                f"warning: {name} is not kept, the cache folder cannot be written: set "
                "LRUREC_CACHE to a folder that can",))
        return events, title_of
    raise DataError(f"{name} cannot be fetched ({'; '.join(failures)}): download {url} by hand and "
                    f"put it at {path or 'a folder named by LRUREC_CACHE'}")


def saved(archive, path):
    """Write archive to path, whole or not at all -> whether that was possible."""
    part = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "wb") as file:
            file.write(archive)
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        return False
    return True


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


def parse_archive(name, archive):
    """Events and titles of an archive, a path or an open file. Raises one of UNREADABLE."""
    with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory() as folder:
        if name == "ml-1m":
            members = "ml-1m/ratings.dat", "ml-1m/movies.dat"
        elif "ml-100k/u.data" in file.namelist():
            members = "ml-100k/u.data", "ml-100k/u.item"
        else:
            members = RECBOLE_FOLDER + ".inter", RECBOLE_FOLDER + ".item"
        ratings, films = (file.extract(member, folder) for member in members)
        if members[0].startswith(RECBOLE_FOLDER):
            events, title_of = read_events(ratings), recbole_titles(films)
        else:
            events = read_events(ratings, ["1", "2", "4"])
            title_of = read_titles(films, ["1", "2"], "latin-1")
    if name == "ml-100k":
        users, items = np.array(events.user_ids, np.int64), np.array(events.item_ids, np.int64)
        table = np.stack([users[events.users], items[events.items], events.times], 1)
        table = table[np.lexsort(table.T[::-1])].astype("<i8")
        if hashlib.sha256(table.tobytes()).hexdigest() != ML_100K_EVENTS:
            raise ValueError("not the 100,000 events of ML-100K")
    return events._replace(report=()), title_of


def recbole_titles(path):
    """As GroupLens has them: RecBole keeps the year apart and misspells one title."""
    _, (i, t, y), rows = read_table(path, ("item", "title"),
                                    ["item_id", "movie_title", "release_year"])
    return {row[i]: "unknown" if row[t] == "unkonwn" else f"{row[t]} ({row[y]})"
            for _, row in rows}


# ---- Text files, read as a stream: events, titles, then what both need

LINE_LIMIT = 2 ** 20                            # bytes
DELIMITERS = ("\t", "::", ",", ";", "|", " ")   # in the first two a quote is a character like any
KNOWN = {                                       # in lower case, without spaces, "_" and "-"
    "user": "user userid uid reviewerid visitorid customerid sessionid".split(),
    "item": "item itemid iid movieid videoid productid asin parentasin bookid trackid "
            "articleid".split(),
    "time": "timestamp timems timestampms unixreviewtime unixtime datetime eventtime eventdate "
            "createdat ratedat time ts date".split(),
    "title": "title movietitle itemtitle producttitle prodname name caption".split()}
MISSING = {"", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "(null)", "None",
           "undefined", "\\N"}                  # in exports


def read_events(path, columns=None, encoding="utf-8-sig"):
    """Events of a delimited text file, gzip or not. Raises DataError.

    columns: [USER, ITEM] or [USER, ITEM, TIME], as texts; None: by the usual names of a header.
    """
    names, where, rows = read_table(path, ("user", "item", "time"), columns, encoding)
    u, i, t = where if len(where) == 3 else [*where, None]
    users, items, times = array("i"), array("i"), array("q")
    user_codes, item_codes = {}, {}                # raw id -> 0, 1, 2, ...
    headings = {plain(names[k]) for k in (u, i) if not names[k].isdigit()}     # 0 may be an id
    headings.update(KNOWN["user"], KNOWN["item"])
    first, read_time = None, None
    for line, row in rows:
        if first is None:                          # the first time decides for all
            first, read_time = row, None if t is None else time_reader(row[t])
        user, item = row[u].strip(), row[i].strip()
        if user not in user_codes or item not in item_codes:
            check_ids(f"{path}, line {line}", user, item, headings)
        users.append(user_codes.setdefault(user, len(user_codes)))
        items.append(item_codes.setdefault(item, len(item_codes)))
        try:
            when = len(times) if t is None else read_time(row[t])
        except (ValueError, OverflowError):
            header = ""
            if row is first and names[t].isdigit():
                header = " is this a header? Then name the columns. If not,"
            raise DataError(
                f"{path}, line {line}: the time {short(row[t])!r}:{header} times must be all "
                "finite numbers below 2^63 or all ISO 8601, as in 2024-05-01 12:30; in pandas: "
                "d['time'] = pandas.to_datetime(d['time'], dayfirst=True)") from None
        if type(when) is float and times.typecode == "q":
            times = array("d", times)
        times.append(when)
    if first is None:
        raise DataError(f"{path} has a header but no events: it needs a line for each event")
    unit = "line" if t is None else read_time.__name__
    return Events(np.asarray(users), np.asarray(items), np.asarray(times), list(user_codes),
                  list(item_codes), unit, columns_in_words(names, where, first))


def columns_in_words(names, where, row):
    """Which column was read as what, and the first event."""
    read = [f"{role} from {short(names[k])}" for role, k in zip(("user", "item", "time"), where)]
    if len(where) == 2:
        read.append("time from the order of the lines")
    unused = [short(name) for k, name in enumerate(names) if k not in where and name]
    others = f"; not used: {', '.join(unused[:8])}" if unused else ""
    event = ", ".join(repr(short(row[k].strip())) for k in where)
    return f"columns: {', '.join(read)}{others}", f"first event: {event}"


def check_ids(place, user, item, headings):
    """Raise DataError where a line's user and item cannot be ids. headings: names of columns."""
    if plain(user) in headings and plain(item) in headings:
        raise DataError(f"{place}: a header again, {user!r} and {item!r}: delete the line")
    for raw in (user, item):
        if raw in MISSING or CONTROL.search(raw):
            raise DataError(f"{place}: {short(raw)!r} cannot be an id: it marks a missing value or "
                            "holds control characters: correct or delete the line")


def number(text):
    """text as int, exactly, or else as a float, below 2^63 in size. Raises ValueError."""
    try:
        value = int(text)
    except ValueError:
        value = float(text)
    if not abs(value) < 2 ** 63 or "_" in text:    # nan is not below; Python takes 1_000 for 1000
        raise ValueError(text)
    return value


def microseconds(text):
    """From 1970 to an ISO 8601 time; without a zone it is UTC. Raises ValueError, OverflowError."""
    moment = datetime.fromisoformat(text.strip().removesuffix(" UTC"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return (moment.astimezone(timezone.utc) - EPOCH) // timedelta(microseconds=1)


def time_reader(text):
    """What reads a time like text: number or microseconds."""
    try:
        number(text)
    except ValueError:
        return microseconds
    return number


def read_titles(path, columns=None, encoding="utf-8-sig"):
    """{raw item id: title} of a text file, of several titles the last. Raises DataError.

    columns: [ITEM, TITLE], as texts; None: by the usual names of a header.
    """
    _, (i, t), rows = read_table(path, ("item", "title"), columns, encoding)
    return {row[i].strip(): row[t].strip() for _, row in rows if row[t].strip()}


def read_table(path, roles, columns=None, encoding="utf-8-sig"):
    """The columns of a text file, and its lines without the header. Raises DataError.

    -> names of all columns; positions of those asked for, by names or numbers or (None) by the
    usual names of roles; an iterator over (line number, fields), which may raise DataError too.
    """
    lines = read_lines(path, encoding)
    for begin, first in enumerate(lines, 1):
        if first.strip():
            break
    else:
        raise DataError(f"{path} is empty: it needs a line for each event")
    if "\0" in first or first.lstrip().startswith(("{", "[")):
        raise not_text(path, "it begins like JSON or binary data")
    by_number = columns and all(re.fullmatch("[1-9][0-9]{0,5}", text) for text in columns)
    try:
        delimiter, names, where = find_columns(first, roles, columns, by_number)
    except ValueError as problem:
        raise which_columns(f"{path}, line {begin}: {problem}", first, roles) from None
    rows = read_rows(path, itertools.chain([first], lines), begin, delimiter, len(names))
    if not by_number:
        next(rows)                                 # the header
    return names, where, rows


def find_columns(first, roles, columns, by_number):
    """From a first line: the delimiter, the names of all columns, and the positions of those asked
    for, by the usual names of roles where columns is None. Raises ValueError for a wrong line."""
    all_missing = []                               # of each delimiter
    for delimiter in DELIMITERS:
        fields = split_first(first, delimiter)
        names = header_names(fields)
        if by_number:
            names = [str(k) for k in range(1, len(fields) + 1)]
        if columns:
            found = [[k for k, name in enumerate(names) if name == text] for text in columns]
        else:
            found = [[k for k, name in enumerate(names) if plain(name) in KNOWN[role]]
                     for role in roles]
        needed = columns or roles[:2]              # of the usual names, a time may be missing
        missing = [short(name) for name, positions in zip(needed, found) if not positions]
        if not missing:
            break
        all_missing.append(missing)
    else:
        missing = ", ".join(min(all_missing, key=len))
        raise ValueError(f"no {'' if by_number else 'header names the '}columns {missing}")
    for column, positions in zip(columns or roles, found):
        if len(positions) > 1:
            several = ", ".join(repr(short(names[k])) for k in positions)
            raise ValueError(f"several columns for {short(column)}: {several}")
    if not all(found) and len(names) > 2:
        raise ValueError("no column has a usual name for the time")
    where = [positions[0] for positions in found if positions]
    for k in where if by_number else ():
        if any(plain(fields[k]) in known for known in KNOWN.values()):
            raise ValueError(f"{fields[k].strip()!r} looks like a header, but by number every line "
                             "is an event")
    return delimiter, names, where


def untyped(name):
    """The name of a column without RecBole's type."""
    return re.sub(":(token|float)(_seq)?$", "", name.strip())


def plain(name):
    """The name of a column as KNOWN has it."""
    return re.sub("[_ -]", "", untyped(name).lower())


def header_names(fields):
    """The names in a header, without empty ones at the end."""
    names = [untyped(field) for field in fields]
    while names and not names[-1]:
        names.pop()
    return names


def which_columns(problem, first, roles):
    """The DataError that shows the fields of a file's first line and asks for the columns."""
    by_delimiter = [split_first(first, delimiter) for delimiter in DELIMITERS]
    fields = next((fields for fields in by_delimiter if len(fields) > 1), [first])
    shown = ", ".join(f"{k} {short(field.strip())!r}" for k, field in enumerate(fields[:20], 1))
    flag = "--columns USER,ITEM[,TIME]" if "user" in roles else "--title-columns ITEM,TITLE"
    return DataError(f"{problem}. Its fields: {shown}{', ...' if fields[20:] else ''}. "
                     f"Give {flag}: by name in a header, by number where there is none")


def split_first(first, delimiter):
    """The fields of a first line; the whole line where its quotes are not those of CSV."""
    try:
        return next(split([first], delimiter))
    except csv.Error:
        return [first]


def split(lines, delimiter):
    """A csv.reader of lines. Quotes are CSV's; with a tab or "::" they are characters like any."""
    quoting = csv.QUOTE_NONE if delimiter in ("\t", "::") else csv.QUOTE_MINIMAL
    if delimiter == "::":                          # csv takes one character
        lines, delimiter = (line.replace("::", "\x1f") for line in lines), "\x1f"
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True,
                      strict=True)


def read_rows(path, lines, line, delimiter, width):
    """Yield (line number, fields) of lines that are not blank; the first has the number line.

    Raises DataError for a line that has not width fields, empty ones after these not counted, and
    for a record that does not end on its line: a stray quote would swallow lines up to the next.
    """
    rows, begin = split(lines, delimiter), line
    try:
        for fields in rows:
            if rows.line_num > line - begin + 1:
                raise csv.Error("a quoted field over several lines")
            if len(fields) == width:
                yield line, fields
            elif "".join(fields).strip():
                if len(fields) < width or "".join(fields[width:]).strip():
                    raise DataError(f"{path}, line {line}: {len(fields)} fields, but line {begin} "
                                    f"has {width}: correct it; in CSV a field that holds the "
                                    "delimiter stands in quotes")
                yield line, fields
            line += 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}: check its quotes") from None


def read_lines(path, encoding):
    """Yield the lines of a text file, gzip or not. Raises DataError."""
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = gzip.GzipFile(fileobj=file)
            text = io.TextIOWrapper(file, encoding)
            while line := text.readline(LINE_LIMIT):
                if len(line) == LINE_LIMIT:
                    raise not_text(path, "a line is longer than a megabyte")
                yield line
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise not_text(path, error) from None
    except (OSError, EOFError, zlib.error, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path, its permissions and, "
                        "for gzip, that the file is whole") from None


def not_text(path, reason):
    return DataError(f"{path} is not delimited text in UTF-8 ({reason}): save it as CSV in UTF-8, "
                     "one event a line; in pandas, d.to_csv('data.csv', index=False)")


def short(text):
    return text if len(text) <= 32 else text[:29] + "..."
