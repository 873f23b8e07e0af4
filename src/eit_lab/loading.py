"""Composed mappings to typed configs and back, and the one line that says what is wrong with a mapping.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from eit_lab.config import AnyModelConfig, CheckedModel, Config, ConfigError

_UNION_KEYS = ("model", "model.stem", "data", "logger")


def load(plain: Mapping[str, Any]) -> Config:
    """The typed Config of a composed, resolved mapping. Raises ConfigError in one line for the first thing wrong.

    Nulls that follow from other keys are filled here (the stem's numbers from data.img_size), so that two commands that
    mean the same run are the same run.
    """
    config: Config = _validate(Config, plain, prefix="")
    return dataclasses.replace(config, model=config.model.for_images(config.data.img_size))


def load_model(plain: Mapping[str, Any]) -> AnyModelConfig:
    """The typed model config, of either kind, of a composed mapping of the model group alone."""
    model: AnyModelConfig = _validate(CheckedModel, plain, prefix="model.")
    return model


def load_part(cls: Any, plain: Mapping[str, Any], *, prefix: str) -> Any:
    """An object of any of our checked dataclasses; ``prefix`` is its dotted key with a dot at the end."""
    return _validate(cls, plain, prefix=prefix)


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _validate(cls: Any, plain: Mapping[str, Any], *, prefix: str) -> Any:
    try:
        return _adapter(cls).validate_python(dict(plain))
    except ValidationError as error:
        raise ConfigError(_one_line(error.errors(), cls, prefix)) from None


def _one_line(errors: Sequence[Any], cls: type, prefix: str) -> str:
    """The first mistake in words. A plain union fails once for each alternative, all at one key: name them all."""
    first = errors[0]
    key, owner = _dotted_key(first["loc"], cls, prefix)
    got, kind, ctx = first["input"], first["type"], first.get("ctx", {})
    if kind == "value_error":
        return str(ctx["error"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(key, got, [f.name for f in dataclasses.fields(owner)] if owner else [])
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found"):
        return f"{key} must be given, and is missing"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = ctx.get("expected", ctx.get("expected_tags", ""))
        valid = [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
        if kind == "union_tag_invalid":
            key, got = f"{key}.kind", ctx["tag"]
        return f"{key} must be one of {', '.join(valid)}, got {got!r}{nearest(str(got), valid)}"
    same_key = [error for error in errors if _dotted_key(error["loc"], cls, prefix)[0].startswith(key)]
    rules = list(dict.fromkeys(_rule(error) for error in same_key))
    hint = _nearest_bound(ctx) if len(rules) == 1 else ""
    return f"{key} must be {' or '.join(rules)}, got {got!r}{hint}"


def _rule(error: Mapping[str, Any]) -> str:
    text: str = error["msg"].removeprefix("Input should be ")
    for ours, theirs in {"an integer": "a valid integer", "a ": "a valid ", "text": "a string"}.items():
        text = text.replace(theirs, ours)
    return text.partition(",")[0].replace("a tuple", "a list").replace("an instance of", "a")


def _nearest_bound(ctx: Mapping[str, Any]) -> str:
    for name, before in (("ge", ""), ("le", ""), ("gt", "just above "), ("lt", "just below ")):
        if name in ctx:
            return f"; nearest: {before}{ctx[name]:g}"
    return ""


def _dotted_key(loc: Sequence[int | str], cls: type, prefix: str) -> tuple[str, type | None]:
    """The user's dotted key for a pydantic location, and the dataclass that owns its last part."""
    key, owner, current = prefix.rstrip("."), None, _members(cls)
    steps = iter(loc)
    for step in steps:
        by_tag = {tag: sub for sub in current for tag in _tags(sub)}
        if key in _UNION_KEYS and step in by_tag:  # a tagged union's tag is not a part of the key
            current = (by_tag[str(step)],)
            continue
        owner = next((sub for sub in current if step in {f.name for f in dataclasses.fields(sub)}), None)
        if owner is None and current:
            owner = current[0]
            current = ()
        elif owner is not None:
            current = _members(get_type_hints(owner, include_extras=True).get(str(step)))
        elif not isinstance(step, int):  # which alternative of a plain union failed: not a part of the key
            continue
        key = f"{key}[{step}]" if isinstance(step, int) else f"{key}.{step}".lstrip(".")
    return key, owner


def _members(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return (hint,)
    return tuple(member for part in get_args(hint) for member in _members(part)) if get_origin(hint) else ()


def _tags(cls: type) -> tuple[str, ...]:
    hint = get_type_hints(cls).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def unknown_key(key: str, value: Any, siblings: Sequence[str]) -> str:
    """One line for a key that does not exist, with the nearest of its siblings."""
    parent, _, last = key.rpartition(".")
    valid = [f"{parent}.{name}".lstrip(".") for name in siblings]
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)
    if close:
        return f"{key} is not a key, got {value!r}; nearest: {f'{parent}.{close[0]}'.lstrip('.')}"
    return f"{key} is not a key, got {value!r}; there are: {', '.join(valid)}"


def nearest(word: str, valid: Sequence[str]) -> str:
    """``; nearest: NAME`` when one of the valid names is close to the word, else nothing."""
    same = [name for name in valid if name.lower() == word.lower()]
    close = same or difflib.get_close_matches(word, valid, n=1, cutoff=0.4)
    return f"; nearest: {close[0]}" if close else ""


def dump(config: Any) -> dict[str, Any]:
    """A config object as nested plain dicts and lists, ready for JSON, YAML and hashing."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def field_help(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, help, default) of every field below a config class, depth first; MISSING where there is no default."""
    hints = get_type_hints(cls, include_extras=True)
    for item in dataclasses.fields(cls):
        key = f"{prefix}{item.name}"
        members = _members(hints[item.name])
        if not members:
            yield key, item.metadata["help"], item.default
        for member in members:
            yield from field_help(member, f"{key}.")


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a flat config class that have defaults, as plain values."""
    return {f.name: _plain(f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
