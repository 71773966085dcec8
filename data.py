# SPDX-License-Identifier: MIT
"""Interactions in, sequences and batches out.

    file or archive -> read_events               -> Events      one entry per event, as in the file
                    -> prepare                   -> Dataset     filtered, ids 1..V, sorted by time
                    -> training_rows, batches    -> items, targets, starts for the model
                    -> histories                 -> histories and true items for the evaluation

The order is a reader's: what the model sees first, then how the events are filtered and sorted,
text files and archives last; a function stands above those that it calls. The protocol is that of
the official LRURec code for MovieLens, except where a docstring says otherwise.

Does NOT guess: what a file's first line leaves open is asked for. Does NOT read JSON, Parquet or
anything else that is not delimited text, nor use ratings or any other column.
"""
import contextlib
import csv
import gzip
import hashlib
import http.client
import io
import math
import operator
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from array import array
from datetime import datetime, timezone
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
    report: tuple = ()          # lines that say what was read and dropped


class DataError(ValueError):
    """The user's input cannot be used; the message says what, where and what to do."""


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
    begins = np.flatnonzero(first).tolist()                       # each user's first row
    windows, step = [0], max_len or len(items)
    for begin, end in zip(begins, [*begins[1:], len(items)]):
        # Each window's end, from the last one back. Rows 10:17 at max_len 3: the ends are 17, 14
        # and 11, so the windows are 10:11, 11:14 and 14:17
        windows += reversed(range(end, begin, -step))
    windows = np.array(windows)
    starts = first.copy()
    starts[1:] |= first[:-1]                                      # a user's row 1
    starts[windows[:-1]] = True
    return Rows(items, targets, starts, windows)


def batches(rows, batch_size, rng):
    """Yield (items, targets, starts) of batch_size windows at a time, in random order."""
    shuffled = rng.permutation(len(rows.windows) - 1)
    for k in range(0, len(shuffled), batch_size):
        index = np.concatenate([np.arange(rows.windows[w], rows.windows[w + 1])
                                for w in shuffled[k:k + batch_size]])
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


# ---- load_dataset: filtering and order, then the report

NAMES = ("ml-100k", "ml-1m")
TIES = ("item", "file", "random")


def load_dataset(source, min_count=5, ties="item", seed=42, columns=None, titles=None,
                 title_columns=None, delimiter=None):
    """source: "ml-100k", "ml-1m" or the path of a text file -> Dataset. Raises DataError.

    min_count       items, then users, with fewer events are dropped, one pass each; 0 keeps all
    ties            order of events of equal time: "item" by id, as officially; "file" as in the
                    file; "random" from seed
    columns         "USER,ITEM" or "USER,ITEM,TIME": names in the header, or numbers from 1 in a
                    file without one; None: the header has the usual names
    titles          a text file of item ids and titles, with title_columns "ITEM,TITLE" likewise
    delimiter       of these files, where a first line could be divided in several ways
    """
    files = [path for path in (source, titles) if path not in (*NAMES, None)]
    for path in files:
        if not os.path.isfile(path):               # a pipe could be read only once
            known = f"; known by name are {' and '.join(NAMES)}" if path == source else ""
            raise DataError(f"{path} is not a file{known}")
    if ties not in TIES:
        raise DataError(f"ties must be one of {', '.join(TIES)} (got {ties!r})")
    if source in NAMES and columns is not None:
        raise DataError(f"--columns is for a file: the columns of {source} are known")
    if titles is None and title_columns is not None:
        raise DataError("--title-columns are those of --titles: give both")
    if delimiter == "" or delimiter and all(delimiter not in first_line(p)[1] for p in files):
        raise DataError(f"--delimiter {delimiter!r} is not in the first line of a file")

    if source in NAMES:
        events, title_of = read_movielens(source)
    else:
        events, title_of = read_events(source, columns, delimiter), {}
    data = prepare(events, str(source), min_count, ties, seed)
    if titles is not None:
        title_of = read_titles(titles, title_columns, delimiter)
        n_titled = sum(raw in title_of for raw in data.item_ids[1:])
        if not n_titled:
            raise DataError(f"{titles}: no title for an item of {source}: check --title-columns")
        line = f"titles: for {n_titled:,} of {len(data.item_ids) - 1:,} items"
        data = data._replace(report=(*data.report, line))
    return data._replace(titles=[title_of.get(raw, raw) for raw in data.item_ids])


class Events(NamedTuple):
    """Interactions in file order."""
    users: np.ndarray           # (events,) int, positions in user_ids
    items: np.ndarray           # (events,) int, positions in item_ids
    times: np.ndarray           # (events,) float; 0, 1, 2, ... where the file has no times
    user_ids: list              # raw ids, text
    item_ids: list
    has_times: bool
    report: tuple = ()          # which column was read as what, and the first event


def prepare(events, name, min_count, ties, seed):
    """Events -> Dataset, without titles. Raises DataError where nothing is left."""
    users, user_ids = sort_ids(events.users, events.user_ids)
    items, item_ids = sort_ids(events.items, events.item_ids)
    by_item = np.lexsort((items, events.times, users))            # by user, then time, then item
    keep, dropped = filter_events(users, items, by_item, min_count)
    if not keep.any():
        raise DataError(f"{name}: nobody is left with {min_count} events or more: lower "
                        f"--min-count, or check the columns ({'; '.join(events.report)})")
    if ties == "item":
        order = by_item
    elif ties == "file":
        order = np.lexsort((events.times, users))  # stable: at equal times as in the file
    else:
        tie = np.zeros(len(keep), int)             # drawn for the kept ones alone
        tie[keep] = np.random.default_rng(seed).permutation(keep.sum())
        order = np.lexsort((tie, events.times, users))
    order = order[keep[order]]                     # without the events that are dropped
    users, items, times = users[order], items[order], events.times[order]

    kept_users, lengths = np.unique(users, return_counts=True)
    user_ids = [user_ids[k] for k in kept_users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kept_items, items = np.unique(items, return_inverse=True)     # items: 0, 1, ... without gaps
    item_ids = ["", *(item_ids[k] for k in kept_items)]
    items += 1                                                    # 0 is the empty history
    digest = hashlib.sha256(np.concatenate([items, offsets]).astype("<i8", copy=False))
    digest.update("\0".join(item_ids).encode())
    data = Dataset(name, items, offsets, user_ids, item_ids, titles=item_ids,
                   digest=digest.hexdigest())
    facts = describe(data, times if events.has_times else None, dropped)
    return data._replace(report=(*events.report, *facts))


def sort_ids(codes, raw_ids):
    """codes, positions in raw_ids -> positions in the ascending raw ids, and these.

    They ascend as int where all are, else as float where all are, else as text; ids of one number
    (01 and 1) stay in order of text.
    """
    ascending = sorted(raw_ids)
    for number in (float, int):                    # int last: exact where all are whole numbers
        with contextlib.suppress(ValueError):      # not all are such numbers
            ascending = sorted(ascending, key=number)             # stable
    position = {raw: k for k, raw in enumerate(ascending)}
    return np.array([position[raw] for raw in raw_ids], codes.dtype)[codes], ascending


def filter_events(users, items, by_item, min_count):
    """Which events are kept, (events,) bool, and a line that says what was dropped. by_item: the
    events' positions in the order of user, time, item.

    Repeats go first, then items, then users, with fewer than min_count events. A repeat has the
    item of its user's event before in that order: neither the order of lines nor lines that stand
    twice matter. (The official code compares neighbouring lines: a deviation without effect on
    MovieLens.)
    """
    before, after = by_item[:-1], by_item[1:]
    keep = np.ones(len(users), bool)
    keep[after] = (users[before] != users[after]) | (items[before] != items[after])
    counts = [len(keep), keep.sum()]
    for codes in (items, users):
        keep &= np.bincount(codes, weights=keep)[codes] >= min_count
        counts.append(keep.sum())
    repeats, of_items, of_users = -np.diff(counts)
    return keep, (f"dropped: {repeats:,} repeats; {of_items:,} events of items and {of_users:,} "
                  f"events of users with fewer than {min_count}")


def describe(data, times, dropped):
    """Lines that show a wrong reading at once: counts, first and last time, ties, repeats.
    times (events,), None where the file has none; dropped: the line of filter_events."""
    lengths, events = np.diff(data.offsets), f"{len(data.items):,} events"
    if times is not None:
        events += " from {} to {}".format(*dates(times.min(), times.max()))
    lines = [f"{data.name}: {len(lengths):,} users, {len(data.item_ids) - 1:,} items, {events}",
             dropped]
    user = np.repeat(np.arange(len(lengths)), lengths)            # (events,) whose event it is
    if times is not None:
        ties = np.sum((times[1:] == times[:-1]) & (user[1:] == user[:-1]))
        share = ties / max(1, len(times) - len(lengths))          # of those that have one before
        lines.append(f"{share:.0%} of events have the same time as their user's previous event")
    last = data.items[data.offsets[1:] - 1]                       # (users,) the test items
    times_seen = np.bincount(user[data.items == last[user]])      # the test event is one of them
    tested = lengths >= 3
    seen = np.sum(tested & (times_seen > 1))
    lines.append(f"{seen:,} of {tested.sum():,} test items are already in their user's history"
                 + (": they count as misses without --rank-seen" if seen else ""))
    return lines


def dates(first, last):
    """Two times as text: as dates where both look like seconds or milliseconds since 1970."""
    for scale in (1, 1000):
        if 1e8 * scale <= first and last < 1e10 * scale:          # from 1973 to 2286
            return [f"{datetime.fromtimestamp(time / scale, timezone.utc):%Y-%m-%d %H:%M}"
                    for time in (first, last)]
    return [str(time).removesuffix(".0") for time in (first, last)]


# ---- Text files: events, titles, then what both need

QUOTED = (",", ";", "|")                           # between these a field may stand in quotes
DELIMITERS = ("::", *QUOTED, " ")
KNOWN = {                                          # in lower case, without blanks, "_" and "-"
    "user": "user userid uid reviewerid visitorid customerid sessionid".split(),
    "item": "item itemid iid movieid videoid productid asin parentasin bookid trackid "
            "articleid".split(),
    "time": "timestamp timems timestampms unixreviewtime unixtime datetime eventtime eventdate "
            "eventtimestamp createdat ratedat time ts date".split(),
    "title": "title movietitle itemtitle producttitle prodname name caption".split()}
USUAL = {name for names in KNOWN.values() for name in names}
FLAGS = {                                          # to give, by the first role of a table
    "user": "--columns USER,ITEM[,TIME]", "item": "--title-columns ITEM,TITLE"}
MISSING = {"", "nan", "null", "none", "na", "n/a", "#n/a", "<na>", "\\n"}      # in lower case


def read_events(path, columns=None, delimiter=None):
    """Events of a text file. Raises DataError."""
    names, delimiter, records = read_table(path, ("user", "item", "time"), columns, delimiter)
    has_times = len(names) == 3
    users, items, times = array("i"), array("i"), array("d")
    user_codes, item_codes = {}, {}                # raw id -> 0, 1, 2, ...
    for n, fields in records:
        if not users:                              # the first event's time decides for all
            first, numeric = fields, has_times and is_number(fields[2])
        user, item = fields[0].strip(), fields[1].strip()
        try:
            if user not in user_codes or item not in item_codes:
                check_ids(user, item, names, delimiter)
            users.append(user_codes.setdefault(user, len(user_codes)))
            items.append(item_codes.setdefault(item, len(item_codes)))
            times.append(read_time(fields[2], numeric) if has_times else len(times))
        except ValueError as problem:
            hint = ". If this line is a header, give --columns by name" if n == 1 else ""
            raise DataError(f"{path}, line {n}: {problem}{hint}") from None
    if not users:
        raise DataError(f"{path} has a header but no events: it needs a line for each event")
    origins = [f"{role} from {name}" for role, name in zip(("user", "item", "time"), names)]
    if not has_times:
        origins.append("time from the order of the lines")
    report = (f"columns: {', '.join(origins)}",
              f"first event: {', '.join(repr(text.strip()) for text in first)}")
    return Events(np.asarray(users), np.asarray(items), np.asarray(times), list(user_codes),
                  list(item_codes), has_times, report)


def check_ids(user, item, names, delimiter):
    """Raise ValueError where a line's user and item cannot be ids. names: of the columns."""
    if [user, item] == names[:2] or plain(user) in USUAL and plain(item) in USUAL:
        raise ValueError(f"a header again, {user!r} and {item!r}: delete the line")
    for raw in (user, item):
        if raw.lower() in MISSING:
            raise ValueError(f"{raw!r} marks a missing value: correct or delete the line")
        if raw.startswith('"') or '"' in raw and delimiter not in QUOTED:
            raise ValueError(f"the id {raw!r} holds a quote, which has a meaning only around the "
                             "fields between , ; or |: write the ids without quotes")


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_time(text, numeric):
    """A time as a float: a number as it is or, if not numeric, ISO 8601 as seconds since 1970, in
    UTC where it names no zone. Raises ValueError."""
    try:
        if numeric:
            time = float(text)
        else:
            moment = datetime.fromisoformat(text.strip().removesuffix(" UTC"))
            time = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        if math.isfinite(time) and "_" not in text:               # Python reads 1_000 as 1000
            return time
    except ValueError:
        pass
    raise ValueError(f"the time {text!r}: times must be all finite numbers or all ISO 8601, as in "
                     "2024-05-01 12:30: delete the line or, in pandas, d['time'] = "
                     "pandas.to_datetime(d['time'], format='%d/%m/%Y')")


def read_titles(path, columns=None, delimiter=None, encoding="utf-8-sig"):
    """{raw item id: title} of a text file, of several titles the last. Raises DataError."""
    _, _, records = read_table(path, ("item", "title"), columns, delimiter, encoding)
    return {item.strip(): title.strip() for _, (item, title) in records if title.strip()}


def read_table(path, roles, columns=None, delimiter=None, encoding="utf-8-sig"):
    """Open a text file -> names of the wanted columns, delimiter, records. Raises DataError.

    roles       what the columns are for: ("user", "item", "time") or ("item", "title")
    columns     as in load_dataset: names or numbers; None: the usual names for these roles
    delimiter   taken if the first line holds it, else chosen
    records     yields (line number, the fields in the wanted columns); raises DataError too
    """
    wanted = None if columns is None else [untyped(name) for name in columns.split(",")]
    if wanted and ("" in wanted or not 2 <= len(set(wanted)) == len(wanted) <= len(roles)):
        raise DataError(f"{FLAGS[roles[0]]} must be different names or numbers (got {columns!r})")
    number, line = first_line(path, encoding)
    try:
        delimiter, fields = divide(line, roles, wanted, delimiter)
        where = choose_columns(fields, roles, wanted)
    except ValueError as problem:
        raise DataError(f"{path}, line {number}: {problem}") from None
    if by_number(wanted):
        header, names = 0, [f"column {k + 1}" for k in where]
    else:
        header, names = number, [fields[k] for k in where]
    rows = split(read_lines(path, encoding), delimiter)
    return names, delimiter, read_records(path, rows, header, len(fields), where)


def by_number(wanted):
    return wanted is not None and all(name.isdecimal() for name in wanted)


def divide(line, roles, wanted, given):
    """A file's delimiter and the fields of its first line. The given one or a tab, if the line
    holds it, else the only one that yields all wanted columns. Raises ValueError for several."""
    certain = [d for d in (given, "\t") if d and d in line]
    fields_of = {d: split_line(line, d) for d in certain[:1] or DELIMITERS}
    complete = [d for d, fields in fields_of.items()
                if all(find_columns(fields, roles, wanted).values())]
    if len(complete) > 1:
        raise ValueError(f"it can be divided at {' or '.join(map(repr, complete))}: give one as "
                         f"--delimiter. The line: {line.strip()[:400]!r}")
    # If none will do, choose_columns refuses the one with most fields, and shows them
    delimiter = max(complete or fields_of, key=lambda d: len(fields_of[d]))
    return delimiter, fields_of[delimiter]


def find_columns(fields, roles, wanted):
    """{wanted name: positions of the fields of a first line that fit it}. Where no names are given,
    these are the roles, without "time" if no field has a usual name for a time."""
    if wanted is None:
        found = {role: [k for k, field in enumerate(fields) if plain(field) in KNOWN[role]]
                 for role in roles}
        return {role: fits for role, fits in found.items() if fits or role != "time"}
    names = [str(k + 1) if by_number(wanted) else untyped(field) for k, field in enumerate(fields)]
    return {column: [k for k, name in enumerate(names) if name == column] for column in wanted}


def choose_columns(fields, roles, wanted):
    """The positions of the wanted columns in the fields of a first line. Raises ValueError."""
    found = find_columns(fields, roles, wanted)
    missing = [name for name, fits in found.items() if not fits]
    several = [f"{name}: {', '.join(repr(fields[k]) for k in fits)}"
               for name, fits in found.items() if len(fits) > 1]
    where = [fits[0] for fits in found.values() if fits]
    headings = [fields[k] for k in where if plain(fields[k]) in USUAL]
    if missing and by_number(wanted):
        problem = f"no column {', '.join(missing)}: they are numbered from 1"
    elif missing:
        problem = f"no header names the columns {', '.join(missing)}"
    elif several:
        problem = (f"several columns for {'; '.join(several)} (if they have one name, delete this "
                   "line and choose by number)")
    elif wanted is None and len(where) < len(roles) and len(fields) > 2:
        problem = "no column has a usual name for the time"       # which two columns may lack
    elif headings and by_number(wanted):
        problem = f"{headings[0]!r} looks like a header, but by number every line is an event"
    else:
        return where
    shown = ", ".join(f"{k} {field!r}" for k, field in enumerate(fields, 1))
    raise ValueError(f"{problem}. Its fields: {shown[:400]}. Give {FLAGS[roles[0]]}: by name in a "
                     "header, by number where there is none")


def untyped(name):
    """The name of a column without RecBole's type: user_id:token -> user_id"""
    return re.sub(":(token|float)(_seq)?$", "", name.strip())


def plain(name):
    """The name of a column as KNOWN has it."""
    return re.sub("[_ -]", "", untyped(name).lower())


def read_records(path, rows, header, width, where):
    """Yield (line number, the fields at where) of each line below the header that is not blank.
    rows: a csv.reader; header: its line, or 0. Raises DataError."""
    n, pick = 0, operator.itemgetter(*where)
    try:
        for n, fields in enumerate(rows, 1):
            if n <= header:
                continue
            if rows.line_num != n:
                raise DataError(f"{path}, line {n}: a field in quotes goes on in the next line: "
                                "check its quotes, or drop that column")
            if len(fields) == width:
                yield n, pick(fields)
            elif "".join(fields).strip():
                raise DataError(f"{path}, line {n}: {len(fields)} fields, but the first line has "
                                f"{width}: correct it; between , ; or | a field that holds the "
                                "delimiter stands in quotes")
    except csv.Error as error:
        raise DataError(f"{path}, line {n + 1}: {error}: check its quotes, or drop "
                        "that column") from None


def split_line(line, delimiter):
    """The fields of one line; the whole line where its quotes are not those of CSV."""
    try:
        return [field.strip() for field in next(split([line], delimiter))]
    except csv.Error:
        return [line.strip()]


def split(lines, delimiter):
    """A csv.reader of lines. Between , ; and | a quote is CSV's, elsewhere a character like any.

    csv takes delimiters of one character and counts blanks one by one: such become tabs.
    """
    separator = delimiter
    if delimiter == " ":
        lines, separator = ("\t".join(line.split()) for line in lines), "\t"
    elif len(delimiter) > 1:
        lines, separator = (line.replace(delimiter, "\t") for line in lines), "\t"
    quoting = csv.QUOTE_MINIMAL if delimiter in QUOTED else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=separator, quoting=quoting, skipinitialspace=True,
                      strict=True)


def first_line(path, encoding="utf-8-sig"):
    """The number of a file's first line that is not blank, and the line. Raises DataError."""
    for n, line in enumerate(read_lines(path, encoding), 1):
        if not line.isspace():
            return n, line
    raise DataError(f"{path} is empty: it needs a line for each event")


def read_lines(path, encoding):
    """Yield the lines of a text file, gzip if its name ends in .gz. Raises DataError."""
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding=encoding, newline="") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): it must be text in UTF-8, gzip where "
                        "its name ends in .gz") from None


# ---- MovieLens: fetched once, kept in the user's cache folder, as the archive it came in

GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
MEMBERS = {                                        # events, films and the delimiter of the films
    "ml-100k": ("ml-100k/u.data", "ml-100k/u.item", "|"),
    "ml-1m": ("ml-1m/ratings.dat", "ml-1m/movies.dat", "::")}
RECBOLE = "recbole==1.2.1"                         # its wheel holds a copy of ML-100K
RECBOLE_COPY = "recbole/dataset_example/ml-100k/ml-100k"
# SHA-256 of the parsed events, as int64 (user, item, time), sorted: the same for either source
ML_100K_EVENTS = "1afd07a2aed70da877a6e56275fd8531be6ee9b84a95484c641a2af341950882"


def read_movielens(name, opener=urllib.request.urlopen):
    """Events and {raw item id: title} of "ml-100k" or "ml-1m", from its archive in the cache, which
    is fetched where it is missing. Raises DataError."""
    folder = os.path.expanduser(os.environ.get("LRUREC_CACHE") or "~/.cache/lrurec")
    path = os.path.join(folder, name + ".zip")
    if os.path.exists(path):
        try:
            return parse_archive(name, path)
        except DataError as error:
            raise DataError(f"{path}: {error}: delete it to have it fetched again") from None
    archive, parsed = fetch(name, path, opener)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path + ".part", "wb") as file:
            file.write(archive)
        os.replace(path + ".part", path)
    except OSError as error:
        print(f"{name} is not kept ({error}): set LRUREC_CACHE to a folder that can be written",
              file=sys.stderr)
    return parsed


def fetch(name, path, opener):
    """The bytes of an archive of "ml-100k" or "ml-1m", and what parse_archive finds in them.
    path: where to put it by hand, if need be. Raises DataError."""
    url = GROUPLENS.format(name)
    print(f"fetching {name} from {url}", file=sys.stderr)
    try:
        with opener(url, timeout=20) as response:
            archive = response.read()
        return archive, parse_archive(name, io.BytesIO(archive))
    except (OSError, http.client.HTTPException, DataError) as error:
        problem = str(error)
    if name == "ml-100k":
        print(f"{problem}; fetching the copy in {RECBOLE} with pip", file=sys.stderr)
        try:
            archive = recbole_wheel()
            return archive, parse_archive(name, io.BytesIO(archive))
        except (OSError, DataError) as error:
            problem += f"; {error}"
    raise DataError(f"{name} cannot be fetched ({problem}): download {url} by hand and put it at "
                    f"{path}")


def recbole_wheel():
    """The bytes of the RecBole wheel, through this interpreter's pip. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
                   "--disable-pip-version-check", "--dest", folder, RECBOLE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            *_, reason = done.stderr.strip().rpartition("\n")
            raise OSError(f"pip: {reason}")
        with open(os.path.join(folder, os.listdir(folder)[0]), "rb") as file:
            return file.read()


def parse_archive(name, archive):
    """Events and {raw item id: title} of an archive, a path or an open file. Raises DataError."""
    try:
        with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory() as folder:
            if RECBOLE_COPY + ".inter" in file.namelist():
                events = read_events(file.extract(RECBOLE_COPY + ".inter", folder))
                title_of = recbole_titles(file.extract(RECBOLE_COPY + ".item", folder))
            else:
                ratings, films, delimiter = MEMBERS[name]
                events = read_events(file.extract(ratings, folder), "1,2,4")
                title_of = read_titles(file.extract(films, folder), "1,2", delimiter, "latin-1")
        if name == "ml-100k" and events_digest(events) != ML_100K_EVENTS:
            raise ValueError("not the 100,000 events of ML-100K")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise DataError(f"not an archive of {name} ({error})") from None
    return events._replace(report=()), title_of


def events_digest(events):
    """SHA-256 of events whose ids are integers, whatever their order."""
    users, items = np.array(events.user_ids, np.int64), np.array(events.item_ids, np.int64)
    table = np.stack([users[events.users], items[events.items], events.times], 1).astype("<i8")
    return hashlib.sha256(table[np.lexsort(table.T[::-1])].tobytes()).hexdigest()


def recbole_titles(path):
    """As GroupLens has them: RecBole keeps the year apart and misspells one title."""
    columns = "item_id,movie_title,release_year"
    _, _, records = read_table(path, ("item", "title", "year"), columns)
    return {item: "unknown" if title == "unkonwn" else f"{title} ({year})"
            for _, (item, title, year) in records}
