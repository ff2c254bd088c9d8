"""Recommends from this folder with PyTorch, NumPy and safetensors alone; a history's items stand oldest first, each with its
time as the logs have it (dates: microseconds since 1970). The request is now for the model: at the last time that it knows.

    python example.py DOMAIN K [TIME:DOMAIN:ITEM …]

The files may be anybody's: what they hold decides the answers, and starts nothing. This file is code, though: a service keeps a
copy of its own, and reads the folder with it.
"""

import io
import json
import math
import re
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

# What torch.export.load acts on in a file: pickles and libraries beside the tensors, functions by
# their names, names and conditions that become Python code, expressions that SymPy evaluates. So
# an encoder.pt2 has these members, and a text in them is one of these, or it is not loaded.
_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id"
    r"|models/model\.json|data/sample_inputs/model\.pt|data/weights/model_weights_config\.json"
    r"|data/constants/model_constants_config\.json|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_NAME = r"[A-Za-z_]\w*"
_PATH = r"(?:[A-Za-z]\w*(?:\.\w+)*)?"
_OPERATORS = (
    "_assert_tensor_metadata|abs|add|addmm|alias|amax|arange|bitwise_and|bitwise_not|bmm|bucketize|cat"
    "|chunk|clamp|clamp_max|clamp_min|clone|contiguous|cos|cumsum|detach|div|einsum|embedding|eq"
    "|exp|expand|flatten|full|full_like|gather|ge|gelu|gt|index|index_select|layer_norm|le|lerp"
    "|linear|logical_and|logical_not|lt|masked_fill|matmul|max|mean|min|minimum|maximum|mul|ne|neg"
    "|numpy_T|ones|ones_like|permute|pow|reciprocal|relu|reshape|rsqrt|rsub"
    "|scaled_dot_product_attention|select|sigmoid|sin|slice|softmax|split|sqrt|squeeze|stack|sub"
    "|sum|sym_size|t|tanh|to|_to_copy|transpose|tril|triu|unbind|unflatten|unsqueeze|view|where"
    "|zeros|zeros_like"
)
_EXPRESSION = (
    r"(?:Symbol\('[su]\d{1,6}'(?:, (?:positive|nonnegative|integer)=True)*\)|Integer\(-?\d{1,18}\)"
    r"|(?:Add|Mul|Min|Max|Mod|PythonMod|FloorDiv|CeilDiv)\(|[su]\d{1,6}|\d{1,18}|\*(?!\*)|[ ,()+-])+"
)
_TREE = r'(?:[\[\]{}:, \d]|null|"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))")+'
_TEXTS = {
    "name": _NAME,
    "as_name": _NAME,
    "forward_arg_names": _NAME,
    "buffer_name": _PATH,
    "parameter_name": _PATH,
    "tensor_constant_name": _PATH,
    "fqn": _PATH,
    "path_name": r"(?:weight|tensor)_\d+",
    "target": rf"torch\.ops\.aten\.(?:{_OPERATORS})\.{_NAME}|_operator\.(?:add|sub|mul|floordiv|mod)",
    "expr_str": _EXPRESSION,
    "as_string": r"[a-z]+(?:,[a-z]+)*->[a-z]*|none|tanh",  # of einsum and gelu
    "in_spec": _TREE,
    "out_spec": _TREE,
    "type": "cpu",
    "torch_version": r"[\w.+]+",
    "verifiers": "[A-Z]+",
}
_TEXTS = {key: re.compile(pattern, re.ASCII) for key, pattern in _TEXTS.items()}
_KEY = re.compile(rf"{_NAME}|{_PATH}", re.ASCII)
_LEFT_OUT = {
    "metadata": {},
    "guards_code": [],
}  # where the code lay; what PyTorch would run as Python


def load_encoder(file) -> torch.nn.Module:
    """The program in an encoder.pt2, which is plain tensors and operations on them.

    Raises ValueError for a file that holds anything else, before PyTorch sees it; OSError.
    """
    program = plain_program(file)
    try:
        return torch.export.load(program).module()
    except Exception as error:
        raise ValueError(
            f"{file}: PyTorch cannot load it ({type(error).__name__})"
        ) from None


def plain_program(file) -> io.BytesIO:
    """The same program, written anew from what `load_encoder` takes. Raises ValueError, OSError."""
    data = Path(file).read_bytes()
    try:
        members = _members(data)
        plain = io.BytesIO()
        with zipfile.ZipFile(
            plain, "w"
        ) as archive:  # so that PyTorch's reader sees what ours saw
            for name, content in members.items():
                if name.endswith(".json"):
                    content = json.dumps(_plain(json.loads(content), name)).encode()
                archive.writestr(f"encoder/{name}", content)
        for kind in ("weights", "constants"):
            _check_sizes(members, f"data/{kind}/")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}: is no encoder that can be trusted: {said}") from None
    plain.seek(0)
    return plain


def _members(data):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > len(data):
                raise ValueError("its members are larger than the file")
            members = {}
            for entry in entries:
                name = entry.filename.partition("/")[2]
                if (
                    not _MEMBER.fullmatch(name)
                    or name in members
                    or entry.compress_type
                ):
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


def _plain(value, key):
    """A value of the JSON in it under a key, without what nobody needs. Raises ValueError."""
    if isinstance(value, dict):
        for name in value:
            if not _KEY.fullmatch(name):
                raise ValueError(f"it has a key {name!r}")
        left_out = {name: empty for name, empty in _LEFT_OUT.items() if name in value}
        kept = {name: inner for name, inner in value.items() if name not in left_out}
        return {name: _plain(inner, name) for name, inner in kept.items()} | left_out
    if isinstance(value, list):
        return [_plain(inner, key) for inner in value]
    if isinstance(value, str) and not (key in _TEXTS and _TEXTS[key].fullmatch(value)):
        raise ValueError(f"{key} is {value[:200]!r}")
    if key == "use_pickle" and value is not False:
        raise ValueError("it has a pickle (use_pickle)")
    return value


def _check_sizes(members, folder):
    """Every tensor has a member with at least a byte for each of its values."""
    (config,) = (
        name
        for name in members
        if re.fullmatch(rf"{folder}model_\w+_config\.json", name)
    )
    for payload in json.loads(members[config])["config"].values():
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        if math.prod(sizes) > len(members[folder + payload["path_name"]]):
            raise ValueError(f"{payload['path_name']} is said to be larger than it is")


class Recommender:
    def __init__(self, folder):
        self.schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        self.own_weight = {
            domain["name"]: domain["own_weight"] for domain in self.schema["domains"]
        }
        places = {
            domain["name"]: folder / domain["folder"]
            for domain in self.schema["domains"]
        }
        for place in places.values():
            if place.parent != folder or not re.fullmatch(r"domain-\d+", place.name):
                raise ValueError(
                    f"{folder / 'schema.json'}: {place} is no domain's folder"
                )
        self.encoder = load_encoder(folder / "encoder.pt2")
        self.items = {name: self._vectors(place) for name, place in places.items()}
        own = {name: place for name, place in places.items() if self.own_weight[name]}
        self.own = {
            name: load_encoder(place / "encoder.pt2") for name, place in own.items()
        }
        self.ids = {
            name: self._texts(load_file(place / "ids.safetensors"))
            for name, place in places.items()
        }
        self.rows = {
            name: {text: row for row, text in enumerate(ids)}
            for name, ids in self.ids.items()
        }

    def _vectors(self, place):
        return np.load(place / "items.npy", mmap_mode="r", allow_pickle=False)

    def _texts(self, stored):
        text, ends = stored["bytes"].tobytes(), stored["offsets"].tolist()
        return [text[begin:end].decode() for begin, end in pairwise(ends)]

    def user(self, known, domain, now):
        """What a domain's items are scored with for a history of (time, domain, row), oldest first: (r,)."""
        vector, weight = (
            self._encoded(self.encoder, known, now),
            self.own_weight[domain],
        )
        if weight:
            alone = self._encoded(
                self.own[domain], [event for event in known if event[1] == domain], now
            )
            vector = (1 - weight) * vector + weight * alone
        return vector

    def _encoded(self, encoder, known, now):
        recent = known[-self.schema["max_length"] :]
        vectors = np.zeros((1, max(1, len(recent)), self.schema["width"]), np.float32)
        times = torch.zeros(vectors.shape[:2], dtype=torch.float64)
        for place, (time, domain, row) in enumerate(recent):
            vectors[0, place], times[0, place] = self.items[domain][row], time
        return encoder(
            torch.from_numpy(vectors),
            torch.tensor([len(recent)]),
            times,
            torch.tensor([now]).double(),
        )[0]

    def __call__(self, history, domain, k, now=None):
        """The k best items of a domain that are not in the history of (time, domain, item), as (id, score); fewer where there
        are fewer. Items and domains of the history that the model does not know are left out of it; one without any is a new
        user's. now: for when is asked; the last time that the model knows, unless said."""
        now = self.schema["last_time"] if now is None else now
        known = [
            (time, name, self.rows[name][item])
            for time, name, item in history
            if item in self.rows.get(name, {})
        ]
        scores = torch.from_numpy(
            np.asarray(self.items[domain], np.float32)
        ) @ self.user(known, domain, now)
        scores[[row for _, name, row in known if name == domain]] = -torch.inf
        best = scores.topk(min(k, len(scores)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            (self.ids[domain][row], score) for row, score in found if score > -torch.inf
        ]


if __name__ == "__main__":
    wanted, count, *events = sys.argv[1:]
    recommender = Recommender(Path(__file__).parent)
    if wanted not in recommender.items:
        sys.exit(
            f"there is no domain {wanted!r}: it is one of {', '.join(recommender.items)}"
        )
    history = [
        (float(time), name, item)
        for time, name, item in (event.split(":", 2) for event in events)
    ]
    for item, score in recommender(history, wanted, int(count)):
        print(f"{item}\t{score:.6f}")
