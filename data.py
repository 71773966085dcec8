# SPDX-License-Identifier: MIT
"""Interactions in, sequences and batches out.

    text or archive -> read_file, parse_archive  -> Events      one row per event, as in the file
                    -> prepare                   -> Dataset     filtered, ids 1..V, sorted by time
                    -> training_rows, batches    -> items, targets, starts for the model
                    -> histories                 -> histories and true items for the evaluation

A first reading may begin at "From events to sequences": the protocol is that of the official LRURec
code for MovieLens, except where a docstring says otherwise.
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
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text):
    """text with its control characters written as escapes: safe to show on a terminal."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class DataError(ValueError):
    """The user's input cannot be used; the message is one printable line."""

    def __init__(self, message):
        super().__init__(printable(message))


class Events(NamedTuple):
    """Interactions in file order."""
    users: np.ndarray           # (events,) int, positions in user_ids
    items: np.ndarray           # (events,) int, positions in item_ids
    times: np.ndarray           # (events,) int or float; 0, 1, 2, ... where the file has no times
    user_ids: list              # raw ids, text
    item_ids: list
    titles: dict = {}           # raw item id -> title
    layout: str = ""            # which column was read as what, to be shown


class Dataset(NamedTuple):
    """Every user's events, oldest first, one user after another."""
    name: str
    items: np.ndarray           # (events,) int, ids 1..V
    offsets: np.ndarray         # (users + 1,) user u owns items[offsets[u]:offsets[u + 1]]
    user_ids: list              # (users,) raw ids
    item_ids: list              # (V + 1,) raw ids; item_ids[0] is ""
    titles: list                # (V + 1,) titles, or the raw id where there is none
    digest: str                 # of items, offsets and item_ids: the same data, the same digest
    layout: str = ""            # as in Events
    settings: dict = {}         # of load_dataset; a run keeps them


# ---- Any delimited text: lines and rows, read as a stream

LINE_LIMIT = 2 ** 20            # characters
EVENT = ("a line is one event, user,item[,time], in UTF-8, with ids that are text without control "
         "characters and not missing, fields that hold the delimiter in quotes, and times all as "
         "finite numbers below 2^63, seconds or milliseconds, or all as ISO 8601, 2024-05-01 12:30")
MISSING = {"", "NA", "NaN", "nan", "NULL", "null", "None", "\\N"}           # as exports write it
ISO_8601 = re.compile(r"\s*(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d+))?)?)?"
                      r" ?(?:Z|UTC|([+-]\d\d):?(\d\d)?)?\s*", re.ASCII | re.IGNORECASE)
EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
PANDAS = 'convert it: python -c "import pandas; pandas.{}.to_csv(\'data.csv\', index=False)"'
OTHER_FORMATS = [               # how such a file begins, what it is, what to do
    (rb"PAR1", "Parquet", PANDAS.format("read_parquet('FILE')")),
    (rb"PK.*(xl/|docProps/|\[Content_Types)", "xlsx", PANDAS.format("read_excel('FILE')")),
    (rb"PK\x03\x04", "a zip archive", "unpack it and give the file inside"),
    (rb"BZh", "compressed with bz2", "unpack it with bunzip2"),
    (rb"\x80[\x02-\x05]", "a pickle", "if you trust it, " + PANDAS.format("read_pickle('FILE')")),
    (rb"\s*[\[{]\s*['\"]", "JSON lines",
     PANDAS.format("read_json('FILE', lines=True, dtype=False)")),
    (rb"\s*\[\s*[\[{]", "JSON", PANDAS.format("read_json('FILE', dtype=False)")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "save it as UTF-8"),
]


def read_lines(path):
    """Yield the lines of a text file, gzip or not; a byte that is not UTF-8 as a surrogate."""
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = gzip.GzipFile(fileobj=file)
            elif str(path).endswith(".gz"):
                raise DataError(f"{path} is named .gz but is not gzip: rename it or compress it")
            beginning = file.peek(4096)
            for pattern, what, remedy in OTHER_FORMATS:
                if re.match(pattern, beginning, re.DOTALL):
                    raise DataError(f"{path} is {what}, not delimited text: {remedy}")
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
            for number, line in enumerate(iter(lambda: text.readline(LINE_LIMIT + 1), ""), 1):
                if len(line) > LINE_LIMIT:
                    raise DataError(f"{path}, line {number}: over {LINE_LIMIT} characters: {EVENT}")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path, its permissions and, "
                        "for gzip, that the file is whole") from None


def read_rows(path):
    """Yield (line number, fields) of every row that is not blank. At least one, or DataError."""
    lines = read_lines(path)
    for begin, first in enumerate(lines, 1):
        if first.strip():
            break
    else:
        raise DataError(f"{path} is empty: it needs lines of user,item[,time]")
    unquoted = re.sub('"[^"]*"', "", first).strip(" \r\n")
    candidates = ["\t", "::", max(";,|", key=unquoted.count), " "]
    if unquoted.count("::") == 1 and "," in unquoted:             # a name: Foo::Bar,7
        candidates.remove("::")
    delimiter = next((text for text in candidates if text in unquoted), None)
    if delimiter is None:
        raise DataError(f"{path}, line {begin}: no delimiter in {first.strip()[:60]!r}: separate "
                        "the columns by tab, '::', comma, semicolon, '|' or space")
    lines = itertools.chain([first], lines)
    if delimiter == "::":
        for number, line in enumerate(lines, begin):
            if line.strip():
                yield number, line.split("::")
        return
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    number = begin
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                yield number, fields
            number = begin + reader.line_num       # a quoted field may span several lines
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: {error}: check its quotes") from None


# Names of columns in lower case, without spaces, "_" and "-". Where a header has several of a list,
# the first of the list is taken: of times, the finest.
USER_NAMES = "user userid uid reviewerid visitorid customerid sessionid".split()
ITEM_NAMES = "item itemid iid movieid videoid sid productid asin parentasin bookid trackid".split()
TIME_NAMES = ("timems timestampms timestamp eventtimestamp unixreviewtime unixtime datetime "
              "eventtime createdat ratedat time ts date eventdate").split()
TITLE_NAMES = "title movietitle itemtitle producttitle name itemname".split()


def column_names(row):
    """The fields of a first row as names of columns, printable, without RecBole's types."""
    names = [printable(re.sub(":(token|float)(_seq)?$", "", field.strip())) for field in row]
    while names and not names[-1]:                 # a delimiter at the end makes no column
        names.pop()
    return names


def find_name(names, known):
    """Position of the column with the first of the known names that occurs, or None."""
    plain = [re.sub("[_ -]", "", name.lower()) for name in names]
    return next((plain.index(name) for name in known if name in plain), None)


def find_columns(names, place, columns=None):
    """Whether the first row is a header, and the positions of user, item and, if any, time."""
    text = ", ".join(names)[:200]
    user, item, time = (find_name(names, known) for known in (USER_NAMES, ITEM_NAMES, TIME_NAMES))
    header = user is not None and item is not None
    no_event = user is not None or item is not None or not re.search(r"\d", "".join(names))
    if columns:
        by_number = all(column.isdecimal() for column in columns)
        labels = [str(k + 1) for k in range(len(names))] if by_number else names
        for column in columns:
            if column not in labels:
                raise DataError(f"{place}: no column {column!r}: choose --columns by number from "
                                f"1 to {len(names)}, or by name from {text}")
        return no_event or not by_number, [labels.index(column) for column in columns]
    if header:
        date = find_name(names, ["date"])
        if time is not None and names[time].lower() == "time" and date is not None:
            raise DataError(f"{place}: a time and a date in {text}: join them in one column, or "
                            "choose one with --columns USER,ITEM,TIME")
        if time is None and len(names) > 2:
            print(f"train.py: warning: {printable(place)}: no known time column in {text}: events "
                  "are taken in file order; if one of the columns is the time, use --columns "
                  "USER,ITEM,TIME", file=sys.stderr)
        return True, [user, item] if time is None else [user, item, time]
    dated = any(re.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d.*)?", name) for name in names[:-1])
    no_rating = re.match(r"\d{9}", "".join(names[2:-1]))          # of four columns: a time
    if no_event or dated or no_rating or not 2 <= len(names) <= 4:
        raise DataError(f"{place}: unknown header, or no event user,item[,[rating,]time]: {text}: "
                        "if it is an event, put a line user,item,time above it, else use --columns "
                        "USER,ITEM[,TIME]; a line holds one event, not a user's whole sequence")
    return False, {2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 3]}[len(names)]


def describe(names, where):
    """Which column is read as what, in words."""
    text = ", ".join(f"{role} from {names[k]}" for role, k in zip(["user", "item", "time"], where))
    others = ", ".join(name for k, name in enumerate(names) if k not in where)[:200]
    return f"{text}; other columns ({others}) unused" if others else text


def number(text):
    """text as int, exactly, or else as a float, below 2^63 in size. Raises ValueError."""
    try:
        value = int(text)
    except ValueError:
        value = float(text)
    if not abs(value) < 2 ** 63:                   # nan is not, either
        raise ValueError(f"{text[:40]!r} is not a finite number below 2^63")
    return value


def microseconds(text):
    """From 1970 to an ISO 8601 time; without a zone it is UTC. Raises ValueError."""
    match = ISO_8601.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not ISO 8601, but an earlier time is")
    day, minute, second, fraction, zone_hour, zone_minute = match.groups()
    full = (f"{day}T{minute or '00:00'}:{second or '00'}.{(fraction or '0')[:6]:0<6}"
            f"{zone_hour or '+00'}:{zone_minute or '00'}")          # Python 3.10 needs all of it
    return (datetime.fromisoformat(full) - EPOCH) // timedelta(microseconds=1)


def read_file(path, columns=None):
    """Events of a delimited text file, gzip or not. Raises DataError.

    columns: [USER, ITEM] or [USER, ITEM, TIME], names in the header or numbers from 1, as texts.
    """
    rows = read_rows(path)
    line, first = next(rows)
    names = column_names(first)
    header, where = find_columns(names, f"{path}, line {line}", columns)
    if not header:
        names = [f"column {k + 1}" for k in range(len(names))]
        rows = itertools.chain([(line, first)], rows)
    width, needed, read_time = len(names), max(where) + 1, None
    u, i, t = where if len(where) == 3 else [*where, None]
    users, items, times = array("i"), array("i"), array("q")
    user_codes, item_codes = {}, {}                # raw id -> 0, 1, 2, ...
    for line, row in rows:
        try:
            if len(row) < needed or len(row) > width and "".join(row[width:]).strip():
                raise ValueError(f"{len(row)} columns where the first line has {width}")
            user, item, when = row[u].strip(), row[i].strip(), len(times)
            if user not in user_codes or item not in item_codes:
                if user in MISSING or item in MISSING or CONTROL.search(user + item):
                    raise ValueError(f"user {user[:40]!r}, item {item[:40]!r} cannot be ids")
            if t is not None:
                if read_time is None:              # the first time decides for all
                    read_time = microseconds if ISO_8601.fullmatch(row[t]) else number
                when = read_time(row[t])
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {str(error)[:200]}: {EVENT}") from None
        users.append(user_codes.setdefault(user, len(user_codes)))
        items.append(item_codes.setdefault(item, len(item_codes)))
        if type(when) is float and times.typecode == "q":
            times = array("d", times)
        times.append(when)
    if not users:
        raise DataError(f"{path} has a header but no events: it needs lines of user,item[,time]")
    return Events(np.asarray(users), np.asarray(items), np.asarray(times), list(user_codes),
                  list(item_codes), layout=describe(names, where))


def read_titles(path):
    """{raw item id: title} of a text file: its columns of known names, else its first two."""
    titles, rows = {}, read_rows(path)
    line, first = next(rows)
    names = column_names(first)
    i, t = find_name(names, [*ITEM_NAMES, "id"]), find_name(names, TITLE_NAMES)
    if i is None or t is None:
        i, t, rows = 0, 1, itertools.chain([(line, first)], rows)
    for line, row in rows:
        if len(row) <= max(i, t) or len(row) > len(first):
            raise DataError(f"{path}, line {line}: {len(row)} columns where the first line has "
                            f"{len(first)}: put what holds the delimiter in quotes")
        # a byte that was not UTF-8 is taken as Latin-1, in which MovieLens writes
        title = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xdc00), row[t].strip())
        titles[row[i].strip()] = title
    return titles


# ---- MovieLens: fetched once, kept in the user's cache folder, as the archive it came in

NAMES = ("ml-100k", "ml-1m")
GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
RECBOLE = "recbole==1.2.1"                      # its wheel holds a copy of ML-100K
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
# SHA-256 of the parsed events, as int64 (user, item, time), sorted: the same for either source
ML_100K_EVENTS = "1afd07a2aed70da877a6e56275fd8531be6ee9b84a95484c641a2af341950882"


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


def parse_archive(name, archive, path):
    """Events of a MovieLens archive (a file or its path); `path` is what error messages name."""
    try:
        with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory() as folder:
            if name == "ml-1m":
                members = "ml-1m/ratings.dat", "ml-1m/movies.dat"
            elif "ml-100k/u.data" in file.namelist():
                members = "ml-100k/u.data", "ml-100k/u.item"
            else:
                members = RECBOLE_FOLDER + ".inter", RECBOLE_FOLDER + ".item"
            ratings, films = (file.extract(member, folder) for member in members)
            events, titles = read_file(ratings), read_titles(films)
            if members[0].startswith(RECBOLE_FOLDER):  # the year is apart, one title misspelt
                for _, (item, title, year, _) in read_rows(films):
                    titles[item] = "unknown" if title == "unkonwn" else f"{title} ({year})"
        if name == "ml-100k":
            users, items = np.array(events.user_ids, np.int64), np.array(events.item_ids, np.int64)
            table = np.stack([users[events.users], items[events.items], events.times], 1)
            table = table[np.lexsort(table.T[::-1])].astype("<i8")
            if hashlib.sha256(table.tobytes()).hexdigest() != ML_100K_EVENTS:
                raise ValueError("not the 100,000 events of ML-100K")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not an archive of {name} ({error}): "
                        "delete it to have it fetched again") from None
    return events._replace(titles=titles, layout="")


def fetch_movielens(name, opener=urllib.request.urlopen):
    """Path of the archive of "ml-100k" or "ml-1m" in the cache, fetched where it is missing."""
    default = os.path.join(os.path.expanduser("~"), ".cache", "lrurec")
    path = os.path.join(os.environ.get("LRUREC_CACHE") or default, name + ".zip")
    if os.path.exists(path):
        return path
    url, failures = GROUPLENS.format(name), []
    sources = [("GroupLens", lambda: opener(url, timeout=20).read())]
    if name == "ml-100k":
        sources.append((RECBOLE, recbole_wheel))
    for source, get in sources:
        if sys.stderr.isatty():
            print(f"fetching {name} from {source}", file=sys.stderr)
        try:
            archive = get()
            parse_archive(name, io.BytesIO(archive), "what came")  # a wrong one is not kept
        except Exception as error:                 # whatever it is: the next source is asked
            failures.append(f"{source}: {' '.join(str(error).split())}")
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path + ".part", "wb") as file:
                file.write(archive)
            os.replace(path + ".part", path)       # whole or not at all
            return path
    raise DataError(f"{name} cannot be fetched ({'; '.join(failures)}): "
                    f"download {url} by hand and put it at {path}")


# ---- From events to sequences

def load_dataset(source, min_count=5, ties="item", seed=42, columns=None, titles=None):
    """source: "ml-100k", "ml-1m" or a file; titles: a file of titles -> Dataset. Raises DataError.

    columns     "USER,ITEM" or "USER,ITEM,TIME": names in the header, or numbers from 1
    min_count   items, then users, with fewer events are dropped, one pass each; 0 keeps all
    ties        order of events of equal time: "item" by id, as officially, "file", "random" by seed
    """
    if ties not in ("item", "file", "random"):
        raise DataError(f"ties must be 'item', 'file' or 'random' (got {ties!r})")
    names = columns and [name.strip() for name in str(columns).split(",")]
    if names and (source in NAMES or not 2 <= len(set(names)) == len(names) <= 3):
        raise DataError(f"--columns must be USER,ITEM or USER,ITEM,TIME of a file (got {columns})")
    if source in NAMES:
        path = fetch_movielens(source)
        events = parse_archive(source, path, path)
    else:
        events = read_file(source, names)
    if titles is not None:
        events = events._replace(titles=read_titles(titles))
        if not events.titles.keys() & set(events.item_ids):
            raise DataError(f"{titles}: no id of an item of {source}: give lines of item_id,title")
    settings = dict(min_count=min_count, ties=ties, columns=columns)
    if ties == "random":
        settings["seed"] = seed
    return prepare(events, source, min_count, ties, seed)._replace(settings=settings)


def prepare(events, name, min_count, ties, seed):
    """Events -> Dataset: repeats of the line before, rare items, then rare users dropped."""
    users, items = events.users, events.items
    differs = (users[1:] != users[:-1]) | (items[1:] != items[:-1])     # from the line before
    keep = np.flatnonzero(np.append(True, differs))
    for codes in (items, users):
        keep = keep[np.bincount(codes[keep])[codes[keep]] >= min_count]
    if not len(keep):
        raise DataError(f"{name}: nobody is left with {min_count} events or more ("
                        f"{events.layout or name}): lower --min-count, or check the columns")
    users, user_ids = renumber(users[keep], events.user_ids)
    items, item_ids = renumber(items[keep], events.item_ids)
    items += 1                                     # 0 is the empty history
    tie = {"item": items, "file": np.arange(len(items)),
           "random": np.random.default_rng(seed).permutation(len(items))}[ties]
    items = items[np.lexsort((tie, events.times[keep], users))]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))])
    digest = hashlib.sha256(np.concatenate([items, offsets]).astype("<i8", copy=False))
    for raw in item_ids:
        digest.update(b"\0" + raw.encode())
    titles = [""] + [events.titles.get(raw) or raw for raw in item_ids]
    return Dataset(name, items, offsets, user_ids, [""] + item_ids, titles, digest.hexdigest(),
                   events.layout)


def renumber(codes, raw_ids):
    """New codes 0, 1, ... by raw id, as numbers where all are -> codes, the raw ids in order."""
    order = sorted(np.flatnonzero(np.bincount(codes)).tolist(), key=raw_ids.__getitem__)
    try:
        order = sorted(order, key=lambda code: number(raw_ids[code]))    # equal ones stay by text
    except ValueError:
        pass                                       # not all are numbers
    new = np.empty(len(raw_ids), np.int64)
    new[order] = np.arange(len(order))
    return new[codes], [raw_ids[code] for code in order]


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
    lengths = np.diff(data.offsets)
    lengths = np.where(lengths >= 3, lengths - 2, lengths)        # the last two are held out
    begin = np.concatenate([[0], np.cumsum(lengths)])             # (users + 1,) in rows
    position = np.arange(begin[-1]) - np.repeat(begin[:-1], lengths)
    targets = data.items[np.repeat(data.offsets[:-1], lengths) + position]
    items = np.where(position == 0, 0, np.roll(targets, 1))
    remaining = np.repeat(lengths, lengths) - position            # rows to the user's end
    begins = position == 0                                        # a window begins
    if max_len:
        begins |= remaining % max_len == 0
    windows = np.append(np.flatnonzero(begins), len(items))
    return Rows(items, targets, begins | (position == 1), windows)


def batches(rows, batch_size, rng):
    """Yield (items, targets, starts) of batch_size windows at a time, in random order."""
    order = rng.permutation(len(rows.windows) - 1)
    for k in range(0, len(order), batch_size):
        index = np.concatenate([np.arange(rows.windows[w], rows.windows[w + 1])
                                for w in order[k:k + batch_size]])
        yield rows.items[index], rows.targets[index], rows.starts[index]


def last_events(data, begins, ends, max_len):
    """A list of the arrays items[begin:end], cut to their last max_len events."""
    if max_len:
        begins = np.maximum(begins, ends - max_len)
    return [data.items[begin:end] for begin, end in zip(begins, ends)]


def histories(data, split, max_len=None):
    """(histories, truth) of all users with 3 events or more; split "validation" or "test".

    histories: a list of arrays, each user's last max_len events before the true one (at test,
    the validation event is one of them); truth (users,). Raises DataError for no such user.
    """
    held_out = ["test", "validation"].index(split) + 1            # events; ValueError for another
    users = np.flatnonzero(np.diff(data.offsets) >= 3)
    if not len(users):
        raise DataError(f"{data.name}: no user has the 3 events of a test: check the columns")
    ends = data.offsets[users + 1] - held_out
    return last_events(data, data.offsets[users], ends, max_len), data.items[ends]


def full_histories(data, max_len=None):
    """Every user's last max_len events, nothing held out: arrays, in the order of user_ids."""
    return last_events(data, data.offsets[:-1], data.offsets[1:], max_len)
