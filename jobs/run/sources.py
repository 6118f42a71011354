"""What a config file or a KEY=VALUE setting says, in the words it was written in.

YAML would make 2026_11_26 a number, 1:30 ninety and `no` false. Here a value stays the text that stands there, but for
null, and is what the key's type makes of it when the config is merged.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf

from medsynth.errors import UserError

_REPOSITORY = Path(__file__).parents[2]
_MOST = 100_000
"""Values of a file, those that its aliases repeat counted each time: a few lines of aliases could be billions."""
_STANDARD, _FOREIGN = "tag:yaml.org,2002:", "tag:yaml.org,2002:python/"


def read_file(path: Path) -> DictConfig:
    """The settings of a YAML file, UTF-8.

    Raises:
        UserError: there is no such file, it is no YAML, or it gives a key twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:  # as UTF-16 without its mark is
            raise UserError(f"{path} is no YAML: save it as text in UTF-8")
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        also = f"; there is {_REPOSITORY / path}" if where and (_REPOSITORY / path).is_file() else ""
        raise UserError(f"there is no config file {path}{where}{also}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no YAML: save it as text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        said = _said(yaml.compose(text, yaml.SafeLoader))
        settings = {} if said is None else said
        if not isinstance(settings, dict):
            raise UserError(f"{path} holds no keys")
        return OmegaConf.create(settings)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path} is no YAML: {line}{_problem(error)}") from None
    except Exception as error:  # yaml's errors are many, and OmegaConf's; all mean the same to the user
        raise UserError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None


def read_setting(argument: str, texts: Mapping[str, bool] | None = None) -> DictConfig:
    """What "train.max_steps=100" says.

    texts: the keys that are text (`text_keys`), which takes everything behind the first "=" as it was typed, quotes,
    "#" and ":" included; where null is allowed (True), `null` and nothing at all are that. Other values are YAML. None
    where the types of the keys are not yet known.

    Raises:
        UserError: this is no setting, or its value no YAML.
    """
    key, separator, value = argument.partition("=")
    if not argument.isascii() and argument != argument.encode(errors="replace").decode():
        raise UserError(f"{argument}: this is not UTF-8; rename what it names (convmv does), or type it in UTF-8")
    if not separator or not key:
        raise UserError(f"{argument}: a config file ends in .yaml, a setting is key=value")
    optional = (texts or {}).get(key, (texts or {}).get(f"{key.rpartition('.')[0]}.*"))
    said: Any = None if optional and value in ("", "null") else value
    if optional is None:
        try:
            said = _said(yaml.compose(value, yaml.SafeLoader))
        except (yaml.YAMLError, RecursionError) as error:
            if texts is not None:
                raise UserError(f"{argument}: {key} takes YAML: {_problem(error)}") from None
    if said == MISSING:
        raise UserError(f"{argument}: {MISSING} is what stands for a missing value")
    settings = OmegaConf.create()
    try:
        OmegaConf.update(settings, key, said)
    except Exception as error:  # of a key that is none, or an interpolation that is not closed
        raise UserError(f"{argument}: {str(error).splitlines()[0]}") from None
    return settings


def is_setting(argument: str) -> bool:
    """Whether a command's argument is KEY=VALUE, and not the path of a config file."""
    if "=" not in argument or not argument.endswith((".yaml", ".yml")):  # a setting may be longer than any path
        return "=" in argument
    return not Path(argument).is_file() and bool(re.fullmatch(r"[\w.]*", argument.partition("=")[0]))


def has_stages(arguments: Sequence[str]) -> bool:
    """Whether one of a command's arguments is a file of stages, and not of one run's keys."""
    return any(is_staged(Path(argument)) for argument in arguments if not is_setting(argument))


def is_staged(path: Path) -> bool:
    """Whether a config file has `stages` at its top; False where there is no such file."""
    return path.is_file() and "stages" in read_file(path)


def _said(node: yaml.Node | None, count: Iterator[int] | None = None) -> Any:
    """Dicts and lists of text and None, as they stand in the tree of a YAML document."""
    if node is None:
        return None
    count = itertools.count(1) if count is None else count
    if next(count) > _MOST:
        raise yaml.MarkedYAMLError(problem=f"its aliases make more than {_MOST:,} values", problem_mark=node.start_mark)
    if not node.tag.startswith(_STANDARD) or node.tag.startswith(_FOREIGN):
        raise yaml.MarkedYAMLError(problem=f"a config takes no {node.tag}", problem_mark=node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == f"{_STANDARD}null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_said(child, count) for child in node.value]
    inherited: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, child in node.value:
        if name.tag == f"{_STANDARD}merge":
            parents = child.value if isinstance(child, yaml.SequenceNode) else [child]
            for parent in parents:
                inherited = _said(parent, count) | inherited  # the first that has a key has it
        elif not isinstance(name, yaml.ScalarNode) or name.value in own:
            problem = f"the key {name.value} stands there twice" if isinstance(name, yaml.ScalarNode) else "no key"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
        else:
            own[name.value] = _said(child, count)
    return inherited | own


def _problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (a tab: indent with spaces)" if r"'\t'" in problem else problem
