"""Configurations read and written: YAML files, `key=value`, and what a run has recorded."""

import io
import re
from dataclasses import asdict, fields, is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.deepspeed_json import asks_for_bf16, read_deepspeed_json
from trainer.config.run import RunConfig
from trainer.errors import InputError
from trainer.files.redact import recorded, words

_INTERPOLATION = re.compile(
    r"(?<!\\)(?:\\\\)*\$\{"
)  # OmegaConf's; a backslash before it escapes
_LARGEST_RECORD = 2**16  # bytes of a run's config.yaml; one has about 4,000
_DEEPEST_RECORD = 32  # sections in sections; PyYAML takes minutes for thousands


def load_config(files, overrides, deepspeed_file=None) -> RunConfig:
    """YAML files, each over the ones before it, and `key=value` over them all. Raises InputError naming key or file.

    deepspeed_file: DeepSpeed's JSON, as if it stood under `deepspeed:`.
    """
    more = []
    if deepspeed_file is not None:
        more.append(
            (
                deepspeed_file,
                OmegaConf.create({"deepspeed": read_deepspeed_json(deepspeed_file)}),
            )
        )
    return _with_bf16(load(RunConfig, files, overrides, more))


def _with_bf16(config):
    if asks_for_bf16(config.deepspeed):
        config = replace(config, model=replace(config.model, precision="bf16"))
    return config


def load_recorded(file) -> RunConfig:
    """What a run has left of its configuration. Raises InputError naming the file, and the key.

    The run may be anybody's. So nothing in it is resolved (`${…}` would read the environment), and
    there are no tags, no aliases and no more bytes than a configuration has.
    """
    file = Path(file)
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST_RECORD + 1)
        if len(data) > _LARGEST_RECORD:
            raise InputError(
                f"{file}: has more than {_LARGEST_RECORD} bytes: no run has written it"
            )
        text = data.decode("utf-8")
        _look_at_record(file, text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file}: is no YAML ({words(error)})") from None
    try:
        given = _with_sections(
            file, lambda: OmegaConf.load(io.StringIO(text)), RunConfig
        )
        return _with_bf16(load(RunConfig, [], [], [(file, given)]))
    except InputError as error:
        said = str(error) if str(error).startswith(str(file)) else f"{file}: {error}"
        printable = (letter if letter.isprintable() else " " for letter in said[:1000])
        raise InputError("".join(printable)) from None


def _look_at_record(file, text):
    """Raises InputError for what a run does not write and YAML or OmegaConf would act on."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_RECORD:
            raise InputError(
                f"{file}: is deeper than {_DEEPEST_RECORD} sections: no run has written it"
            )
        if (
            isinstance(event, yaml.AliasEvent)
            or getattr(event, "anchor", None) is not None
        ):
            line = event.start_mark.line + 1
            raise InputError(
                f"{file}: line {line} has an anchor or alias: a run writes none"
            )

    def visit(node, key):
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise InputError(
                f"{file}: {key} has the tag {words(node.tag)}: a run writes none"
            )
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                visit(name, f"the key {words(name.value)}")
                visit(value, f"{key}.{words(name.value)}" if key else words(name.value))
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                visit(value, f"{key}[{number}]")
        elif _INTERPOLATION.search(node.value):
            raise InputError(
                f"{file}: {key} has ${{…}} in it, which a run does not write and which is not resolved "
                "here: put its value there, or escape it (\\${…})"
            )

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        visit(root, "")


def load(kind, files, overrides, more=()):
    """A configuration of any dataclass, as `load_config` has it. more: (name, what OmegaConf made) over the rest."""
    merged = OmegaConf.structured(kind)
    sources = [(file, _read(file, kind)) for file in files]
    sources += [(override, _parse(override, kind)) for override in overrides] + list(
        more
    )
    for source, given in sources:
        try:
            merged = OmegaConf.merge(merged, given)
        except OmegaConfBaseException as error:
            where = (
                f"{source}: {error.full_key}"
                if error.full_key and source not in overrides
                else source
            )
            raise InputError(
                f"{where}: {str(error).splitlines()[0]}{_allowed(error)}"
            ) from None
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise InputError(str(error)) from None


def flat(config: RunConfig) -> dict:
    """Every setting by its dotted key, as JSON has it."""
    found = {}

    def walk(value, key):
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            found[key] = value

    walk(asdict(_without_secrets(config)), "")
    return found


def to_yaml(config: RunConfig) -> str:
    """The whole effective configuration, as `load_config` reads it; without what is secret in the dataset's address."""
    return OmegaConf.to_yaml(
        OmegaConf.create(_escaped(asdict(_without_secrets(config))))
    )


def _without_secrets(config):
    return replace(config, data=recorded(config.data))


def _escaped(value):
    """The same, written so that OmegaConf takes `${` in a text for what it is."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _parse(override, kind):
    key, found, value = override.partition("=")
    if not found or not key:
        raise InputError(
            f"{override}: options are given as key=value, e.g. global_batch_size=256"
        )
    for name in key.split("."):
        kind = (
            {field.name: field.type for field in fields(kind)}.get(name)
            if is_dataclass(kind)
            else None
        )
    if (
        kind is str or get_origin(kind) is Literal
    ):  # text as it stands: YAML would make a number of 1e3, a boolean of off
        return OmegaConf.create(
            reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)
        )
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise InputError(
            f"{override}: its value is no YAML ({' '.join(str(error).split())})"
        ) from None


def _read(file, kind):
    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such configuration file")
    return _with_sections(file, lambda: OmegaConf.load(file), kind)


def _with_sections(file, read, kind):
    """What `read` gives, with a section for a section."""
    try:
        loaded = read()
    except Exception as error:  # a YAML error of any kind: say where, and no trace
        raise InputError(
            f"{file}: is no YAML ({' '.join(str(error).split())})"
        ) from None
    if not OmegaConf.is_dict(loaded):
        raise InputError(f"{file}: is a list; a configuration is made of key: value")
    given = OmegaConf.to_container(loaded)
    for section in fields(kind):
        if is_dataclass(section.type) and not isinstance(
            given.get(section.name, {}), dict
        ):
            raise InputError(
                f"{file}: {section.name} is {given[section.name]}; it is a section with keys of its own"
            )
    return OmegaConf.create(_on_off(given, kind))


def _on_off(given, kind):
    """YAML reads a bare on or off as a boolean; where the words are meant, they are put back."""
    if is_dataclass(kind) and isinstance(given, dict):
        kinds = {field.name: field.type for field in fields(kind)}
        return {key: _on_off(value, kinds.get(key)) for key, value in given.items()}
    if isinstance(given, bool) and {"on", "off"} <= set(get_args(kind)):
        return "on" if given else "off"
    return given


def _allowed(error):
    """The keys that exist where one was given that does not."""
    node = error.parent_node if hasattr(error, "parent_node") else None
    keys = (
        list(node.keys())
        if node is not None and hasattr(node, "keys") and "not in" in str(error)
        else None
    )
    return f" (there are: {', '.join(map(str, keys))})" if keys else ""
