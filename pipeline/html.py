"""One page of HTML with everything in it: it opens without a network. Floor 4."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill a template of `pipeline/templates`; values are escaped unless it says `safe`.

    Args:
        template: name of the file.
        filters: further filters that it uses.
        values: its variables; `made`, the time, is given.
    """
    environment = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    made = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    return environment.get_template(template).render(made=made, **values)
