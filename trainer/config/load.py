"""Configurations read and written: presets, YAML files, `key=value`, and what a run has recorded."""

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.optimizer import asks_for_bf16, read_deepspeed_json
from trainer.config.run import RunConfig
from trainer.errors import InputError
from trainer.files.redact import printable_text, redact_for_record

Config = TypeVar("Config")

_PRESETS = Path(__file__).resolve().parents[2] / "launch" / "configs"
# OmegaConf's; a backslash before it escapes.
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_YAML_TAG = "tag:yaml.org,2002:"
_LARGEST_RECORD = 2**16  # bytes of a run's config.yaml; one has about 4,000
_DEEPEST_RECORD = 32  # sections in sections; PyYAML takes minutes for thousands
_LONGEST_MESSAGE = 1000  # letters
_LONGEST_QUOTE = 400  # letters, of a value or of another program's words


def load_config(
    files: Iterable[str | Path],
    overrides: Iterable[str],
    deepspeed_file: str | Path | None = None,
    more: Iterable[tuple[str, DictConfig]] = (),
) -> RunConfig:
    """Loads YAML files, each over the ones before it, and `key=value` over them all.

    files: paths, or names of presets (`default`, `amazon4`). deepspeed_file: DeepSpeed's JSON, as if it stood under `deepspeed:`. more: as for `load_settings`. Raises InputError that names the
    key or the file.
    """
    more = list(more)
    if deepspeed_file is not None:
        section = {"deepspeed": read_deepspeed_json(deepspeed_file)}
        more.append((str(deepspeed_file), OmegaConf.create(section)))
    config = _with_bf16(load_settings(RunConfig, files, overrides, more))
    negatives = config.negatives
    # Not among the checks of NegativesConfig: records of older runs have both.
    if negatives.per_target > 1 and negatives.shared:
        raise InputError(
            f"negatives.per_target is {negatives.per_target}, and negatives.shared is "
            f"{negatives.shared}, which takes its place: set negatives.shared=0"
        )
    return config


def preset_names() -> list[str]:
    """The names of the configurations that come with the package, sorted."""
    return sorted(file.stem for file in _PRESETS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file of a configuration: a preset's by its name, from any folder, or the path.

    A preset's name wins; a file of the same name is `./default`. Raises InputError that lists the
    presets where there is neither.
    """
    if str(name) in preset_names():
        return _PRESETS / f"{name}.yaml"
    file = Path(name)
    if not file.is_file():
        names = ", ".join(preset_names())
        raise InputError(
            f"{name}: there is no such configuration file (presets, by their names: {names})"
        )
    return file


def _with_bf16(config: RunConfig) -> RunConfig:
    if not asks_for_bf16(config.deepspeed):
        return config
    return replace(config, model=replace(config.model, precision="bf16"))


def load_settings(
    kind: type[Config],
    files: Iterable[str | Path],
    overrides: Iterable[str],
    more: Iterable[tuple[str, DictConfig]] = (),
) -> Config:
    """Loads a configuration of any dataclass, as `load_config` does.

    more: (name for messages, values) over the rest.
    """
    overrides = list(overrides)
    sources: list[tuple[str | Path, DictConfig]] = []
    for file in files:
        sources.append((file, _read(file, kind)))
    for override in overrides:
        sources.append((override, _parse(override, kind)))
    sources += more
    values = [inner for _, inner in sources]
    try:
        # All at once takes a third of the time that one after another takes.
        merged = OmegaConf.unsafe_merge(OmegaConf.structured(kind), *values)
    except (TypeError, OmegaConfBaseException):
        merged = _merge_by_source(kind, sources, overrides)
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        reason = _first_line(error)
        raise InputError(f"{error.full_key}: {reason}") from None
    except ValueError as error:
        raise InputError(_shorten(error)) from None


def _merge_by_source(
    kind: type,
    sources: list[tuple[str | Path, DictConfig]],
    overrides: list[str],
) -> DictConfig:
    """Merges one source after another, to name the one that does not fit."""
    merged = OmegaConf.structured(kind)
    for source, values in sources:
        try:
            merged = OmegaConf.merge(merged, values)
        except TypeError:  # OmegaConf's word where a section gets a list
            raise InputError(
                f"{_shorten(source)}: a section of keys and values was expected"
            ) from None
        except OmegaConfBaseException as error:
            start = _shorten(source)
            if error.full_key and source not in overrides:
                start = f"{source}: {error.full_key}"
            reason = _first_line(error)
            keys = _allowed_keys(error, kind)
            raise InputError(f"{start}: {reason}{keys}") from None
    return cast(DictConfig, merged)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return _shorten(lines[0])


def _one_line(error: Exception) -> str:
    words = str(error).split()
    return _shorten(" ".join(words))


def _shorten(text: object) -> str:
    """A text for a message, without what is in the middle of a very long one."""
    letters = str(text)
    if len(letters) <= _LONGEST_QUOTE:
        return letters
    half = _LONGEST_QUOTE // 2
    return f"{letters[:half]} … {letters[-half:]}"


def load_recorded(file: str | Path) -> RunConfig:
    """Loads the config.yaml that a run has left.

    Raises InputError that names the file, and the key. The run may be anybody's. So nothing in it is resolved (`${…}` would read the environment), and
    there are no tags, no aliases and no more bytes than a configuration has.
    """
    file = Path(file)
    try:
        text = _read_record(file)
        _check_record(file, text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{file}: is no YAML ({printable_text(error)})"
        ) from None
    try:
        values = _with_sections(
            file, lambda: OmegaConf.load(io.StringIO(text)), RunConfig
        )
        return _with_bf16(
            load_settings(RunConfig, [], [], [(str(file), values)])
        )
    except InputError as error:
        message = str(error)
        if not message.startswith(str(file)):
            message = f"{file}: {message}"
        raise InputError(_printable(message[:_LONGEST_MESSAGE])) from None


def _read_record(file: Path) -> str:
    with open(file, "rb") as stream:
        data = stream.read(_LARGEST_RECORD + 1)
    if len(data) > _LARGEST_RECORD:
        raise InputError(
            f"{file}: has more than {_LARGEST_RECORD} bytes: no run has written it"
        )
    return data.decode("utf-8")


def _check_record(file: Path, text: str) -> None:
    """Raises InputError for what no run writes and YAML or OmegaConf would act on."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_RECORD:
            raise InputError(
                f"{file}: is deeper than {_DEEPEST_RECORD} sections: no run has written it"
            )
        has_anchor = getattr(event, "anchor", None) is not None
        if has_anchor or isinstance(event, yaml.AliasEvent):
            line = cast(yaml.Mark, event.start_mark).line + 1
            raise InputError(
                f"{file}: line {line} has an anchor or alias: a run writes none"
            )
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        _check_node(file, root, "")


def _check_node(file: Path, node: yaml.Node, key: str) -> None:
    """Raises InputError for a tag or an interpolation in a node or below it."""
    if not node.tag.startswith(_YAML_TAG) or "python" in node.tag:
        raise InputError(
            f"{file}: {key} has the tag {printable_text(node.tag)}: a run writes none"
        )
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            label = printable_text(name.value)
            _check_node(file, name, f"the key {label}")
            _check_node(file, value, _join(key, label))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _check_node(file, value, f"{key}[{number}]")
    elif _INTERPOLATION.search(node.value):
        raise InputError(
            f"{file}: {key} has ${{…}} in it, which a run does not write and which is not "
            "resolved here: put its value there, or escape it (\\${…})"
        )


def _join(key: str, name: str) -> str:
    """A dotted key, one level deeper."""
    if key:
        return f"{key}.{name}"
    return name


def _printable(text: str) -> str:
    letters = []
    for letter in text:
        letters.append(letter if letter.isprintable() else " ")
    return "".join(letters)


def flatten_config(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON has it, without secrets.

    {"data": "data/shop", …, "model.dim": 128, …, "deepspeed.zero_optimization.stage": 2}
    """
    values: dict[str, Any] = {}
    sections = asdict(_without_secrets(config))
    _flatten(sections, "", values)
    return values


def _flatten(
    section: dict[str, Any], start: str, values: dict[str, Any]
) -> None:
    for name, value in section.items():
        key = _join(start, str(name))
        if isinstance(value, dict):
            _flatten(value, key, values)
        else:
            values[key] = value


def to_yaml(config: RunConfig) -> str:
    """The effective configuration as YAML that `load_config` reads, without secrets."""
    sections = asdict(_without_secrets(config))
    values = OmegaConf.create(_escape(sections))
    return OmegaConf.to_yaml(values)


def _without_secrets(config: RunConfig) -> RunConfig:
    return replace(config, data=redact_for_record(config.data))


def _escape(value: Any) -> Any:
    """A value whose texts OmegaConf takes letter by letter, `${` too."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _parse(override: str, kind: type) -> DictConfig:
    """The values of a `key=value`.

    `model.dim=64` gives {"model": {"dim": 64}}.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(
            f"{_shorten(override)}: options are given as key=value, e.g. global_batch_size=256"
        )
    names = key.split(".")
    if _is_text(_type_of(names, kind)):
        # Letter by letter: YAML would make a number of 1e3, a boolean of off.
        values: Any = value
        for name in reversed(names):
            values = {name: values}
        return OmegaConf.create(values)
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        reason = _one_line(error)
        raise InputError(
            f"{_shorten(override)}: its value is no YAML ({reason})"
        ) from None


def _type_of(names: list[str], kind: Any) -> Any:
    """The type of the setting that names lead to, from a dataclass; None where there is none."""
    for name in names:
        if not is_dataclass(kind):
            return None
        types = {field.name: field.type for field in fields(kind)}
        kind = types.get(name)
    return kind


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def _read(file: str | Path, kind: type) -> DictConfig:
    path = find_config(file)
    return _with_sections(file, lambda: OmegaConf.load(path), kind)


def _with_sections(
    file: str | Path, read: Callable[[], Any], kind: type
) -> DictConfig:
    """What `read` gives, where each section of `kind` is a section."""
    try:
        loaded = read()
    except (
        Exception
    ) as error:  # a YAML error of any kind: name the file, and no trace
        reason = _one_line(error)
        raise InputError(f"{file}: is no YAML ({reason})") from None
    if not OmegaConf.is_dict(loaded):
        raise InputError(
            f"{file}: is a list; a configuration is made of key: value"
        )
    values = cast(dict[str, Any], OmegaConf.to_container(loaded))
    for section in fields(kind):
        if not is_dataclass(section.type) or section.name not in values:
            continue
        value = values[section.name]
        if not isinstance(value, dict):
            raise InputError(
                f"{file}: {section.name} is {value}; it is a section with keys of its own"
            )
    return OmegaConf.create(_restore_words(values, kind))


def _restore_words(value: Any, kind: Any) -> Any:
    """Values in which a bare on or off, a boolean to YAML, is a word again where `kind` has words."""
    if is_dataclass(kind) and isinstance(value, dict):
        types = {field.name: field.type for field in fields(kind)}
        restored = {}
        for name, inner in value.items():
            restored[name] = _restore_words(inner, types.get(name))
        return restored
    if isinstance(value, bool) and {"on", "off"} <= set(get_args(kind)):
        return "on" if value else "off"
    return value


def _allowed_keys(error: OmegaConfBaseException, kind: type) -> str:
    """The keys that exist, in brackets, where one was given that does not; otherwise nothing.

    Before them the settings of other sections that the key is the name of.
    """
    node = getattr(error, "parent_node", None)
    if node is None or not hasattr(node, "keys") or "not in" not in str(error):
        return ""
    keys = ", ".join(map(str, node.keys()))
    if not keys:
        return ""
    hint = ""
    elsewhere = _keys_named(str(error.key), kind)
    if elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}? "
    return f" ({hint}there are: {keys})"


def _keys_named(name: str, kind: type) -> list[str]:
    """The dotted keys that end in a name: `learning_rate` is table's and optimizer's."""
    keys = []
    for section in fields(kind):
        if not is_dataclass(section.type):
            continue
        for field in fields(section.type):
            if field.name == name:
                keys.append(f"{section.name}.{name}")
    return keys
