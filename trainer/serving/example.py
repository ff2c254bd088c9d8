"""Recommends from this folder with PyTorch, NumPy and safetensors alone.

    python example.py DOMAIN K [TIME:DOMAIN:ITEM …] [--now TIME]
    python example.py books 10 2025-11-26T08:33:20Z:books:B000FA5SXY 1764147000:video:B00005JKZ2
    python example.py --help                               the model's domains, and its time span

prints the K best items of a domain for a history. A time is a date (ISO 8601, UTC where it names no
zone), or a number in the unit of the logs that the model learned from (where these had dates:
microseconds since 1970). The request counts as made at the last time that the model knows.

The files may come from anybody: what they hold decides the answers, and starts nothing. This file
is code, though: a service keeps a copy of its own, and reads the folder with it.
"""

import argparse
import io
import json
import math
import re
import sys
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.numpy import load_file

# torch.export.load acts on what it finds in a file: it unpickles, loads libraries, calls functions
# by their names, makes Python code of names and conditions, and lets SymPy evaluate expressions.
# So an encoder.pt2 is loaded only if its members have these names, and its texts these forms.
_MEMBERS = (
    r"archive_format",
    r"archive_version",
    r"byteorder",
    r"\.data/version",
    r"\.data/serialization_id",
    r"models/model\.json",
    r"data/sample_inputs/model\.pt",
    r"data/weights/model_weights_config\.json",
    r"data/constants/model_constants_config\.json",
    r"data/weights/weight_\d+",
    r"data/constants/tensor_\d+",
)
_MEMBER = re.compile("|".join(_MEMBERS))
_NAME = r"[A-Za-z_]\w*"
_PATH = r"(?:[A-Za-z]\w*(?:\.\w+)*)?"
_OPERATORS = (
    "_assert_tensor_metadata|abs|add|addmm|alias|amax|arange|bitwise_and|bitwise_not|bmm"
    "|bucketize|cat|chunk|clamp|clamp_max|clamp_min|clone|contiguous|cos|cumsum|detach"
    "|div|einsum|embedding|eq|exp|expand|flatten|full|full_like|gather|ge|gelu|gt|index"
    "|index_select|layer_norm|le|lerp|linear|logical_and|logical_not|lt|masked_fill"
    "|matmul|max|mean|min|minimum|maximum|mul|ne|neg|numpy_T|ones|ones_like|permute|pow"
    "|reciprocal|relu|reshape|rsqrt|rsub|scaled_dot_product_attention|select|sigmoid|sin"
    "|slice|softmax|split|sqrt|squeeze|stack|sub|sum|sym_size|t|tanh|to|_to_copy"
    "|transpose|tril|triu|unbind|unflatten|unsqueeze|view|where|zeros|zeros_like"
)
_PYTHON_OPERATORS = "add|sub|mul|floordiv|mod"
_EXPRESSION = (
    r"(?:Symbol\('[su]\d{1,6}'(?:, (?:positive|nonnegative|integer)=True)*\)"
    r"|Integer\(-?\d{1,18}\)"
    r"|(?:Add|Mul|Min|Max|Mod|PythonMod|FloorDiv|CeilDiv)\("
    r"|[su]\d{1,6}|\d{1,18}|\*(?!\*)|[ ,()+-])+"
)
_TREE = (
    r"(?:[\[\]{}:, \d]|null"
    r'|"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))")+'
)
_TEXT_FORMS = {
    "name": _NAME,
    "as_name": _NAME,
    "forward_arg_names": _NAME,
    "buffer_name": _PATH,
    "parameter_name": _PATH,
    "tensor_constant_name": _PATH,
    "fqn": _PATH,
    "path_name": r"(?:weight|tensor)_\d+",
    "target": rf"torch\.ops\.aten\.(?:{_OPERATORS})\.{_NAME}"
    rf"|_operator\.(?:{_PYTHON_OPERATORS})",
    "expr_str": _EXPRESSION,
    "as_string": r"[a-z]+(?:,[a-z]+)*->[a-z]*|none|tanh",  # of einsum and gelu
    "in_spec": _TREE,
    "out_spec": _TREE,
    "type": "cpu",
    "torch_version": r"[\w.+]+",
    "verifiers": "[A-Z]+",
}
_TEXTS = {key: re.compile(form, re.ASCII) for key, form in _TEXT_FORMS.items()}
_KEY = re.compile(rf"{_NAME}|{_PATH}", re.ASCII)
# Left empty: where the program's code lay, and conditions that PyTorch would run as Python.
_LEFT_OUT: dict[str, Any] = {"metadata": {}, "guards_code": []}


_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # of a second
_UNIT_NAMES = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_UNKNOWN = "unknown"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Seconds since 1970 that are a time of somebody's log: of 1985 to 2100.
_EARLIEST = 473e6
_LATEST = 4102e6
_DATE = (
    r"\d{4}-\d\d-\d\d"
    r"(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
)
_EVENT_FORM = (
    "TIME:DOMAIN:ITEM, e.g. 2025-11-26T08:33:20Z:books:B000FA5SXY or "
    "1764146000:books:B000FA5SXY"
)

# One interaction of a history: its time, its domain and its item's row in that domain.
Event = tuple[float, str, int]


def load_encoder(file: Path) -> torch.nn.Module:
    """Loads the program in an encoder.pt2: plain tensors and operations on them.

    Raises ValueError for a file that holds anything else, before PyTorch sees it, and OSError.
    """
    program = plain_program(file)
    try:
        return torch.export.load(program).module()
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"{file}: PyTorch cannot load it ({kind})") from None


def plain_program(file: Path) -> io.BytesIO:
    """Writes the program anew from what `load_encoder` takes. Raises ValueError, OSError."""
    data = Path(file).read_bytes()
    try:
        members = _read_members(data)
        program = _write_members(members)
        for kind in ("weights", "constants"):
            _check_sizes(members, f"data/{kind}/")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"has no {error}"
        raise ValueError(
            f"{file}: is no encoder that can be trusted: {reason}"
        ) from None
    return program


def _read_members(data: bytes) -> dict[str, bytes]:
    """The archive's members by name. Raises ValueError for one that an encoder does not have."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > len(data):
                raise ValueError("its members are larger than the file")
            members: dict[str, bytes] = {}
            for entry in entries:
                name = entry.filename.partition("/")[2]
                known = _MEMBER.fullmatch(name) and name not in members
                if not known or entry.compress_type:
                    raise ValueError(f"it has a member {entry.filename!r}")
                members[name] = archive.read(entry)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise ValueError(f"it is no whole archive ({error})") from None
    if members["data/sample_inputs/model.pt"]:
        raise ValueError("it has sample inputs, which are a pickle")
    return members


def _write_members(members: dict[str, bytes]) -> io.BytesIO:
    """A new archive, so that PyTorch's reader sees what this one saw."""
    program = io.BytesIO()
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in members.items():
            if name.endswith(".json"):
                content = json.dumps(_plain(json.loads(content), name)).encode()
            archive.writestr(f"encoder/{name}", content)
    program.seek(0)
    return program


def _plain(
    value: Any,
    key: str,
) -> Any:
    """A JSON value that stands under a key, without what inference does not need.

    Raises ValueError for a text that PyTorch might act on.
    """
    if isinstance(value, dict):
        return _plain_object(value)
    if isinstance(value, list):
        return [_plain(inner, key) for inner in value]
    if isinstance(value, str):
        form = _TEXTS.get(key)
        if form is None or not form.fullmatch(value):
            raise ValueError(f"{key} is {value[:200]!r}")
    if key == "use_pickle" and value is not False:
        raise ValueError("it has a pickle (use_pickle)")
    return value


def _plain_object(value: dict[str, Any]) -> dict[str, Any]:
    """`_plain` of a JSON object's values, by their keys."""
    for name in value:
        if not _KEY.fullmatch(name):
            raise ValueError(f"it has a key {name!r}")
    plain = {}
    for name, inner in value.items():
        if name in _LEFT_OUT:
            plain[name] = _LEFT_OUT[name]
        else:
            plain[name] = _plain(inner, name)
    return plain


def _check_sizes(
    members: dict[str, bytes],
    folder: str,
) -> None:
    """Raises ValueError unless each tensor's member has at least a byte for each value."""
    pattern = re.compile(rf"{folder}model_\w+_config\.json")
    (config,) = [name for name in members if pattern.fullmatch(name)]
    for payload in json.loads(members[config])["config"].values():
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        name = payload["path_name"]
        if math.prod(sizes) > len(members[folder + name]):
            raise ValueError(f"{name} is said to be larger than it is")


class Domain:
    """One domain: its item vectors, their ids, and its own encoder where it has one.

    weight: the share that the domain's own encoder has in a user's vector; 0: it has none.
    offsets: what the recent past adds to each item's score, (items,), and score_weight: what the
    vectors' product is multiplied by; None and 1 of an export without it.
    """

    def __init__(
        self,
        folder: Path,
        entry: dict[str, Any],
    ) -> None:
        weight = entry["own_weight"]
        stored = load_file(folder / "ids.safetensors")
        text = stored["bytes"].tobytes()
        offsets = stored["offsets"].tolist()
        # Mapped: only the pages that are used are read from the disk. "c", not "r": PyTorch warns
        # of an array that cannot be written to, and nobody writes.
        self.items = np.load(
            folder / "items.npy",
            mmap_mode="c",
            allow_pickle=False,
        )
        self.ids = [
            text[begin:end].decode() for begin, end in pairwise(offsets)
        ]
        self.rows = {item: row for row, item in enumerate(self.ids)}
        self.weight = weight
        self.encoder = None
        if weight:
            self.encoder = load_encoder(folder / "encoder.pt2")
        self.score_weight = 1.0
        self.offsets = None
        if "recency" in entry:
            self.score_weight = float(entry["recency"]["score"])
            self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            if self.offsets.shape != (len(self.items),):
                raise ValueError(
                    f"{folder / 'offsets.npy'}: is not of {len(self.items)} items"
                )


class Recommender:
    """Recommends items of each domain; holds the encoders and all item vectors.

    domains: by name. encoder: of histories of all domains. schema: the content of schema.json.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder holds what cannot be trusted, and OSError."""
        text = (folder / "schema.json").read_text(encoding="utf-8")
        self.schema = json.loads(text)
        for entry in self.schema["domains"]:
            path = folder / entry["folder"]
            if path.parent != folder or not re.fullmatch(
                r"domain-\d+", path.name
            ):
                raise ValueError(
                    f"{folder / 'schema.json'}: {path} is no domain's folder"
                )
        self.encoder = load_encoder(folder / "encoder.pt2")
        self.domains: dict[str, Domain] = {}
        for entry in self.schema["domains"]:
            path = folder / entry["folder"]
            self.domains[entry["name"]] = Domain(path, entry)

    def __call__(
        self,
        history: list[tuple[float, str, str]],
        domain: str,
        k: int,
        now: float | None = None,
    ) -> list[tuple[str, float]]:
        """The k best items of a domain as (id, score), best first.

        history: (time, domain, item id) of each interaction, oldest first. Domains and items that
        the model does not know are left out of it. A history without any known item is a new
        user's. A time of another unit raises ValueError. Items of the history are not recommended, so that fewer than k may be left. now:
        the time of the request; None: the last time that the model knows.

            history = [(1764146000, "books", "B000FA5SXY"), (1764147000, "video", "B00005JKZ2")]
            recommender(history, "books", 2)  # [("B000FC1PJI", 3.2), ("B000FA64PK", 2.9)]
        """
        if now is None:
            now = self.schema["last_time"]
        events = self._known_events(history)
        items = torch.from_numpy(
            np.asarray(self.domains[domain].items, np.float32)
        )
        vector = self.encode_user(events, domain, now)
        scores = items @ vector[: items.shape[1]]
        offsets = self.domains[domain].offsets
        if offsets is not None:
            scores = scores + torch.from_numpy(offsets)
        seen = [row for _, name, row in events if name == domain]
        scores[seen] = -torch.inf
        best = scores.topk(min(k, len(scores)))
        recommended = []
        for row, score in zip(
            best.indices.tolist(), best.values.tolist(), strict=True
        ):
            if score > -torch.inf:
                recommended.append((self.domains[domain].ids[row], score))
        return recommended

    def encode_user(
        self,
        events: list[Event],
        domain: str,
        now: float,
    ) -> torch.Tensor:
        """The user's vector for a domain, (width,); (width + 1,) where items have offsets.

        An item's score is its dot product with the item's vector, behind which its offset stands:
        the user's last number is 1. events: the known interactions, oldest first.
        """
        vector = self._encode(self.encoder, events, now)
        weight = self.domains[domain].weight
        domain_encoder = self.domains[domain].encoder
        if domain_encoder is not None:
            own_events = [event for event in events if event[1] == domain]
            domain_vector = self._encode(domain_encoder, own_events, now)
            vector = (1 - weight) * vector + weight * domain_vector
        if self.domains[domain].offsets is not None:
            vector = vector * self.domains[domain].score_weight
            vector = torch.cat([vector, torch.ones(1)])
        return vector

    def _known_events(
        self, history: list[tuple[float, str, str]]
    ) -> list[Event]:
        """The interactions with items that the model knows, by their rows.

        Raises ValueError for a time of another unit.
        """
        events = []
        for time, name, item in history:
            check_time(time, self.schema)
            if name in self.domains and item in self.domains[name].rows:
                events.append((time, name, self.domains[name].rows[item]))
        return events

    def _encode(
        self,
        encoder: torch.nn.Module,
        events: list[Event],
        now: float,
    ) -> torch.Tensor:
        """The encoder's output for the newest events; a batch of one user."""
        recent = events[-self.schema["max_length"] :]
        width = self.schema["width"]
        # A history without items has one place, which its length of 0 leaves out.
        vectors = np.zeros((1, max(1, len(recent)), width), np.float32)
        times = torch.zeros(vectors.shape[:2], dtype=torch.float64)
        for position, (time, name, row) in enumerate(recent):
            vectors[0, position] = self.domains[name].items[row]
            times[0, position] = time
        output = encoder(
            torch.from_numpy(vectors),
            torch.tensor([len(recent)]),
            times,
            torch.tensor([now]).double(),
        )
        return output[0]


def read_event(
    text: str, schema: dict[str, Any], domains: Sequence[str] = ()
) -> tuple[float, str, str]:
    """(time, domain, item) of TIME:DOMAIN:ITEM. Raises ValueError that says what is wrong.

    domains: names that may have colons in them. Dates and ids may have them too.
    """
    longest_first = sorted(map(re.escape, domains), key=len, reverse=True)
    names = "|".join([*longest_first, "[^:]*"])
    match = re.fullmatch(rf"({_DATE}|[^:]*):({names}):(.*)", text, re.DOTALL)
    if match is None:
        raise ValueError(f"{text!r} is not {_EVENT_FORM}")
    time, domain, item = match.groups()
    return read_time(time, schema), domain, item


def read_time(text: str, schema: dict[str, Any]) -> float:
    """A time as the model's logs have it, of a number or a date.

    Raises ValueError for a text that is neither, for a date where the logs' unit is not known, and
    for a number that looks like another unit.
    """
    if re.fullmatch(_DATE, text):
        return _read_date(text, schema)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{text!r} is no time: give a date such as 2025-11-26T08:33:20Z, or a number; "
            f"the model's times are {describe_times(schema)}"
        )
    check_time(number, schema)
    return number


def _read_date(text: str, schema: dict[str, Any]) -> float:
    unit = time_unit(schema)
    if unit == _UNKNOWN:
        raise ValueError(
            f"{text!r} is a date: the model's times are {describe_times(schema)}"
        )
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no date ({error})") from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return date.timestamp() * _UNITS[unit]


def check_time(number: float, schema: dict[str, Any]) -> None:
    """Raises ValueError for a number that looks like another unit than that of the model's times."""
    unit = time_unit(schema)
    looks_like = guess_unit(number)
    if _UNKNOWN not in (unit, looks_like) and unit != looks_like:
        raise ValueError(
            f"{number:.0f} looks like a time in {looks_like}, the model's are in {unit}: "
            f"{describe_times(schema)}"
        )


def time_unit(schema: dict[str, Any]) -> str:
    """The unit of the model's times: s, ms, us, ns or unknown; a schema may leave it to be guessed."""
    return schema.get("time_unit") or guess_unit(schema["last_time"])


def guess_unit(time: float) -> str:
    """The unit in which a number is a time between 1985 and 2100, or unknown."""
    for unit, second in _UNITS.items():
        if _EARLIEST <= time / second <= _LATEST:
            return unit
    return _UNKNOWN


def describe_times(schema: dict[str, Any]) -> str:
    """The model's times for a person: their unit, the first and the last."""
    first = schema["first_time"]
    last = schema["last_time"]
    unit = time_unit(schema)
    if unit == _UNKNOWN:
        return f"numbers of no known unit, from {first:.15g} to {last:.15g}"
    times = []
    for time in (first, last):
        date = _EPOCH + timedelta(seconds=time / _UNITS[unit])
        times.append(f"{date:%Y-%m-%dT%H:%M:%SZ} ({time:.0f})")
    return f"{_UNIT_NAMES[unit]} since 1970, from {times[0]} to {times[1]}"


def main(arguments: list[str]) -> None:
    """Prints the k best items of a domain for a history; on stderr, what was left out of it.

    Leaves with one line and status 2 where something given cannot be used.
    """
    folder = Path(__file__).parent
    try:
        schema = json.loads((folder / "schema.json").read_text("utf-8"))
        domains = [entry["name"] for entry in schema["domains"]]
        options = _parser(schema, domains).parse_args(arguments)
        if options.domain not in domains:
            known = ", ".join(domains)
            raise ValueError(
                f"there is no domain {options.domain!r}: it is one of {known}"
            )
        if options.k < 1:
            raise ValueError(f"K is {options.k}: give at least 1")
        history = []
        for text in options.events:
            history.append(read_event(text, schema, domains))
        now = None
        if options.now is not None:
            now = read_time(options.now, schema)
        recommender = Recommender(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, (KeyError, TypeError)):
            reason = f"{folder / 'schema.json'}: is no schema of an export ({reason})"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    history.sort(key=lambda event: event[0])
    _note_what_is_left_out(recommender, history)
    for item, score in recommender(history, options.domain, options.k, now):
        print(f"{item}\t{score:.6f}")


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for a command line that it does not take."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def _parser(
    schema: dict[str, Any], domains: list[str]
) -> argparse.ArgumentParser:
    parser = _Parser(
        description="Recommends the K best items of a domain for a user's history.",
        epilog=f"Domains: {', '.join(domains)}. The model's times are {describe_times(schema)}.",
    )
    parser.add_argument(
        "domain", metavar="DOMAIN", help="whose items are wanted"
    )
    parser.add_argument("k", metavar="K", type=int, help="how many of them")
    parser.add_argument(
        "events",
        metavar="TIME:DOMAIN:ITEM",
        nargs="*",
        help=f"the history: {_EVENT_FORM}",
    )
    parser.add_argument(
        "--now",
        metavar="TIME",
        help="when the request is made; without it: the last time that the model knows",
    )
    return parser


def _note_what_is_left_out(
    recommender: Recommender,
    history: list[tuple[float, str, str]],
) -> None:
    """Says on stderr which events the model cannot use as they are."""
    for time, name, item in history:
        note = None
        if name not in recommender.domains:
            note = f"there is no domain {name!r}, its event is left out"
        elif item not in recommender.domains[name].rows:
            note = f"there is no item {item!r} in {name}, its event is left out"
        elif time < recommender.schema["first_time"]:
            note = f"{time:.0f} is before the model's times, and counts as their first"
        if note is not None:
            print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
